// The way back: each rank sums its rows for a (token, rank) pair, then the token's own rank sums those of the ranks.
#include <cstring>

#include "exchange.h"
#include "layout.h"
#include "parallel.h"
#include "rows.h"

namespace scalemoe {
namespace {

// Where a source finds what is its own in the half of a rank that returns rows; at the start of the half, one for each source.
struct ReturnBlock {
  int64_t rows, pairs, values, entries;  // byte offset and number, twice
};

// The parts of such a half. The pairs and entries of the rank's own tokens are left out.
struct ReturnLayout {
  int64_t own_pair, own_pairs, own_entry, own_entries;
  size_t values, rows, end;

  ReturnLayout(const OpArgs& args, const PairMap& map, int rank, int ranks)
      : own_pair(map.first_pair(rank)),
        own_pairs(map.first_pair(rank + 1) - own_pair),
        own_entry(map.first_entry(own_pair)),
        own_entries(map.first_entry(own_pair + own_pairs) - own_entry),
        values(at_line(ranks * sizeof(ReturnBlock))),
        rows(at_line(values + (map.entries() - own_entries) * args.value_bytes)),
        end(rows + pairs(map) * row_bytes_of(args)) {}

  int64_t pairs(const PairMap& map) const { return map.pairs() - own_pairs; }
  int64_t pair_at(int64_t place) const { return place < own_pair ? place : place + own_pairs; }
  int64_t place_of_pair(int64_t pair) const { return pair < own_pair + own_pairs ? pair : pair - own_pairs; }
  int64_t place_of_entry(int64_t entry) const { return entry < own_entry + own_entries ? entry : entry - own_entries; }
};

void write_blocks(const OpArgs& args, const PairMap& map, const ReturnLayout& layout, int ranks, uint8_t* half) {
  for (int source = 0; source < ranks; source++) {
    const int64_t pair = map.first_pair(source), end_pair = map.first_pair(source + 1), entry = map.first_entry(pair);
    const ReturnBlock block{
        static_cast<int64_t>(layout.rows + layout.place_of_pair(pair) * row_bytes_of(args)), end_pair - pair,
        static_cast<int64_t>(layout.values + layout.place_of_entry(entry) * args.value_bytes), map.first_entry(end_pair) - entry};
    std::memcpy(half + source * sizeof block, &block, sizeof block);
  }
}

// Sums the rows of each pair of the other ranks' tokens, and copies their values.
void publish_returns(
    const OpArgs& args, const PairMap& map, const ReturnLayout& layout, const uint8_t* rows, const uint8_t* values, uint8_t* half) {
  const int64_t row_bytes = row_bytes_of(args), pairs = layout.pairs(map);
  parallel_for(pairs, (pairs + map.entries() - layout.own_entries) * row_bytes, args.threads, [&](int64_t begin, int64_t end) {
    std::vector<const void*> of_pair;
    for (int64_t place = begin; place < end; place++) {
      const int64_t pair = layout.pair_at(place);
      of_pair.clear();
      for (int64_t entry = map.first_entry(pair); entry < map.first_entry(pair + 1); entry++) {
        of_pair.push_back(rows + map.row(entry) * row_bytes);
        if (!args.value_bytes) continue;
        uint8_t* value = half + layout.values + layout.place_of_entry(entry) * args.value_bytes;
        copy_value(value, values + map.row(entry) * args.value_bytes, args.value_bytes);
      }
      sum_rows(half + layout.rows + place * row_bytes, of_pair.data(), of_pair.size(), args.hidden, args.dtype);
    }
  });
}

// Sums the rows that came back for each token. `returned`: this rank's first row in each other half.
void sum_returns(
    const OpArgs& args, const Experts& experts, const Outgoing& outgoing, const PairMap& map, int rank,
    const std::vector<const uint8_t*>& returned, const uint8_t* rows, uint8_t* y) {
  const int64_t row_bytes = row_bytes_of(args), own_first = map.first_entry(map.first_pair(rank));
  parallel_for(args.tokens, (args.tokens + args.rows) * row_bytes, args.threads, [&](int64_t begin, int64_t end) {
    std::vector<const void*> of_token(args.columns), of_own(args.columns);
    std::vector<uint8_t> own_sum(row_bytes);
    for (int64_t token = begin; token < end; token++) {
      int64_t ranks = 0, own = 0, own_place = 0, before = -1;
      for (int64_t column = 0; column < args.columns && experts.at(token, column) >= 0; column++) {
        const int64_t from = experts.at(token, column) / args.num_local, at = token * args.columns + column;
        if (from == rank) of_own[own++] = rows + map.row(own_first + outgoing.entry_of[at]) * row_bytes;
        if (from == before) continue;
        before = from;
        if (from == rank) own_place = ranks;
        of_token[ranks++] = from == rank ? nullptr : returned[from] + outgoing.pair_of[at] * row_bytes;
      }
      const bool all_own = own > 0 && ranks == 1;
      if (own > 1 && !all_own) sum_rows(own_sum.data(), of_own.data(), own, args.hidden, args.dtype);
      if (own > 0) of_token[own_place] = own > 1 ? own_sum.data() : of_own[0];
      sum_rows(y + token * row_bytes, all_own ? of_own.data() : of_token.data(), all_own ? own : ranks, args.hidden, args.dtype);
    }
  });
}

// The values of each token's rows, zero where it has none. `returned`: this rank's first value in each half, for itself null.
void gather_values(
    const OpArgs& args, const Experts& experts, const Outgoing& outgoing, const PairMap& map, int rank,
    const std::vector<const uint8_t*>& returned, const uint8_t* values, uint8_t* gathered) {
  const int64_t own_first = map.first_entry(map.first_pair(rank));
  if (args.tokens) std::memset(gathered, 0, args.tokens * args.columns * args.value_bytes);
  for (int64_t token = 0; token < args.tokens; token++) {
    for (int64_t column = 0; column < args.columns && experts.at(token, column) >= 0; column++) {
      const int64_t from = experts.at(token, column) / args.num_local, at = token * args.columns + column;
      const int64_t entry = outgoing.entry_of[at], place = from == rank ? map.row(own_first + entry) : entry;
      const uint8_t* value = (from == rank ? values : returned[from]) + place * args.value_bytes;
      copy_value(gathered + at * args.value_bytes, value, args.value_bytes);
    }
  }
}

}  // namespace

int Exchange::combine(const OpArgs& args, const uint8_t* rows, const uint8_t* values, uint8_t* y, uint8_t* returned_values) {
  const int rank = arena.rank();
  const Experts own = own_experts(args);
  if (!own.valid()) return kBadExperts;
  PairMap map;
  if (!map.read(args.map, args.map_ints, args.rows, rank, arena.size(), args.num_local)) return kBadMap;
  const ReturnLayout layout(args, map, rank, arena.size());
  outgoing_.assign(own);
  if (outgoing_.pairs[rank] != layout.own_pairs || outgoing_.entries[rank] != layout.own_entries) return kBadMap;
  uint8_t* half = arena.begin(args.value_bytes ? Op::kDispatchBackward : Op::kCombine, layout.end);
  if (!half) return kFailed;
  write_blocks(args, map, layout, arena.size(), half);
  publish_returns(args, map, layout, rows, values, half);
  if (barrier(args) || find_returns(args)) return kFailed;
  sum_returns(args, own, outgoing_, map, rank, returned_rows_, rows, y);
  if (args.value_bytes) gather_values(args, own, outgoing_, map, rank, returned_values_, values, returned_values);
  return kDone;
}

int Exchange::find_returns(const OpArgs& args) {
  returned_rows_.assign(arena.size(), nullptr);
  returned_values_.assign(arena.size(), nullptr);
  for (int rank = 0; rank < arena.size(); rank++) {
    if (rank == arena.rank()) continue;
    const size_t size = arena.half_bytes(rank);
    ReturnBlock block;
    if (!fits(arena.rank() * sizeof block, 1, sizeof block, size)) return arena.fail(Failure::kCorrupt, rank);
    std::memcpy(&block, arena.half(rank) + arena.rank() * sizeof block, sizeof block);
    // What is to come is known: the numbers must agree.
    const bool agrees = block.pairs == outgoing_.pairs[rank] && block.entries == outgoing_.entries[rank];
    if (!agrees || !fits(block.rows, block.pairs, row_bytes_of(args), size) || !fits(block.values, block.entries, args.value_bytes, size)) {
      return arena.fail(Failure::kCorrupt, rank);
    }
    returned_rows_[rank] = arena.half(rank) + block.rows;
    returned_values_[rank] = arena.half(rank) + block.values;
  }
  return kDone;
}

}  // namespace scalemoe
