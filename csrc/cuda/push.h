// Kernels that write into peers' buffers: rows to their experts' ranks, summed rows back to their sources, counts to everyone.
#pragma once

#include "sync.h"

namespace scalemoe {

SCALEMOE_DEVICE void announce(const Exchange& ex, const Announcement& call, uint32_t epoch) {
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < ex.num_ranks) *announcement_at(ex, threadIdx.x, epoch, ex.rank) = call;
}

// All threads of the grid copy `bytes` to the slot `slot_of(peer)` of every peer. Source and slots are aligned to words.
template <class SlotOf>
SCALEMOE_DEVICE void push_to_all(const Exchange& ex, const char* source, int64_t bytes, SlotOf slot_of) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, num_threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t num_words = bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t i = thread; i < num_words; i += num_threads) {
    const Word word = load_once(reinterpret_cast<const Word*>(source) + i);
    for (int p = 0; p < ex.num_ranks; ++p) store_once(reinterpret_cast<Word*>(slot_of((ex.rank + p) % ex.num_ranks)) + i, word);
  }
  for (int64_t i = num_words * static_cast<int64_t>(sizeof(Word)) + thread; i < bytes; i += num_threads) {
    for (int p = 0; p < ex.num_ranks; ++p) slot_of(p)[i] = source[i];
  }
}

// Column of lane k's expert of token t, -1 for none. Notes columns that are out of range or not ascending, and takes them for none.
SCALEMOE_DEVICE int column_of_lane(const Exchange& ex, const Announcement& call, const int32_t* experts_TK, int t) {
  const int lane = lane_id(), num_experts = call.experts_per_token;
  const int column = lane < num_experts ? experts_TK[int64_t{t} * num_experts + lane] : -1;
  const int previous = __shfl_up_sync(kAllLanes, column, 1);
  const bool ascends = column == -1 || lane == 0 || (previous >= 0 && previous < column);
  if (column >= -1 && column < ex.num_ranks * call.num_local && ascends) return column;
  or_relaxed(&ex.state->bad_experts, 1);
  return -1;
}

// Ranks that hold an expert of the token whose columns the lanes have, one bit each.
SCALEMOE_DEVICE uint32_t ranks_of(int column, int num_local) {
  return __reduce_or_sync(kAllLanes, column >= 0 ? 1u << (column / num_local) : 0u);
}

// x [T, D] to each rank that holds an expert of the token, once per rank, into row (my rank, t) there; experts [T, K] and probs [T, K] to
// all ranks, unless prob_bytes is 0: then the receivers have the map already.
SCALEMOE_KERNEL(kPushThreads)
dispatch_push(SCALEMOE_PARAM Exchange ex, SCALEMOE_PARAM Announcement call, const Word* x_TD, const int32_t* experts_TK,
              const char* probs_TK) {
  if (has_failed(ex)) return;
  const uint32_t epoch = ex.state->epoch + 1;
  const int num_words = call.row_bytes / static_cast<int>(sizeof(Word));
  announce(ex, call, epoch);
  if (call.prob_bytes != 0) {
    const int64_t num_pairs = int64_t{call.num_tokens} * call.experts_per_token;
    push_to_all(ex, reinterpret_cast<const char*>(experts_TK), num_pairs * 4, [&](int p) { return experts_at(ex, p, epoch, ex.rank); });
    push_to_all(ex, probs_TK, num_pairs * call.prob_bytes, [&](int p) { return probs_at(ex, p, epoch, ex.rank); });
  }
  // Each rank starts with its successor, so that not all write to the same one.
  const int first_peer = (ex.rank + 1) % ex.num_ranks;
  const uint32_t all_ranks = ex.num_ranks == kMaxRanks ? ~0u : (1u << ex.num_ranks) - 1;
  for (int t = warp_id(); t < call.num_tokens; t += num_warps()) {
    const uint64_t ranks = ranks_of(column_of_lane(ex, call, experts_TK, t), call.num_local);
    const uint32_t rotated = static_cast<uint32_t>(ranks >> first_peer | ranks << (ex.num_ranks - first_peer)) & all_ranks;
    const int64_t row_start = int64_t{t} * num_words;
    copy_row(x_TD + row_start, rotated != 0 ? num_words : 0, [&](auto store_to) {
      each_bit(rotated, [&](int i) {
        const int peer = first_peer + i < ex.num_ranks ? first_peer + i : first_peer + i - ex.num_ranks;
        store_to(rows_at(ex, peer, epoch, ex.rank) + row_start);
      });
    });
  }
  finish_push(ex, epoch);
}

