// Copies and sums of rows, for any alignment, vectorised for the processor they run on.
//
// Wheels are built for the x86-64 baseline, so each kernel is compiled for several instruction sets and chosen once, when the library is
// loaded. Sums are plain additions in the order given, so all of the choices give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SCALEMOE_INLINE static inline __attribute__((always_inline))

namespace scalemoe {

// The dtype codes of the C interface.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// Bytes of one item, 0 for a code that does not exist.
inline int64_t item_bytes(int dtype) {
  switch (dtype) {
    case kFloat32: return 4;
    case kBfloat16: case kFloat16: return 2;
    case kFloat64: return 8;
    default: return 0;
  }
}

// ---- items, and the vectors they are summed in ----

template <class Item, int kLanes>
using Vector __attribute__((vector_size(kLanes * sizeof(Item)))) = Item;

// The same anywhere in memory. (GCC 12 copies a vector by memcpy in 16-byte pieces through the stack.)
template <class Item, int kLanes>
using StoredVector __attribute__((vector_size(kLanes * sizeof(Item)), aligned(1), may_alias)) = Item;

// Items that are summed as they are.
template <class Item_, int kLanes_>
struct Wide {
  static constexpr int kLanes = kLanes_;
  using Item = Item_;
  using Sum = Vector<Item, kLanes>;
  SCALEMOE_INLINE void load(Sum& sum, const Item* at) { sum = *reinterpret_cast<const StoredVector<Item, kLanes>*>(at); }
  SCALEMOE_INLINE void store(Item* at, const Sum& sum) { *reinterpret_cast<StoredVector<Item, kLanes>*>(at) = sum; }
};

// 16-bit items, summed in fp32. A 32-bit word holds two: one vector sums the lower ones, another the upper ones, so that no lane changes
// its place.
template <template <int> class Format, int kWords>
struct Narrow {
  static constexpr int kLanes = 2 * kWords;
  using Item = uint16_t;
  using Words = Vector<uint32_t, kWords>;
  struct Sum {
    Vector<float, kWords> lower, upper;
    inline __attribute__((always_inline)) void operator+=(const Sum& other) { lower += other.lower, upper += other.upper; }
  };
  SCALEMOE_INLINE void load(Sum& sum, const Item* at) {
    const Words words = *reinterpret_cast<const StoredVector<uint32_t, kWords>*>(at);
    Format<kWords>::widen(sum.lower, words & 0xffffu);
    Format<kWords>::widen(sum.upper, words >> 16);
  }
  SCALEMOE_INLINE void store(Item* at, const Sum& sum) {
    Words lower, upper;
    Format<kWords>::round(lower, sum.lower);
    Format<kWords>::round(upper, sum.upper);
    *reinterpret_cast<StoredVector<uint32_t, kWords>*>(at) = lower | (upper << 16);
  }
};

template <int kWords>
struct Bfloat16 {
  using Words = Vector<uint32_t, kWords>;
  using Floats = Vector<float, kWords>;
  SCALEMOE_INLINE void widen(Floats& floats, const Words& items) { floats = (Floats)(items << 16); }
  // To nearest, ties to even. A NaN stays a NaN: rounding could carry its last bits away.
  SCALEMOE_INLINE void round(Words& items, const Floats& floats) {
    const Words bits = (Words)floats, nan = (Words)(floats != floats);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    items = (rounded & ~nan) | (((bits >> 16) | 0x40u) & nan);
  }
};

template <int kWords>
struct Float16 {
  using Words = Vector<uint32_t, kWords>;
  using Floats = Vector<float, kWords>;
  SCALEMOE_INLINE void widen(Floats& floats, const Words& items) {
    const Words magnitude = (items & 0x7fffu) << 13;
    // The bits of a half are those of a number 2^112 times smaller; infinity and NaN keep the largest exponent.
    const Words special = (Words)(magnitude >= (31u << 23)) & (112u << 23);
    const Words normal = magnitude + (112u << 23) + special;
    // A subnormal is a whole number of 2^-24: put it behind the point of 2^-14, and take 2^-14 off again.
    const Words base = Words{} + (113u << 23);
    const Words subnormal = (Words)((Floats)(magnitude + base) - (Floats)base);
    const Words is_subnormal = (Words)(magnitude < (1u << 23));
    floats = (Floats)((subnormal & is_subnormal) | (normal & ~is_subnormal) | ((items & 0x8000u) << 16));
  }
  // To nearest, ties to even.
  SCALEMOE_INLINE void round(Words& items, const Floats& floats) {
    const Words bits = (Words)floats, magnitude = bits & 0x7fffffffu;
    const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 shifts a subnormal's bits to where the sum's last bits are, and rounds them.
    const Words one_half = Words{} + (126u << 23);
    const Words subnormal = (Words)((Floats)magnitude + (Floats)one_half) - one_half;
    const Words is_subnormal = (Words)(magnitude < (113u << 23)), is_large = (Words)(magnitude >= (143u << 23));
    const Words finite = (subnormal & is_subnormal) | (normal & ~is_subnormal & ~is_large) | (0x7c00u & is_large);
    const Words nan = (((magnitude >> 13) & 0x3ffu) | 0x200u) & (Words)(floats != floats);
    items = finite | nan | ((bits >> 16) & 0x8000u);
  }
};

// ---- where the rows of a sum are ----

struct RowPointers {
  const void* const* rows;
  SCALEMOE_INLINE const void* at(const RowPointers& source, int64_t i) { return source.rows[i]; }
};

struct RowIndices {
  const char* base;
  int64_t stride_bytes;
  const int64_t* index;
  SCALEMOE_INLINE const void* at(const RowIndices& source, int64_t i) { return source.base + source.index[i] * source.stride_bytes; }
};

// Columns [begin, end) of the sum of n >= 1 rows, to dst[0] and on.
template <class Type, class Rows>
SCALEMOE_INLINE void sum_columns(typename Type::Item* dst, const Rows& rows, int64_t n, int64_t begin, int64_t end) {
  using Item = typename Type::Item;
  using Sum = typename Type::Sum;
  constexpr int64_t kLanes = Type::kLanes, kUnrolled = sizeof(Item) == 2 ? 2 : 12;  // measured
  int64_t column = begin;
  for (; column + kUnrolled * kLanes <= end; column += kUnrolled * kLanes, dst += kUnrolled * kLanes) {
    Sum sums[kUnrolled], nexts[kUnrolled];
    const Item* row = static_cast<const Item*>(Rows::at(rows, 0)) + column;
    for (int part = 0; part < kUnrolled; part++) Type::load(sums[part], row + part * kLanes);
    for (int64_t i = 1; i < n; i++) {
      row = static_cast<const Item*>(Rows::at(rows, i)) + column;
      for (int part = 0; part < kUnrolled; part++) Type::load(nexts[part], row + part * kLanes);
      for (int part = 0; part < kUnrolled; part++) sums[part] += nexts[part];
    }
    for (int part = 0; part < kUnrolled; part++) Type::store(dst + part * kLanes, sums[part]);
  }
  Sum sum, next;
  for (; column + kLanes <= end; column += kLanes, dst += kLanes) {
    Type::load(sum, static_cast<const Item*>(Rows::at(rows, 0)) + column);
    for (int64_t i = 1; i < n; i++) {
      Type::load(next, static_cast<const Item*>(Rows::at(rows, i)) + column);
      sum += next;
    }
    Type::store(dst, sum);
  }
  if (column == end) return;
  const size_t rest_bytes = (end - column) * sizeof(Item);
  Item rest[kLanes] = {};
  std::memcpy(rest, static_cast<const Item*>(Rows::at(rows, 0)) + column, rest_bytes);
  Type::load(sum, rest);
  for (int64_t i = 1; i < n; i++) {
    std::memcpy(rest, static_cast<const Item*>(Rows::at(rows, i)) + column, rest_bytes);
    Type::load(next, rest);
    sum += next;
  }
  Type::store(rest, sum);
  std::memcpy(dst, rest, rest_bytes);
}

// ---- kernels for each instruction set ----

// What differs between processors: streaming stores, and how wide the vectors of a sum are.
struct RowKernels {
  void (*stream)(char* dst, const char* src, size_t bytes);  // dst at 16 bytes
  void (*sum_pointers)(void* dst, const RowPointers& rows, int64_t n, int64_t begin, int64_t end, int dtype);
  void (*sum_indices)(void* dst, const RowIndices& rows, int64_t n, int64_t begin, int64_t end, int dtype);
};

// kWords: 32-bit words of a vector.
template <int kWords, class Rows>
SCALEMOE_INLINE void sum_of_dtype(void* dst, const Rows& rows, int64_t n, int64_t begin, int64_t end, int dtype) {
  switch (dtype) {
    case kFloat32: return sum_columns<Wide<float, kWords>>(static_cast<float*>(dst), rows, n, begin, end);
    case kBfloat16: return sum_columns<Narrow<Bfloat16, kWords>>(static_cast<uint16_t*>(dst), rows, n, begin, end);
    case kFloat16: return sum_columns<Narrow<Float16, kWords>>(static_cast<uint16_t*>(dst), rows, n, begin, end);
    case kFloat64: return sum_columns<Wide<double, kWords / 2>>(static_cast<double*>(dst), rows, n, begin, end);
  }
}

#define SCALEMOE_SUM_KERNELS(SUFFIX, TARGET, WORDS)                                                                                \
  TARGET inline void sum_pointers_##SUFFIX(void* dst, const RowPointers& rows, int64_t n, int64_t begin, int64_t end, int dtype) { \
    sum_of_dtype<WORDS>(dst, rows, n, begin, end, dtype);                                                                          \
  }                                                                                                                                \
  TARGET inline void sum_indices_##SUFFIX(void* dst, const RowIndices& rows, int64_t n, int64_t begin, int64_t end, int dtype) {   \
    sum_of_dtype<WORDS>(dst, rows, n, begin, end, dtype);                                                                          \
  }

