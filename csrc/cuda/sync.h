// Flags between ranks, failures, and the end of a push.
//
// Operation n writes into half n % 2 of the peers' buffers. One round of flags is enough: a rank that has all flags of operation n - 1
// knows that its peers pushed n - 1, in stream order after they had read all of operation n - 2, the last one to use half n % 2.
#pragma once

#include "rows.h"

namespace scalemoe {

SCALEMOE_DEVICE bool has_failed(const Exchange& ex) { return load_relaxed(&ex.state->failure) != 0; }

// One thread calls it. The first failure stays: for the host to see, and for all peers, so that nobody waits for this rank any more.
SCALEMOE_DEVICE void fail(const Exchange& ex, uint32_t code, uint32_t culprits, uint32_t reporter, uint32_t detail) {
  if (compare_and_swap(&ex.state->failure, 0, code) != 0) return;
  ex.failure->culprits = culprits;
  ex.failure->reporter = reporter;
  ex.failure->detail = detail;
  store_release_system(&ex.failure->code, code);
  for (int peer = 0; peer < ex.num_ranks; ++peer) {
    if (peer == ex.rank) continue;
    FlagLine* line = flag_line(ex, peer, ex.rank);
    line->culprits = culprits;
    store_release_system(&line->failure, code);
  }
}

// Whether the caller's rows are fewer than the map's, which is then a failure. All threads of all blocks call it, and get the same answer.
SCALEMOE_DEVICE bool lacks_rows(const Exchange& ex, const Announcement& call, const RowMap& map, int num_rows) {
  const int needed = map.first_row_L[call.num_local];
  if (needed > num_rows && blockIdx.x == 0 && threadIdx.x == 0) fail(ex, kRowsMissing, 1u << ex.rank, ex.rank, needed);
  return needed > num_rows;
}

// All threads of all blocks of a push end here. The last block to arrive moves the epoch on and tells all peers that the data are complete.
SCALEMOE_DEVICE void finish_push(const Exchange& ex, uint32_t epoch) {
  SCALEMOE_SHARED(uint32_t, is_complete, 1);
  fence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_complete[0] = 0;
    if (add_acquire_release(&ex.state->blocks_arrived, 1) == gridDim.x - 1) {
      ex.state->blocks_arrived = 0;
      ex.state->epoch = epoch;
      if (load_relaxed(&ex.state->bad_experts) != 0) {
        fail(ex, kBadExperts, 1u << ex.rank, ex.rank, 0);
      } else {
        is_complete[0] = 1;
      }
    }
  }
  __syncthreads();
  if (is_complete[0] != 0 && static_cast<int>(threadIdx.x) < ex.num_ranks) {
    fence_system();
    store_release_system(&flag_line(ex, threadIdx.x, ex.rank)->epoch, epoch);
  }
}

SCALEMOE_DEVICE bool agrees(const Announcement& a, const Announcement& b, int max_tokens) {
  return a.operation == b.operation && a.experts_per_token == b.experts_per_token && a.num_local == b.num_local &&
         a.row_bytes == b.row_bytes && a.prob_bytes == b.prob_bytes && a.num_tokens >= 0 && a.num_tokens <= max_tokens;
}

// One whole warp calls it, lane s looking after source s: waits until the data of all sources are complete, for at most `timeout_ns`.
SCALEMOE_DEVICE void wait_for_peers(const Exchange& ex, const Announcement& call, uint32_t epoch) {
  const int lane = lane_id();
  const bool is_source = lane < ex.num_ranks;
  FlagLine* line = flag_line(ex, ex.rank, is_source ? lane : ex.rank);
  const uint64_t start = now_ns();
  uint32_t late, reported;
  bool expired;
  do {
    pause();
    expired = __ballot_sync(kAllLanes, now_ns() - start > ex.timeout_ns) != 0;
    reported = __ballot_sync(kAllLanes, is_source && load_acquire_system(&line->failure) != 0);
    late = __ballot_sync(kAllLanes, is_source && static_cast<int32_t>(load_acquire_system(&line->epoch) - epoch) < 0);
  } while (late != 0 && reported == 0 && !expired);
  if (late != 0) {
    if (reported == 0) {
      if (lane == 0) fail(ex, kTimeout, late, ex.rank, 0);
    } else if (lane == __ffs(static_cast<int>(reported)) - 1) {
      fail(ex, line->failure, line->culprits, lane, 0);
    }
    return;
  }
  const bool differs = is_source && !agrees(*announcement_at(ex, ex.rank, epoch, lane), call, ex.max_tokens);
  const uint32_t different = __ballot_sync(kAllLanes, differs);
  if (different != 0 && lane == 0) fail(ex, kMismatch, different, ex.rank, call.operation);
}

// One warp: the only kernel, with exchange_counts, that waits for anyone, so that waiting keeps no multiprocessor from its work.
SCALEMOE_KERNEL(kWarp) wait_peers(SCALEMOE_PARAM Exchange ex, SCALEMOE_PARAM Announcement call) {
  if (!has_failed(ex)) wait_for_peers(ex, call, ex.state->epoch);
}

}  // namespace scalemoe
