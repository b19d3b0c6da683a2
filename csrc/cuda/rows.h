// Rows of 16-byte words: copies with several loads in flight, and sums in fp32.
#pragma once

#include "layout.h"

namespace scalemoe {

constexpr int kUnroll = 4;  // words of one lane in flight

SCALEMOE_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
SCALEMOE_DEVICE int warp_id() { return static_cast<int>(blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp); }
SCALEMOE_DEVICE int num_warps() { return static_cast<int>(gridDim.x * (blockDim.x / kWarp)); }

// All bits set is NaN in every floating-point type.
constexpr uint64_t kNanBits = ~uint64_t{0};
SCALEMOE_DEVICE Word not_a_number() { return Word{~0u, ~0u, ~0u, ~0u}; }

// A warp reads a row once and writes it to each target: `each_target(store_to)` calls `store_to(row)` for each. All lanes take part in
// every call, so `each_target` may use warp intrinsics.
template <class EachTarget>
SCALEMOE_DEVICE void copy_row(const Word* source, int num_words, EachTarget each_target) {
  for (int start = 0; start < num_words; start += kWarp * kUnroll) {
    const int first = start + lane_id();
    Word words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kWarp < num_words) words[u] = load_once(source + first + u * kWarp);
    }
    each_target([&](Word* target) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kWarp < num_words) store_once(target + first + u * kWarp, words[u]);
      }
    });
  }
}

SCALEMOE_DEVICE void fill_row(Word* target, int num_words, Word value) {
  for (int i = lane_id(); i < num_words; i += kWarp) store_once(target + i, value);
}

// One item of 2, 4 or 8 bytes.
SCALEMOE_DEVICE void copy_item(char* target, const char* source, int bytes) {
  if (bytes == 2) {
    *reinterpret_cast<uint16_t*>(target) = *reinterpret_cast<const uint16_t*>(source);
  } else if (bytes == 4) {
    *reinterpret_cast<uint32_t*>(target) = *reinterpret_cast<const uint32_t*>(source);
  } else {
    *reinterpret_cast<uint64_t*>(target) = *reinterpret_cast<const uint64_t*>(source);
  }
}
SCALEMOE_DEVICE void fill_item(char* target, uint64_t bits, int bytes) {
  if (bytes == 2) {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(bits);
  } else if (bytes == 4) {
    *reinterpret_cast<uint32_t*>(target) = static_cast<uint32_t>(bits);
  } else {
    *reinterpret_cast<uint64_t*>(target) = bits;
  }
}

struct Fp32 {
  static constexpr int kPerWord = 4;
  SCALEMOE_DEVICE static void add(float* sum, Word v) {
    sum[0] += float_of_bits(v.x), sum[1] += float_of_bits(v.y), sum[2] += float_of_bits(v.z), sum[3] += float_of_bits(v.w);
  }
  SCALEMOE_DEVICE static Word round(const float* sum) {
    return Word{bits_of_float(sum[0]), bits_of_float(sum[1]), bits_of_float(sum[2]), bits_of_float(sum[3])};
  }
};

struct Bf16 {
  static constexpr int kPerWord = 8;
  SCALEMOE_DEVICE static void add_pair(float* sum, uint32_t v) {
    sum[0] += float_of_bits(v << 16), sum[1] += float_of_bits(v & 0xffff0000u);
  }
  SCALEMOE_DEVICE static void add(float* sum, Word v) {
    add_pair(sum, v.x), add_pair(sum + 2, v.y), add_pair(sum + 4, v.z), add_pair(sum + 6, v.w);
  }
  SCALEMOE_DEVICE static Word round(const float* sum) {
    return Word{bfloats_of_floats(sum[0], sum[1]), bfloats_of_floats(sum[2], sum[3]), bfloats_of_floats(sum[4], sum[5]),
                bfloats_of_floats(sum[6], sum[7])};
  }
};

struct Fp16 {
  static constexpr int kPerWord = 8;
  SCALEMOE_DEVICE static void add_pair(float* sum, uint32_t v) { sum[0] += float_of_half(v & 0xffffu), sum[1] += float_of_half(v >> 16); }
  SCALEMOE_DEVICE static void add(float* sum, Word v) {
    add_pair(sum, v.x), add_pair(sum + 2, v.y), add_pair(sum + 4, v.z), add_pair(sum + 6, v.w);
  }
  SCALEMOE_DEVICE static Word round(const float* sum) {
    return Word{halves_of_floats(sum[0], sum[1]), halves_of_floats(sum[2], sum[3]), halves_of_floats(sum[4], sum[5]),
                halves_of_floats(sum[6], sum[7])};
  }
};

// A warp sums rows into `target`: in fp32, in the order in which `each_source(add)` calls `add(row)`, rounded once. All lanes take part in
// every call, so `each_source` may use warp intrinsics. No rows give zeros.
template <class Row, class EachSource>
SCALEMOE_DEVICE void sum_row(Word* target, int num_words, EachSource each_source) {
  for (int start = 0; start < num_words; start += kWarp * kUnroll) {
    const int first = start + lane_id();
    float sums[kUnroll][Row::kPerWord] = {};
    each_source([&](const Word* source) {
      Word words[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kWarp < num_words) words[u] = load_once(source + first + u * kWarp);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kWarp < num_words) Row::add(sums[u], words[u]);
      }
    });
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kWarp < num_words) store_once(target + first + u * kWarp, Row::round(sums[u]));
    }
  }
}

// Calls `f(bit)` for each set bit, ascending.
template <class F>
SCALEMOE_DEVICE void each_bit(uint32_t bits, F f) {
  for (; bits != 0; bits &= bits - 1) f(__ffs(static_cast<int>(bits)) - 1);
}

}  // namespace scalemoe