#if defined(__x86_64__)

// dst is brought to the vector's alignment first. Four loads are in flight before the first store.
#define SCALEMOE_STREAM_KERNEL(SUFFIX, TARGET, VECTOR, LOAD, STORE)                                                        \
  TARGET inline void stream_##SUFFIX(char* dst, const char* src, size_t bytes) {                                           \
    constexpr size_t kWidth = sizeof(VECTOR);                                                                              \
    const size_t ahead = -reinterpret_cast<uintptr_t>(dst) & (kWidth - 1);                                                 \
    const size_t head = ahead < bytes ? ahead : bytes;                                                                     \
    std::memcpy(dst, src, head);                                                                                           \
    size_t done = head;                                                                                                    \
    for (; done + 4 * kWidth <= bytes; done += 4 * kWidth) {                                                               \
      const VECTOR a = LOAD((const VECTOR*)(src + done)), b = LOAD((const VECTOR*)(src + done + kWidth));                  \
      const VECTOR c = LOAD((const VECTOR*)(src + done + 2 * kWidth)), d = LOAD((const VECTOR*)(src + done + 3 * kWidth)); \
      STORE((VECTOR*)(dst + done), a);                                                                                     \
      STORE((VECTOR*)(dst + done + kWidth), b);                                                                            \
      STORE((VECTOR*)(dst + done + 2 * kWidth), c);                                                                        \
      STORE((VECTOR*)(dst + done + 3 * kWidth), d);                                                                        \
    }                                                                                                                      \
    for (; done + kWidth <= bytes; done += kWidth) STORE((VECTOR*)(dst + done), LOAD((const VECTOR*)(src + done)));        \
    std::memcpy(dst + done, src + done, bytes - done);                                                                     \
  }

