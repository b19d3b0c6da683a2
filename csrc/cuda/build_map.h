// The map of a dispatch, at the receiver: rows in (expert, source rank, token) order, without atomics on positions, so always the same.
#pragma once

#include "sync.h"

namespace scalemoe {

// Block s counts what source s sent for each local expert.
SCALEMOE_KERNEL(kMapThreads) count_rows(SCALEMOE_PARAM Exchange ex, SCALEMOE_PARAM Announcement call, SCALEMOE_PARAM RowMap map) {
  SCALEMOE_SHARED(int32_t, count_L, kMaxLocalExperts);
  const int s = blockIdx.x, num_local = call.num_local;
  const uint32_t epoch = ex.state->epoch;
  // After a failure the slot may hold anything.
  const int num_tokens = has_failed(ex) ? 0 : announcement_at(ex, ex.rank, epoch, s)->num_tokens;
  const int32_t* experts_TK = reinterpret_cast<const int32_t*>(experts_at(ex, ex.rank, epoch, s));
  for (int e = threadIdx.x; e < num_local; e += blockDim.x) count_L[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < num_tokens * call.experts_per_token; i += blockDim.x) {
    const int e = experts_TK[i] - ex.rank * num_local;
    if (e >= 0 && e < num_local) add_shared(&count_L[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_local; e += blockDim.x) map.counts_GL[s * num_local + e] = count_L[e];
  if (threadIdx.x == 0) map.tokens_G[s] = num_tokens;
}

struct Segments {
  int first_row;  // of the block's expert
  int num_rows;   // of all experts, with padding
};

// All threads of the block: where expert e's segment starts, each segment padded to a multiple of `alignment`.
SCALEMOE_DEVICE Segments scan_segments(const int32_t* counts_GL, int num_ranks, int num_local, int alignment, int e) {
  SCALEMOE_SHARED(int32_t, sums, 2);
  if (threadIdx.x < 2) sums[threadIdx.x] = 0;
  __syncthreads();
  for (int other = threadIdx.x; other < num_local; other += blockDim.x) {
    int rows = 0;
    for (int s = 0; s < num_ranks; ++s) rows += counts_GL[s * num_local + other];
    rows = static_cast<int>(round_up(rows, alignment));
    if (other < e) add_shared(&sums[0], rows);
    add_shared(&sums[1], rows);
  }
  __syncthreads();
  return Segments{sums[0], sums[1]};
}

// All threads of the block go through source s's tokens in order: those that want expert e get the rows from `next_row` on.
SCALEMOE_DEVICE void place_tokens(const Exchange& ex, const Announcement& call, const RowMap& map, int e, int s, int next_row) {
  SCALEMOE_SHARED(int32_t, wanted_by_warp, kMapThreads / kWarp);
  const int num_experts = call.experts_per_token, num_local = call.num_local, num_tokens = map.tokens_G[s];
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int32_t* experts_TK = reinterpret_cast<const int32_t*>(experts_at(ex, ex.rank, ex.state->epoch, s));
  int32_t* row_TK = map.row_GTK + int64_t{s} * ex.max_tokens * num_experts;
  for (int start = 0; start < num_tokens; start += blockDim.x) {
    const int t = start + threadIdx.x;
    int wanted_k = -1;
    for (int k = 0; k < num_experts && t < num_tokens; ++k) {
      const int local = experts_TK[int64_t{t} * num_experts + k] - ex.rank * num_local;
      if (local == e) wanted_k = k;
      // Somebody has to say so of experts that are not here.
      if (e == 0 && (local < 0 || local >= num_local)) row_TK[int64_t{t} * num_experts + k] = -1;
    }
    const uint32_t wanted = __ballot_sync(kAllLanes, wanted_k >= 0);
    if (lane_id() == 0) wanted_by_warp[warp] = __popc(wanted);
    __syncthreads();
    int row = next_row + __popc(wanted & ((1u << lane_id()) - 1));
    for (int w = 0; w < warps; ++w) {
      if (w < warp) row += wanted_by_warp[w];
      next_row += wanted_by_warp[w];
    }
    if (wanted_k >= 0) row_TK[int64_t{t} * num_experts + wanted_k] = row;
    __syncthreads();
  }
}

// Block (e, s) gives rows to source s's tokens for local expert e. More rows than `row_capacity` are a failure: no row at all, then.
SCALEMOE_KERNEL(kMapThreads)
place_rows(SCALEMOE_PARAM Exchange ex, SCALEMOE_PARAM Announcement call, SCALEMOE_PARAM RowMap map, int row_capacity, int alignment,
           int64_t* tokens_per_expert_L) {
  const int num_ranks = ex.num_ranks, e = static_cast<int>(blockIdx.x) / num_ranks, s = static_cast<int>(blockIdx.x) % num_ranks;
  const Segments segments = scan_segments(map.counts_GL, num_ranks, call.num_local, alignment, e);
  const bool overflows = segments.num_rows > row_capacity;
  int rows_before = 0, used_rows = 0;
  for (int other = 0; other < num_ranks; ++other) {
    const int rows = map.counts_GL[other * call.num_local + e];
    if (other < s) rows_before += rows;
    used_rows += rows;
  }
  // Which of both it is does not depend on other blocks that may fail meanwhile: they all see the same counts.
  const bool failed = overflows || has_failed(ex);
  if (s == 0 && threadIdx.x == 0) {
    map.first_row_L[e] = failed ? 0 : segments.first_row;
    map.used_rows_L[e] = failed ? 0 : used_rows;
    tokens_per_expert_L[e] = failed ? 0 : round_up(used_rows, alignment);
    if (e == 0) {
      map.alignment[0] = alignment;
      map.first_row_L[call.num_local] = failed ? 0 : segments.num_rows;
      if (overflows) fail(ex, kTooManyRows, 1u << ex.rank, ex.rank, segments.num_rows);
    }
  }
  if (!failed) place_tokens(ex, call, map, e, s, segments.first_row + rows_before);
}

}  // namespace scalemoe
