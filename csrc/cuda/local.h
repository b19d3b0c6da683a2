// Kernels that only read what has arrived: received rows out to their experts, returned rows to their tokens.
#pragma once

#include "push.h"

namespace scalemoe {

// Each received row (s, t) to the rows of its experts, unless prob_bytes is 0 its items to `row_probs_R` [R], zeros to the padding. After a
// failure all rows become NaN. A map of more than `num_rows` rows is a failure, with no rows at all.
SCALEMOE_KERNEL(kLocalThreads)
expand(SCALEMOE_PARAM Exchange ex, SCALEMOE_PARAM Announcement call, SCALEMOE_PARAM RowMap map, int num_rows, Word* rows_RD,
       char* row_probs_R) {
  const int lane = lane_id(), num_experts = call.experts_per_token, num_words = call.row_bytes / static_cast<int>(sizeof(Word));
  const uint32_t epoch = ex.state->epoch;
  if (lacks_rows(ex, call, map, num_rows)) return;
  if (has_failed(ex)) {
    for (int r = warp_id(); r < map.first_row_L[call.num_local]; r += num_warps()) {
      fill_row(rows_RD + int64_t{r} * num_words, num_words, not_a_number());
    }
    return;
  }
  for (int i = warp_id(); i < ex.num_ranks * ex.max_tokens; i += num_warps()) {
    const int s = i / ex.max_tokens, t = i % ex.max_tokens;
    if (t >= map.tokens_G[s]) continue;
    const int row = lane < num_experts ? map.row_GTK[int64_t{i} * num_experts + lane] : -1;
    const uint32_t present = __ballot_sync(kAllLanes, row >= 0);
    if (present == 0) continue;
    if (call.prob_bytes != 0 && row >= 0) {
      const char* item = probs_at(ex, ex.rank, epoch, s) + (int64_t{t} * num_experts + lane) * call.prob_bytes;
      copy_item(row_probs_R + int64_t{row} * call.prob_bytes, item, call.prob_bytes);
    }
    copy_row(rows_at(ex, ex.rank, epoch, s) + int64_t{t} * num_words, num_words, [&](auto store_to) {
      each_bit(present, [&](int k) { store_to(rows_RD + int64_t{__shfl_sync(kAllLanes, row, k)} * num_words); });
    });
  }
  const int max_padding = map.alignment[0] - 1;
  for (int i = warp_id(); i < call.num_local * max_padding; i += num_warps()) {
    const int e = i / max_padding, r = map.first_row_L[e] + map.used_rows_L[e] + i % max_padding;
    if (r >= map.first_row_L[e + 1]) continue;
    fill_row(rows_RD + int64_t{r} * num_words, num_words, Word{0, 0, 0, 0});
    if (call.prob_bytes != 0 && lane == 0) fill_item(row_probs_R + int64_t{r} * call.prob_bytes, 0, call.prob_bytes);
  }
}

// y [T, D]: the rows that came back for each token, summed over ranks in ascending order, zeros where there are none; probs [T, K], unless
// prob_bytes is 0: the items that came back beside them. After a failure both become NaN, so that nobody trains on them.
template <class Row>
SCALEMOE_KERNEL(kLocalThreads)
restore(SCALEMOE_PARAM Exchange ex, SCALEMOE_PARAM Announcement call, const int32_t* experts_TK, Word* y_TD, char* probs_TK) {
  const int lane = lane_id(), num_experts = call.experts_per_token, num_words = call.row_bytes / static_cast<int>(sizeof(Word));
  const uint32_t epoch = ex.state->epoch;
  const bool failed = has_failed(ex);
  for (int t = warp_id(); t < call.num_tokens; t += num_warps()) {
    const int column = lane < num_experts ? experts_TK[int64_t{t} * num_experts + lane] : -1;
    Word* y = y_TD + int64_t{t} * num_words;
    if (failed) {
      fill_row(y, num_words, not_a_number());
    } else {
      const uint32_t ranks = ranks_of(column, call.num_local);
      sum_row<Row>(y, num_words, [&](auto add) {
        each_bit(ranks, [&](int g) { add(rows_at(ex, ex.rank, epoch, g) + int64_t{t} * num_words); });
      });
    }
    if (call.prob_bytes != 0 && lane < num_experts) {
      const int64_t item = (int64_t{t} * num_experts + lane) * call.prob_bytes;
      if (failed || column < 0) {
        fill_item(probs_TK + item, failed ? kNanBits : 0, call.prob_bytes);
      } else {
        copy_item(probs_TK + item, probs_at(ex, ex.rank, epoch, column / call.num_local) + item, call.prob_bytes);
      }
    }
  }
}

}  // namespace scalemoe