// For each (source s, token t) with rows here: their sum, in ascending order of experts, into row (my rank, t) at the source; and, unless
// prob_bytes is 0, each of these rows' item of `row_probs_R` into item (my rank, t, k) there. A map of more than `num_rows` rows is a
// failure.
template <class Row>
SCALEMOE_KERNEL(kPushThreads)
reduce_push(SCALEMOE_PARAM Exchange ex, SCALEMOE_PARAM Announcement call, SCALEMOE_PARAM RowMap map, int num_rows, const Word* rows_RD,
            const char* row_probs_R) {
  if (lacks_rows(ex, call, map, num_rows) || has_failed(ex)) return;
  const uint32_t epoch = ex.state->epoch + 1;
  const int lane = lane_id(), num_experts = call.experts_per_token, num_words = call.row_bytes / static_cast<int>(sizeof(Word));
  announce(ex, call, epoch);
  for (int i = warp_id(); i < ex.num_ranks * ex.max_tokens; i += num_warps()) {
    const int s = (i / ex.max_tokens + ex.rank + 1) % ex.num_ranks, t = i % ex.max_tokens;
    if (t >= map.tokens_G[s]) continue;
    const int row = lane < num_experts ? map.row_GTK[(int64_t{s} * ex.max_tokens + t) * num_experts + lane] : -1;
    const uint32_t present = __ballot_sync(kAllLanes, row >= 0);
    if (present == 0) continue;
    sum_row<Row>(rows_at(ex, s, epoch, ex.rank) + int64_t{t} * num_words, num_words, [&](auto add) {
      each_bit(present, [&](int k) { add(rows_RD + int64_t{__shfl_sync(kAllLanes, row, k)} * num_words); });
    });
    if (call.prob_bytes != 0 && row >= 0) {
      char* item = probs_at(ex, s, epoch, ex.rank) + (int64_t{t} * num_experts + lane) * call.prob_bytes;
      copy_item(item, row_probs_R + int64_t{row} * call.prob_bytes, call.prob_bytes);
    }
  }
  finish_push(ex, epoch);
}

// One block: my `bytes` of counts to everyone, everyone's to `gathered` [G, bytes]. Zeros after a failure.
SCALEMOE_KERNEL(kPushThreads)
exchange_counts(SCALEMOE_PARAM Exchange ex, SCALEMOE_PARAM Announcement call, const char* counts, char* gathered) {
  const int bytes = call.row_bytes;
  if (!has_failed(ex)) {
    const uint32_t epoch = ex.state->epoch + 1;
    announce(ex, call, epoch);
    push_to_all(ex, counts, bytes, [&](int p) { return reinterpret_cast<char*>(rows_at(ex, p, epoch, ex.rank)); });
    finish_push(ex, epoch);
    if (threadIdx.x < kWarp) wait_for_peers(ex, call, epoch);
  }
  __syncthreads();
  const bool failed = has_failed(ex);
  for (int i = threadIdx.x; i < ex.num_ranks * bytes; i += blockDim.x) {
    gathered[i] = failed ? 0 : reinterpret_cast<const char*>(rows_at(ex, ex.rank, ex.state->epoch, i / bytes))[i % bytes];
  }
}

}  // namespace scalemoe
