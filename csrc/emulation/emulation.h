// The words of csrc/cuda/portable.h for g++: every CUDA thread is a fiber, and a seeded random scheduler runs the fibers of all streams
// interleaved in one OS thread. So a whole exchange between several ranks is one program whose every schedule can be repeated.
//
// It checks the kernels' logic: indices, barriers, flags, order of operations. With ThreadSanitizer (-DSCALEMOE_TSAN on fibers.cpp) it also
// checks that every access is ordered by a barrier, a flag or a stream, as each fiber is a thread of its own to it. It says nothing about
// PTX, caches, fences that x86 does not need, or speed.
#pragma once

#include "scheduler.h"

#define SCALEMOE_KERNEL(threads) inline void
#define SCALEMOE_PARAM const
#define SCALEMOE_DEVICE inline
#define SCALEMOE_BOTH inline
#define SCALEMOE_SHARED(type, name, count) \
  static const char key_of_##name = 0;     \
  type* const name = static_cast<type*>(emulation::shared_memory(&key_of_##name, sizeof(type) * (count)))
// With copies of what the arguments are made of, as they may be gone when the kernel runs.
#define SCALEMOE_LAUNCH(blocks, threads, stream, kernel, ...) emulation::launch_body(stream, blocks, threads, [=] { kernel(__VA_ARGS__); })

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

typedef void* cudaStream_t;
inline int cudaGetLastError() { return 0; }

inline void __syncthreads() { emulation::sync_threads(); }
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  uint32_t values[32], votes = 0;
  emulation::exchange_in_warp(vote, values);
  for (int lane = 0; lane < 32; ++lane) votes |= values[lane] << lane;
  return votes;
}
inline uint32_t __reduce_or_sync(uint32_t, uint32_t value) {
  uint32_t values[32], all = 0;
  emulation::exchange_in_warp(value, values);
  for (uint32_t one : values) all |= one;
  return all;
}
inline int __shfl_sync(uint32_t, int value, int source) {
  uint32_t values[32];
  emulation::exchange_in_warp(static_cast<uint32_t>(value), values);
  return static_cast<int>(values[source]);
}
inline int __shfl_up_sync(uint32_t, int value, unsigned delta) {
  uint32_t values[32];
  emulation::exchange_in_warp(static_cast<uint32_t>(value), values);
  const unsigned lane = emulation::thread_index.x % 32;
  return static_cast<int>(values[lane >= delta ? lane - delta : lane]);
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

namespace scalemoe {

// Small, for the fibers' sake, but several warps and several blocks.
constexpr int kPushThreads = 64;
constexpr int kMapThreads = 64;
constexpr int kLocalThreads = 64;
constexpr int kMaxLocalBlocks = 3;

inline Word load_once(const Word* p) {
  emulation::maybe_switch();
  return *p;
}
inline void store_once(Word* p, Word v) {
  *p = v;
  emulation::maybe_switch();
}
inline uint32_t load_relaxed(const uint32_t* p) {
  emulation::maybe_switch();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
inline uint32_t load_acquire_system(const uint32_t* p) {
  emulation::maybe_switch();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void store_release_system(uint32_t* p, uint32_t v) {
  __atomic_store_n(p, v, __ATOMIC_RELEASE);
  emulation::maybe_switch();
}
inline uint32_t add_acquire_release(uint32_t* p, uint32_t v) {
  emulation::maybe_switch();
  return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
inline uint32_t compare_and_swap(uint32_t* p, uint32_t expected, uint32_t v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}
inline void or_relaxed(uint32_t* p, uint32_t v) { __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
inline void add_shared(int32_t* p, int32_t v) { __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
// Release and acquire above are all that the emulated memory needs.
inline void fence_system() { emulation::maybe_switch(); }
inline uint64_t now_ns() { return emulation::now_ns(); }
inline void pause() { emulation::pause(); }

inline float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of_half(uint32_t bits) {
  const uint16_t low = static_cast<uint16_t>(bits);
  _Float16 value;
  __builtin_memcpy(&value, &low, 2);
  return static_cast<float>(value);
}
inline uint32_t half_of_float(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  __builtin_memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint32_t halves_of_floats(float low, float high) { return half_of_float(low) | half_of_float(high) << 16; }
inline uint32_t bfloat_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  return value != value ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline uint32_t bfloats_of_floats(float low, float high) { return bfloat_of_float(low) | bfloat_of_float(high) << 16; }

}  // namespace scalemoe
