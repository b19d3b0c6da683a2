// Rows in another order, with repetition, and summed back; and the routing as lists of experts. See megatron_scalemoe/ops/permute.py and
// route.py, which allocate everything: pointers are to contiguous arrays, but for the rows read, which lie `stride_bytes` apart.
//
// Shape letters: N source rows, M permuted rows, T tokens, Q columns of the routing, K columns of the result.
#include <cstring>

#include <algorithm>
#include <atomic>

#include "parallel.h"
#include "rows.h"

#define SCALEMOE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Return codes.
constexpr int kOk = 0, kBadIndex = -1, kBadType = -2;

// The next source row is fetched while one is copied: rows lie anywhere, so the processor cannot guess it.
constexpr int64_t kFetchedAhead = 4096, kCacheLine = 64;

bool inside(int64_t index, int64_t end) { return index >= 0 && index < end; }

template <class Item>
void route_token(const uint8_t* wanted, const Item* probs, int64_t Q, int64_t K, int32_t* experts, Item* probs_of, int64_t& most) {
  int64_t found = 0;
  for (int64_t column = 0; column < Q;) {
    uint64_t eight = 0;
    if (column + 8 <= Q) {
      std::memcpy(&eight, wanted + column, 8);
      if (eight == 0) {
        column += 8;
        continue;
      }
    }
    for (const int64_t end = std::min(column + 8, Q); column < end; column++) {
      if (!wanted[column]) continue;
      if (found < K) experts[found] = static_cast<int32_t>(column), probs_of[found] = probs[column];
      found++;
    }
  }
  for (int64_t k = found; k < K; k++) experts[k] = -1, probs_of[k] = 0;
  most = std::max(most, found);
}

// Probabilities are only moved: their bits as an unsigned integer will do.
template <class Item>
void route_tokens(
    const uint8_t* wanted_TQ, const Item* probs_TQ, int64_t T, int64_t Q, int64_t K, int32_t* experts_TK, Item* probs_TK, int64_t* most,
    int threads) {
  std::atomic<int64_t> largest{0};
  scalemoe::parallel_for(T, T * Q * static_cast<int64_t>(1 + sizeof(Item)), threads, [&](int64_t begin, int64_t end) {
    int64_t found = 0;
    for (int64_t t = begin; t < end; t++) {
      route_token(wanted_TQ + t * Q, probs_TQ + t * Q, Q, K, experts_TK + t * K, probs_TK + t * K, found);
    }
    int64_t before = largest.load();
    while (before < found && !largest.compare_exchange_weak(before, found)) {
    }
  });
  *most = largest;
}

template <class Item>
int scatter_probs(const Item* probs_TK, const int32_t* experts_TK, int64_t T, int64_t Q, int64_t K, Item* probs_TQ, int threads) {
  std::atomic<int> code{kOk};
  scalemoe::parallel_for(T, T * Q * static_cast<int64_t>(sizeof(Item)), threads, [&](int64_t begin, int64_t end) {
    std::memset(probs_TQ + begin * Q, 0, (end - begin) * Q * sizeof(Item));
    for (int64_t t = begin; t < end; t++) {
      for (int64_t i = t * K; i < (t + 1) * K && experts_TK[i] >= 0; i++) {
        if (experts_TK[i] < Q) {
          probs_TQ[t * Q + experts_TK[i]] = probs_TK[i];
        } else {
          code = kBadIndex;
        }
      }
    }
  });
  return code;
}

}  // namespace

// dst[m] = src[index[m]].
SCALEMOE_EXPORT int scalemoe_gather_rows(
    char* dst, const char* src, int64_t stride_bytes, const int64_t* index_M, int64_t M, int64_t N, int64_t row_bytes, int threads) {
  const bool past_caches = scalemoe::worth_streaming(M * row_bytes);
  std::atomic<int> code{kOk};
  scalemoe::parallel_for(M, 2 * M * row_bytes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++) {
      if (m + 1 < end) {
        const char* next = src + index_M[m + 1] * stride_bytes;
        for (int64_t at = 0; at < std::min(row_bytes, kFetchedAhead); at += kCacheLine) __builtin_prefetch(next + at);
      }
      if (inside(index_M[m], N)) {
        scalemoe::copy_row(dst + m * row_bytes, src + index_M[m] * stride_bytes, row_bytes, past_caches);
      } else {
        code = kBadIndex;
      }
    }
  });
  return code;
}

