#include "exchange.h"

#include <cstring>

#include "layout.h"
#include "parallel.h"
#include "rows.h"

namespace scalemoe {
namespace {

// From here on, rows written past the caches cost a dispatch and a pass over its rows 5 to 8 % less time, with half as many up to 20 % more
// (measured with 1 MB of L2 for each core, 32 MB of L3 for both). Sums gain nothing by it.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

// Where the parts of a source's half are: experts [tokens, columns], their probabilities, rows [tokens].
struct SourceLayout {
  size_t probs, rows, end;

  SourceLayout(const OpArgs& args, int64_t tokens)
      : probs(at_line(tokens * args.columns * sizeof(int32_t))),
        rows(at_line(probs + tokens * args.columns * args.value_bytes)),
        end(rows + tokens * row_bytes_of(args)) {}

  // Whether that many tokens, of which another rank speaks, are possible at all.
  static bool fits(const OpArgs& args, int64_t tokens, size_t size) {
    const int64_t each = args.columns * (sizeof(int32_t) + args.value_bytes) + row_bytes_of(args);
    return tokens <= INT32_MAX && scalemoe::fits(0, tokens, each, size) && SourceLayout(args, tokens).end <= size;
  }
};

// Copies the rows of tokens that other ranks want.
void publish_rows(const Experts& experts, int rank, int64_t row_bytes, int threads, const uint8_t* x, uint8_t* half) {
  parallel_for(experts.tokens, 2 * experts.tokens * row_bytes, threads, [=](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
      if (experts.leaves(token, rank)) copy_row(half + token * row_bytes, x + token * row_bytes, row_bytes, false);
    }
  });
}

// Copies each pair's row to the rows of its experts, and zeros to the padding. `sources`: the first token's row of each rank.
void expand(const PairMap& map, const std::vector<const uint8_t*>& sources, int64_t row_bytes, int threads, uint8_t* rows) {
  for (int64_t expert = 0; expert < map.num_local(); expert++) {
    const int64_t begin = map.padding_begin(expert), end = map.padding_end(expert);
    if (begin < end) std::memset(rows + begin * row_bytes, 0, (end - begin) * row_bytes);
  }
  const bool stream = map.entries() * row_bytes >= kStreamedBytes;
  parallel_for(map.pairs(), (map.pairs() + map.entries()) * row_bytes, threads, [&](int64_t begin, int64_t end) {
    int source = 0;
    for (int64_t pair = begin; pair < end; pair++) {
      while (pair >= map.first_pair(source + 1)) source++;
      const uint8_t* row = sources[source] + map.token(pair) * row_bytes;
      for (int64_t entry = map.first_entry(pair); entry < map.first_entry(pair + 1); entry++) {
        copy_row(rows + map.row(entry) * row_bytes, row, row_bytes, stream);
      }
    }
  });
}

}  // namespace

Experts Exchange::own_experts(const OpArgs& args) const { return {args.experts, args.tokens, args.columns, args.num_local, arena.size()}; }

int Exchange::barrier(const OpArgs& args) {
  Call call;
  call.row_bytes = row_bytes_of(args);
  call.dtype = args.dtype;
  call.value_bytes = args.value_bytes;
  call.columns = args.columns;
  call.num_local = args.num_local;
  call.tokens = args.tokens;
  return arena.barrier(call);
}

int Exchange::gather_counts(const uint8_t* counts, int64_t count, int64_t item, uint8_t* gathered) {
  const int64_t bytes = count * item;
  uint8_t* half = arena.begin(Op::kGatherCounts, bytes);
  if (!half) return kFailed;
  if (bytes) std::memcpy(half, counts, bytes);
  Call call;
  call.columns = count;
  call.value_bytes = item;
  if (arena.barrier(call)) return kFailed;
  for (int rank = 0; rank < arena.size(); rank++) {
    if (!fits(0, count, item, arena.half_bytes(rank))) return arena.fail(Failure::kCorrupt, rank);
    if (bytes) std::memcpy(gathered + rank * bytes, arena.half(rank), bytes);
  }
  return kDone;
}