SCALEMOE_STREAM_KERNEL(sse2, , __m128i, _mm_loadu_si128, _mm_stream_si128)
SCALEMOE_STREAM_KERNEL(avx2, __attribute__((target("avx2"))), __m256i, _mm256_loadu_si256, _mm256_stream_si256)
SCALEMOE_STREAM_KERNEL(avx512, __attribute__((target("avx512f,avx512bw"))), __m512i, _mm512_loadu_si512, _mm512_stream_si512)
SCALEMOE_SUM_KERNELS(sse2, , 4)
SCALEMOE_SUM_KERNELS(avx2, __attribute__((target("avx2"))), 8)
SCALEMOE_SUM_KERNELS(avx512, __attribute__((target("avx512f,avx512bw"))), 16)

inline RowKernels pick_row_kernels() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
    return {stream_avx512, sum_pointers_avx512, sum_indices_avx512};
  }
  if (__builtin_cpu_supports("avx2")) return {stream_avx2, sum_pointers_avx2, sum_indices_avx2};
  return {stream_sse2, sum_pointers_sse2, sum_indices_sse2};
}

// Streaming stores pass other stores by: fence before telling another thread or process that the rows are there.
inline void fence_stores() { _mm_sfence(); }

#undef SCALEMOE_STREAM_KERNEL
#else