// dst[n] = the sum of src[order[i]] for i from offsets[n] to offsets[n + 1].
SCALEMOE_EXPORT int scalemoe_sum_rows(
    char* dst, const char* src, int64_t stride_bytes, const int64_t* order_M, const int64_t* offsets, int64_t M, int64_t N, int64_t columns,
    int dtype, int threads) {
  const int64_t row_bytes = columns * scalemoe::item_bytes(dtype);
  if (scalemoe::item_bytes(dtype) == 0) return kBadType;
  if (!std::all_of(order_M, order_M + M, [&](int64_t m) { return inside(m, M); })) return kBadIndex;
  if (offsets[0] < 0 || offsets[N] > M || !std::is_sorted(offsets, offsets + N + 1)) return kBadIndex;
  const bool past_caches = scalemoe::worth_streaming(N * row_bytes);
  scalemoe::parallel_for(N, (M + N) * row_bytes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const int64_t first = offsets[n], count = offsets[n + 1] - first;
      scalemoe::sum_rows_at(dst + n * row_bytes, src, stride_bytes, order_M + first, count, columns, dtype, past_caches);
    }
  });
  return kOk;
}

// A counting sort: order lists the m of each source row, ascending, and offsets [N + 1] says where each row's part begins.
SCALEMOE_EXPORT int scalemoe_row_map(const int64_t* index_M, int64_t M, int64_t N, int64_t* order_M, int64_t* offsets) {
  std::fill(offsets, offsets + N + 1, 0);
  for (int64_t m = 0; m < M; m++) {
    if (!inside(index_M[m], N)) return kBadIndex;
    offsets[index_M[m]]++;
  }
  int64_t end = 0;
  for (int64_t n = 0; n < N; n++) offsets[n] = end += offsets[n];
  offsets[N] = end;
  // From behind, each row's end moves down to its beginning.
  for (int64_t m = M; m-- > 0;) order_M[--offsets[index_M[m]]] = m;
  return kOk;
}

// The columns that are set in each row of the routing, ascending, then -1; their probabilities beside them, then 0. `most`: the most that
// any token has, which may be more than K.
SCALEMOE_EXPORT int scalemoe_route(
    const uint8_t* wanted_TQ, const void* probs_TQ, int item_bytes, int64_t T, int64_t Q, int64_t K, int32_t* experts_TK, void* probs_TK,
    int64_t* most, int threads) {
  const auto as = [&](auto item) {
    using Item = decltype(item);
    route_tokens(wanted_TQ, static_cast<const Item*>(probs_TQ), T, Q, K, experts_TK, static_cast<Item*>(probs_TK), most, threads);
    return kOk;
  };
  return item_bytes == 2 ? as(uint16_t{}) : item_bytes == 4 ? as(uint32_t{}) : item_bytes == 8 ? as(uint64_t{}) : kBadType;
}

// The way back: [T, K] probabilities, or their gradients, to their columns of [T, Q], zero elsewhere.
SCALEMOE_EXPORT int scalemoe_unroute(
    const void* probs_TK, const int32_t* experts_TK, int item_bytes, int64_t T, int64_t Q, int64_t K, void* probs_TQ, int threads) {
  const auto as = [&](auto item) {
    using Item = decltype(item);
    return scatter_probs(static_cast<const Item*>(probs_TK), experts_TK, T, Q, K, static_cast<Item*>(probs_TQ), threads);
  };
  return item_bytes == 2 ? as(uint16_t{}) : item_bytes == 4 ? as(uint32_t{}) : item_bytes == 8 ? as(uint64_t{}) : kBadType;
}