int Exchange::dispatch_begin(const OpArgs& args, const uint8_t* x, const uint8_t* probs, MapSizes* sizes) {
  const Experts own = own_experts(args);
  if (!own.valid()) return kBadExperts;
  const SourceLayout layout(args, args.tokens);
  uint8_t* half = arena.begin(Op::kDispatch, layout.end);
  if (!half) return kFailed;
  if (args.tokens) {
    std::memcpy(half, args.experts, args.tokens * args.columns * sizeof(int32_t));
    std::memcpy(half + layout.probs, probs, args.tokens * args.columns * args.value_bytes);
    publish_rows(own, arena.rank(), row_bytes_of(args), args.threads, x, half + layout.rows);
  }
  if (barrier(args)) return kFailed;
  args_ = args;
  x_ = x;
  probs_ = probs;
  if (read_experts(args)) return kFailed;
  if (!PairMap::count(experts_, arena.rank(), args.alignment, &rows_LG_, &sizes_)) return kTooManyRows;
  *sizes = sizes_;
  begun_ = true;
  return kDone;
}

int Exchange::read_experts(const OpArgs& args) {
  experts_.assign(arena.size(), own_experts(args));
  copies_.resize(arena.size());
  for (int source = 0; source < arena.size(); source++) {
    if (source == arena.rank()) continue;
    const int64_t tokens = arena.call(source).tokens;
    if (!SourceLayout::fits(args, tokens, arena.half_bytes(source))) return arena.fail(Failure::kCorrupt, source);
    const auto* shared = reinterpret_cast<const int32_t*>(arena.half(source));
    copies_[source].assign(shared, shared + tokens * args.columns);
    experts_[source].ids = copies_[source].data();
    experts_[source].tokens = tokens;
    if (!experts_[source].valid()) return arena.fail(Failure::kCorrupt, source);
  }
  return kDone;
}

int Exchange::dispatch_finish(uint8_t* rows, uint8_t* row_probs, int64_t* rows_per_expert, int32_t* map_ints) {
  if (!begun_) return kNotBegun;
  begun_ = false;
  const int64_t value_bytes = args_.value_bytes, first_expert = arena.rank() * args_.num_local;
  PairMap map;
  map.write(experts_, arena.rank(), args_.alignment, rows_LG_, sizes_, map_ints, rows_per_expert);
  if (sizes_.rows) std::memset(row_probs, 0, sizes_.rows * value_bytes);
  std::vector<const uint8_t*> sources(arena.size());
  for (int source = 0; source < arena.size(); source++) {
    const SourceLayout layout(args_, experts_[source].tokens);
    const bool own = source == arena.rank();
    const uint8_t* probs = own ? probs_ : arena.half(source) + layout.probs;
    sources[source] = own ? x_ : arena.half(source) + layout.rows;
    for (int64_t pair = map.first_pair(source); pair < map.first_pair(source + 1); pair++) {
      int64_t at = map.token(pair) * args_.columns;
      while (experts_[source].ids[at] < first_expert) at++;
      for (int64_t entry = map.first_entry(pair); entry < map.first_entry(pair + 1); entry++, at++) {
        copy_value(row_probs + map.row(entry) * value_bytes, probs + at * value_bytes, value_bytes);
      }
    }
  }
  expand(map, sources, row_bytes_of(args_), args_.threads, rows);
  return kDone;
}

int Exchange::combine_backward(const OpArgs& args, const uint8_t* grad_y, uint8_t* grad_rows) {
  const Experts own = own_experts(args);
  if (!own.valid()) return kBadExperts;
  PairMap map;
  if (!map.read(args.map, args.map_ints, args.rows, arena.rank(), arena.size(), args.num_local)) return kBadMap;
  if (map.tokens(arena.rank()) != args.tokens) return kBadMap;
  const int64_t row_bytes = row_bytes_of(args);
  uint8_t* half = arena.begin(Op::kCombineBackward, args.tokens * row_bytes);
  if (!half) return kFailed;
  publish_rows(own, arena.rank(), row_bytes, args.threads, grad_y, half);
  if (barrier(args)) return kFailed;
  std::vector<const uint8_t*> sources(arena.size(), grad_y);
  for (int source = 0; source < arena.size(); source++) {
    if (source == arena.rank()) continue;
    const int64_t tokens = map.tokens(source);
    if (tokens != arena.call(source).tokens || !fits(0, tokens, row_bytes, arena.half_bytes(source))) {
      return arena.fail(Failure::kCorrupt, source);
    }
    sources[source] = arena.half(source);
  }
  expand(map, sources, row_bytes, args.threads, grad_rows);
  return kDone;
}

}  // namespace scalemoe
