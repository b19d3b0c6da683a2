// The exchange of rows between ranks through an arena: the four ops and the counts, bitwise equal to the collectives of dispatch/ragged.py.
//
// Every op has the same form: each rank writes into its own half what others need of it, passes the barrier, and reads what it needs
// straight into its result. What stays on the rank makes no detour through shared memory.
#pragma once

#include <cstdint>
#include <vector>

#include "arena.h"
#include "pair_map.h"

namespace scalemoe {

// What the ops return, as in ops/transports/shm.py.
enum Outcome : int { kDone = 0, kFailed = -1, kBadExperts = -2, kBadMap = -3, kTooManyRows = -4, kNotBegun = -5 };

// Sizes and small inputs of an op, as `_Op` in ops/transports/shm.py. value_bytes is 0 where there are no probabilities, map null in a dispatch.
struct OpArgs {
  const int32_t* experts;  // [tokens, columns]
  const int32_t* map;      // [map_ints]
  int64_t tokens, columns, num_local, hidden, dtype, value_bytes, map_ints, rows, alignment, threads;
};

// Owns an arena, and between the two halves of a dispatch what the first found out. One op at a time.
class Exchange {
 public:
  Arena arena;

  // counts: `count` items of `item` bytes; gathered: [ranks, count].
  int gather_counts(const uint8_t* counts, int64_t count, int64_t item, uint8_t* gathered);

  // x [tokens, hidden], probs [tokens, columns]. The caller makes room for the results by `sizes`, and keeps all inputs until the finish.
  int dispatch_begin(const OpArgs& args, const uint8_t* x, const uint8_t* probs, MapSizes* sizes);
  // rows [sizes.rows, hidden], row_probs [sizes.rows], rows_per_expert [num_local], map [sizes.ints]
  int dispatch_finish(uint8_t* rows, uint8_t* row_probs, int64_t* rows_per_expert, int32_t* map);

  // grad_y [tokens, hidden] -> grad_rows [rows, hidden]
  int combine_backward(const OpArgs& args, const uint8_t* grad_y, uint8_t* grad_rows);

  // rows [rows, hidden] -> y [tokens, hidden]. With value_bytes it is dispatch_backward, and also returns values [rows] ->
  // returned_values [tokens, columns].
  int combine(const OpArgs& args, const uint8_t* rows, const uint8_t* values, uint8_t* y, uint8_t* returned_values);

 private:
  Experts own_experts(const OpArgs& args) const;
  int barrier(const OpArgs& args);
  int read_experts(const OpArgs& args);
  int find_returns(const OpArgs& args);

  // Of a dispatch under way.
  bool begun_ = false;
  OpArgs args_{};
  const uint8_t *x_ = nullptr, *probs_ = nullptr;
  std::vector<std::vector<int32_t>> copies_;  // of the other ranks' experts, which could change while they are read
  std::vector<Experts> experts_;
  std::vector<int64_t> rows_LG_;
  MapSizes sizes_{};

  // Of a combine.
  Outgoing outgoing_;
  std::vector<const uint8_t*> returned_rows_, returned_values_;  // [ranks]: this rank's first in each half
};

}  // namespace scalemoe