inline void stream_portable(char* dst, const char* src, size_t bytes) { std::memcpy(dst, src, bytes); }
SCALEMOE_SUM_KERNELS(portable, , 4)
inline RowKernels pick_row_kernels() { return {stream_portable, sum_pointers_portable, sum_indices_portable}; }
inline void fence_stores() {}

#endif
#undef SCALEMOE_SUM_KERNELS

inline const RowKernels kRowKernels = pick_row_kernels();

// ---- what the rest of the library calls ----

// Whether output of so many bytes is better written past the caches, because they could not hold it anyway.
inline bool worth_streaming(int64_t output_bytes) {
  static const int64_t cache_bytes = [] {
    const long found = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return found > 0 ? static_cast<int64_t>(found) : int64_t{32} << 20;
  }();
  return output_bytes >= cache_bytes;
}

// Copies a row. With `non_temporal`, past the caches: then `fence_stores` before anyone is told (`parallel_for` does it).
inline void copy_row(void* dst, const void* src, size_t bytes, bool non_temporal) {
  if (non_temporal) {
    kRowKernels.stream(static_cast<char*>(dst), static_cast<const char*>(src), bytes);
  } else {
    std::memcpy(dst, src, bytes);
  }
}

// The cases that are no sum: nothing gives zeros, a single row passes unchanged. Otherwise `sum(dst, begin, end)` for all columns.
template <class F>
inline void sum_by_parts(void* dst, int64_t n, const void* first, int64_t columns, int dtype, bool non_temporal, F sum) {
  const int64_t item = item_bytes(dtype);
  if (n == 0) {
    std::memset(dst, 0, columns * item);
  } else if (n == 1) {
    copy_row(dst, first, columns * item, non_temporal);
  } else if (!non_temporal) {
    sum(dst, int64_t{0}, columns);
  } else {
    alignas(64) char part[4096];
    const int64_t step = static_cast<int64_t>(sizeof part) / item;
    for (int64_t begin = 0; begin < columns; begin += step) {
      const int64_t end = begin + step < columns ? begin + step : columns;
      sum(part, begin, end);
      kRowKernels.stream(static_cast<char*>(dst) + begin * item, part, (end - begin) * item);
    }
  }
}

// dst = src[0] + src[1] + ... + src[n - 1], in that order, in fp32 (fp64 for fp64), rounded once to nearest, ties to even. Any alignment;
// dst must not overlap the rows. `non_temporal` as in `copy_row`.
inline void sum_rows(void* dst, const void* const* src, int64_t n, int64_t columns, int dtype, bool non_temporal = false) {
  const RowPointers rows{src};
  sum_by_parts(dst, n, n ? src[0] : nullptr, columns, dtype, non_temporal, [&](void* to, int64_t begin, int64_t end) {
    kRowKernels.sum_pointers(to, rows, n, begin, end, dtype);
  });
}

// The same for the rows base + index[i] * stride_bytes.
inline void sum_rows_at(
    void* dst, const void* base, int64_t stride_bytes, const int64_t* index, int64_t n, int64_t columns, int dtype,
    bool non_temporal = false) {
  const RowIndices rows{static_cast<const char*>(base), stride_bytes, index};
  sum_by_parts(dst, n, n ? RowIndices::at(rows, 0) : nullptr, columns, dtype, non_temporal, [&](void* to, int64_t begin, int64_t end) {
    kRowKernels.sum_indices(to, rows, n, begin, end, dtype);
  });
}

}  // namespace scalemoe
