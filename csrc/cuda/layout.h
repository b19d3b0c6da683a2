// What lies where: each rank's symmetric buffer, its own state, the failure record, and the map of a dispatch.
//
// Shape letters: G ranks, L experts of one rank, Q = G * L columns, T tokens of one rank, K experts per token, R rows of the local experts.
#pragma once

#include "portable.h"

namespace scalemoe {

constexpr int kMaxRanks = 32;            // one lane, and one bit of a mask, for each
constexpr int kMaxExpertsPerToken = 32;  // one lane for each
constexpr int kMaxLocalExperts = 1024;   // their counters fit into shared memory
constexpr int64_t kMaxCountBytes = 64 << 10;  // of one rank's counts, which travel in the slot of its rows

// Written by one source rank, waited for by the owner. A line of its own, so that polling disturbs nobody.
struct alignas(128) FlagLine {
  uint32_t epoch;     // the last operation whose data are complete; never reset, compared as signed difference
  uint32_t failure;   // the source's FailureCode, or 0
  uint32_t culprits;  // ranks behind that failure, one bit each
};

enum Operation : int32_t { kDispatch = 1, kCombine = 2, kCombineBackward = 3, kDispatchBackward = 4, kGatherCounts = 5 };

// What a source says about its part of an operation. All but num_tokens must be the same on all ranks.
struct Announcement {
  int32_t operation, num_tokens, experts_per_token, num_local, row_bytes, prob_bytes;
};

enum FailureCode : uint32_t { kTimeout = 1, kTooManyRows = 2, kMismatch = 3, kBadExperts = 4, kRowsMissing = 5 };

// In host memory that the device can write: the host looks at it without waiting for the device. `code` is written last.
struct Failure {
  uint32_t code, culprits, reporter, detail;
};

// A rank's own, in device memory, so that a captured graph can be replayed. Starts as zeros.
struct State {
  uint32_t epoch;           // the last operation that this rank has pushed
  uint32_t blocks_arrived;  // of the push that runs
  uint32_t bad_experts;     // seen by the push that runs
  uint32_t failure;         // FailureCode or 0; once set it stays, and nothing is sent or waited for any more
};

// One open transport. buffers[g] is rank g's symmetric buffer as mapped here: kMaxRanks flag lines, then two halves of equal layout, used
// in turn. A half has one slot for each source rank in each section; rows lie densely with the row length of the call.
struct Exchange {
  int32_t num_ranks, rank, max_tokens, max_experts, num_blocks;
  int64_t max_row_bytes;
  int64_t experts_offset, probs_offset, rows_offset, half_bytes;  // sections inside a half
  int64_t experts_slot, probs_slot, rows_slot;                    // bytes of one source's slot
  uint64_t timeout_ns;
  State* state;
  Failure* failure;
  char* buffers[kMaxRanks];
};

SCALEMOE_BOTH int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Fills in offsets and slot sizes from the maxima.
inline void lay_out(Exchange& ex) {
  ex.experts_slot = round_up(int64_t{ex.max_tokens} * ex.max_experts * 4, 128);
  ex.probs_slot = round_up(int64_t{ex.max_tokens} * ex.max_experts * 8, 128);
  const int64_t row_bytes = ex.max_tokens * ex.max_row_bytes;
  ex.rows_slot = round_up(row_bytes > kMaxCountBytes ? row_bytes : kMaxCountBytes, 128);
  ex.experts_offset = round_up(ex.num_ranks * int64_t{sizeof(Announcement)}, 128);
  ex.probs_offset = ex.experts_offset + ex.num_ranks * ex.experts_slot;
  ex.rows_offset = ex.probs_offset + ex.num_ranks * ex.probs_slot;
  ex.half_bytes = ex.rows_offset + ex.num_ranks * ex.rows_slot;
}

inline int64_t buffer_bytes(const Exchange& ex) { return kMaxRanks * int64_t{sizeof(FlagLine)} + 2 * ex.half_bytes; }

SCALEMOE_DEVICE FlagLine* flag_line(const Exchange& ex, int owner, int source) {
  return reinterpret_cast<FlagLine*>(ex.buffers[owner]) + source;
}
SCALEMOE_DEVICE char* half_of(const Exchange& ex, int owner, uint32_t epoch) {
  return ex.buffers[owner] + kMaxRanks * sizeof(FlagLine) + (epoch & 1) * ex.half_bytes;
}
SCALEMOE_DEVICE Announcement* announcement_at(const Exchange& ex, int owner, uint32_t epoch, int source) {
  return reinterpret_cast<Announcement*>(half_of(ex, owner, epoch)) + source;
}
SCALEMOE_DEVICE char* experts_at(const Exchange& ex, int owner, uint32_t epoch, int source) {
  return half_of(ex, owner, epoch) + ex.experts_offset + source * ex.experts_slot;
}
SCALEMOE_DEVICE char* probs_at(const Exchange& ex, int owner, uint32_t epoch, int source) {
  return half_of(ex, owner, epoch) + ex.probs_offset + source * ex.probs_slot;
}
SCALEMOE_DEVICE Word* rows_at(const Exchange& ex, int owner, uint32_t epoch, int source) {
  return reinterpret_cast<Word*>(half_of(ex, owner, epoch) + ex.rows_offset + source * ex.rows_slot);
}

// The int32 tensor that a dispatch leaves for its combine and for both backward passes.
struct RowMap {
  int32_t* alignment;    // one number: segments are padded to a multiple of it
  int32_t* tokens_G;     // tokens of each source
  int32_t* first_row_L;  // [L + 1]: where each expert's segment starts; the last is the number of rows with padding
  int32_t* used_rows_L;  // rows of each segment before its padding
  int32_t* counts_GL;    // rows of each source for each expert
  int32_t* row_GTK;      // [G, max_tokens, K]: the row of each (source, token, k), -1 where its expert is not here
};

SCALEMOE_BOTH RowMap row_map_in(int32_t* items, int num_ranks, int num_local) {
  RowMap map;
  map.alignment = items;
  map.tokens_G = map.alignment + 1;
  map.first_row_L = map.tokens_G + num_ranks;
  map.used_rows_L = map.first_row_L + num_local + 1;
  map.counts_GL = map.used_rows_L + num_local;
  map.row_GTK = map.counts_GL + num_ranks * num_local;
  return map;
}

inline int64_t row_map_items(int64_t num_ranks, int64_t max_tokens, int64_t experts_per_token, int64_t num_local) {
  return 1 + num_ranks + num_local + 1 + num_local + num_ranks * num_local + num_ranks * max_tokens * experts_per_token;
}

}  // namespace scalemoe
