// Who wants which row: for the rank that a token comes from, and for the rank that computes experts.
#pragma once

#include <cstdint>
#include <vector>

namespace scalemoe {

// What a rank's tokens want, int32 [tokens, columns]: the expert slots of each token, ascending, then -1. Slot q lives on rank
// q / num_local.
struct Experts {
  const int32_t* ids;
  int64_t tokens, columns, num_local;
  int ranks;

  int32_t at(int64_t token, int64_t column) const { return ids[token * columns + column]; }
  // False for anything else than described above.
  bool valid() const;
  // Whether any rank but this one wants the token.
  bool leaves(int64_t token, int rank) const;
};

// The source's side. A pair is a (token, rank) with at least one of the token's experts on the rank, an entry a (token, column) with an
// expert. The pairs and entries of each rank are numbered by token and column.
struct Outgoing {
  std::vector<int64_t> pairs, entries;     // [ranks]
  std::vector<int32_t> pair_of, entry_of;  // [tokens, columns]
  void assign(const Experts& experts);
};

struct MapSizes {
  int64_t pairs, entries, rows, ints;  // ints: of the tensor
};

// The side of a rank that computes experts: the int32 tensor `map` of the ops. A header; then for the pairs in (source, token) order the
// token and where its entries start, for each entry its row. Rows are in (expert, source, token) order, and each expert's end with padding.
class PairMap {
 public:
  // Counts the rows of each of the rank's experts from each source, and what `write` will write. False if that needs more than int32.
  static bool count(const std::vector<Experts>& experts, int rank, int64_t alignment, std::vector<int64_t>* rows_LG, MapSizes* sizes);

  // Fills map [sizes.ints] and rows_per_expert [num_local], padding included, and views the map.
  void write(
      const std::vector<Experts>& experts, int rank, int64_t alignment, const std::vector<int64_t>& rows_LG, const MapSizes& sizes,
      int32_t* map, int64_t* rows_per_expert);

  // Views a map that `write` made on this rank; false for anything else, so that nothing is read or written out of bounds by it.
  bool read(const int32_t* map, int64_t ints, int64_t rows, int rank, int ranks, int64_t num_local);

  int64_t tokens(int source) const { return tokens_[source]; }
  int64_t first_pair(int source) const { return first_pair_[source]; }
  int64_t pairs() const { return first_pair_[ranks_]; }
  int64_t token(int64_t pair) const { return token_[pair]; }
  int64_t first_entry(int64_t pair) const { return first_entry_[pair]; }
  int64_t entries() const { return first_entry_[pairs()]; }
  int64_t row(int64_t entry) const { return row_[entry]; }
  int64_t num_local() const { return num_local_; }
  int64_t padding_begin(int64_t expert) const { return padding_[2 * expert]; }
  int64_t padding_end(int64_t expert) const { return padding_[2 * expert + 1]; }

 private:
  void lay_out(const int32_t* map, int ranks, int64_t num_local, int64_t pairs);
  bool in_bounds(int64_t entries, int64_t rows) const;

  int ranks_ = 0;
  int64_t num_local_ = 0;
  const int32_t *tokens_ = nullptr, *first_pair_ = nullptr, *padding_ = nullptr;
  const int32_t *token_ = nullptr, *first_entry_ = nullptr, *row_ = nullptr;
};

}  // namespace scalemoe
