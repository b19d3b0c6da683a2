#include "pair_map.h"

#include <algorithm>
#include <limits>

namespace scalemoe {
namespace {

enum Header { kMagic, kRank, kRanks, kNumLocal, kPairs, kEntries, kRows, kHeaderInts };
constexpr int32_t kMagicValue = 0x5ca1e;

// tokens [ranks], first_pair [ranks + 1], padding [num_local, 2], token [pairs], first_entry [pairs + 1], row [entries]
int64_t ints_of(int64_t ranks, int64_t num_local, int64_t pairs, int64_t entries) {
  return kHeaderInts + ranks + (ranks + 1) + 2 * num_local + pairs + (pairs + 1) + entries;
}

int64_t rounded_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

bool Experts::valid() const {
  const int64_t slots = num_local * ranks;
  for (int64_t token = 0; token < tokens; token++) {
    int32_t before = -1;
    bool ended = false;
    for (int64_t column = 0; column < columns; column++) {
      const int32_t id = at(token, column);
      if (id == -1) {
        ended = true;
        continue;
      }
      if (ended || id <= before || id >= slots) return false;
      before = id;
    }
  }
  return true;
}

bool Experts::leaves(int64_t token, int rank) const {
  const int64_t begin = rank * num_local, end = begin + num_local;
  for (int64_t column = 0; column < columns && at(token, column) >= 0; column++) {
    if (at(token, column) < begin || at(token, column) >= end) return true;
  }
  return false;
}

void Outgoing::assign(const Experts& experts) {
  pairs.assign(experts.ranks, 0);
  entries.assign(experts.ranks, 0);
  pair_of.resize(experts.tokens * experts.columns);
  entry_of.resize(experts.tokens * experts.columns);
  for (int64_t token = 0; token < experts.tokens; token++) {
    int64_t before = -1;
    for (int64_t column = 0; column < experts.columns && experts.at(token, column) >= 0; column++) {
      const int64_t rank = experts.at(token, column) / experts.num_local;
      if (rank != before) pairs[rank]++;
      before = rank;
      pair_of[token * experts.columns + column] = static_cast<int32_t>(pairs[rank] - 1);
      entry_of[token * experts.columns + column] = static_cast<int32_t>(entries[rank]++);
    }
  }
}

bool PairMap::count(const std::vector<Experts>& experts, int rank, int64_t alignment, std::vector<int64_t>* rows_LG, MapSizes* sizes) {
  const int64_t ranks = static_cast<int64_t>(experts.size()), num_local = experts[rank].num_local, first = rank * num_local;
  rows_LG->assign(num_local * ranks, 0);
  *sizes = {};
  for (int64_t source = 0; source < ranks; source++) {
    const Experts& of = experts[source];
    for (int64_t token = 0; token < of.tokens; token++) {
      const int64_t before = sizes->entries;
      for (int64_t column = 0; column < of.columns; column++) {
        const int64_t expert = of.at(token, column) - first;
        if (expert < 0 || expert >= num_local) continue;
        (*rows_LG)[expert * ranks + source]++;
        sizes->entries++;
      }
      sizes->pairs += sizes->entries > before;
    }
  }
  for (int64_t expert = 0; expert < num_local; expert++) {
    int64_t rows = 0;
    for (int64_t source = 0; source < ranks; source++) rows += (*rows_LG)[expert * ranks + source];
    if (rows > std::numeric_limits<int32_t>::max() - alignment) return false;
    sizes->rows += rounded_up(rows, alignment);
  }
  sizes->ints = ints_of(ranks, num_local, sizes->pairs, sizes->entries);
  return std::max(sizes->rows, sizes->entries) <= std::numeric_limits<int32_t>::max();
}

void PairMap::write(
    const std::vector<Experts>& experts, int rank, int64_t alignment, const std::vector<int64_t>& rows_LG, const MapSizes& sizes,
    int32_t* map, int64_t* rows_per_expert) {
  const int ranks = static_cast<int>(experts.size());
  const int64_t num_local = experts[rank].num_local, first = rank * num_local;
  const int64_t header[] = {kMagicValue, rank, ranks, num_local, sizes.pairs, sizes.entries, sizes.rows};
  std::copy(std::begin(header), std::end(header), map);
  lay_out(map, ranks, num_local, sizes.pairs);
  const auto at = [map](const int32_t* view) { return map + (view - map); };
  std::vector<int64_t> next_LG(num_local * ranks);
  int64_t row = 0;
  for (int64_t expert = 0; expert < num_local; expert++) {
    const int64_t start = row;
    for (int source = 0; source < ranks; source++) {
      next_LG[expert * ranks + source] = row;
      row += rows_LG[expert * ranks + source];
    }
    at(padding_)[2 * expert] = static_cast<int32_t>(row);
    row = start + rounded_up(row - start, alignment);
    at(padding_)[2 * expert + 1] = static_cast<int32_t>(row);
    rows_per_expert[expert] = row - start;
  }
  int64_t pair = 0, entry = 0;
  for (int source = 0; source < ranks; source++) {
    const Experts& of = experts[source];
    at(tokens_)[source] = static_cast<int32_t>(of.tokens);
    at(first_pair_)[source] = static_cast<int32_t>(pair);
    for (int64_t token = 0; token < of.tokens; token++) {
      const int64_t before = entry;
      for (int64_t column = 0; column < of.columns; column++) {
        const int64_t expert = of.at(token, column) - first;
        if (expert < 0 || expert >= num_local) continue;
        at(row_)[entry++] = static_cast<int32_t>(next_LG[expert * ranks + source]++);
      }
      if (entry == before) continue;
      at(token_)[pair] = static_cast<int32_t>(token);
      at(first_entry_)[pair++] = static_cast<int32_t>(before);
    }
  }
  at(first_pair_)[ranks] = static_cast<int32_t>(pair);
  at(first_entry_)[pair] = static_cast<int32_t>(entry);
}

bool PairMap::read(const int32_t* map, int64_t ints, int64_t rows, int rank, int ranks, int64_t num_local) {
  if (ints < kHeaderInts || map[kMagic] != kMagicValue || map[kRows] != rows) return false;
  if (map[kRank] != rank || map[kRanks] != ranks || map[kNumLocal] != num_local || map[kPairs] < 0 || map[kEntries] < 0) return false;
  if (ints != ints_of(ranks, num_local, map[kPairs], map[kEntries])) return false;
  lay_out(map, ranks, num_local, map[kPairs]);
  return first_pair_[ranks] == map[kPairs] && first_entry_[map[kPairs]] == map[kEntries] && in_bounds(map[kEntries], rows);
}

bool PairMap::in_bounds(int64_t entries, int64_t rows) const {
  if (first_pair_[0] != 0 || first_entry_[0] != 0) return false;
  for (int source = 0; source < ranks_; source++) {
    if (tokens_[source] < 0 || first_pair_[source + 1] < first_pair_[source] || first_pair_[source + 1] > pairs()) return false;
    for (int64_t pair = first_pair_[source]; pair < first_pair_[source + 1]; pair++) {
      if (token_[pair] < 0 || token_[pair] >= tokens_[source] || first_entry_[pair + 1] <= first_entry_[pair]) return false;
    }
  }
  for (int64_t entry = 0; entry < entries; entry++) {
    if (row_[entry] < 0 || row_[entry] >= rows) return false;
  }
  for (int64_t expert = 0; expert < num_local_; expert++) {
    if (padding_begin(expert) < 0 || padding_begin(expert) > padding_end(expert) || padding_end(expert) > rows) return false;
  }
  return true;
}

void PairMap::lay_out(const int32_t* map, int ranks, int64_t num_local, int64_t pairs) {
  ranks_ = ranks;
  num_local_ = num_local;
  tokens_ = map + kHeaderInts;
  first_pair_ = tokens_ + ranks;
  padding_ = first_pair_ + ranks + 1;
  token_ = padding_ + 2 * num_local;
  first_entry_ = token_ + pairs;
  row_ = first_entry_ + pairs + 1;
}

}  // namespace scalemoe
