// The few words of CUDA that the kernels use, spelled once for nvcc and, in csrc/emulation, once for g++.
#pragma once

#include <cstddef>
#include <cstdint>

namespace scalemoe {

// What one lane moves at a time.
struct alignas(16) Word {
  uint32_t x, y, z, w;
};

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

}  // namespace scalemoe

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define SCALEMOE_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define SCALEMOE_PARAM const __grid_constant__
#define SCALEMOE_DEVICE __device__ __forceinline__
#define SCALEMOE_BOTH __host__ __device__ __forceinline__
#define SCALEMOE_SHARED(type, name, count) __shared__ type name[count]
#define SCALEMOE_LAUNCH(blocks, threads, stream, kernel, ...) kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__)

namespace scalemoe {

constexpr int kPushThreads = 512;
constexpr int kMapThreads = 512;
constexpr int kLocalThreads = 256;
// Eight blocks on each multiprocessor of an H100; smaller GPUs take several waves.
constexpr int kMaxLocalBlocks = 1056;

// Data that nobody writes while the kernel runs: past L1, where it would be in the way.
SCALEMOE_DEVICE Word load_once(const Word* p) {
  Word v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
SCALEMOE_DEVICE void store_once(Word* p, Word v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
SCALEMOE_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
SCALEMOE_DEVICE uint32_t load_acquire_system(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
SCALEMOE_DEVICE void store_release_system(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
SCALEMOE_DEVICE uint32_t add_acquire_release(uint32_t* p, uint32_t v) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
SCALEMOE_DEVICE uint32_t compare_and_swap(uint32_t* p, uint32_t expected, uint32_t v) { return atomicCAS(p, expected, v); }
SCALEMOE_DEVICE void or_relaxed(uint32_t* p, uint32_t v) { atomicOr(p, v); }
SCALEMOE_DEVICE void add_shared(int32_t* p, int32_t v) { atomicAdd(p, v); }
SCALEMOE_DEVICE void fence_system() { __threadfence_system(); }
SCALEMOE_DEVICE uint64_t now_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
SCALEMOE_DEVICE void pause() { __nanosleep(64); }

SCALEMOE_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
SCALEMOE_DEVICE uint32_t bits_of_float(float value) { return __float_as_uint(value); }
SCALEMOE_DEVICE float float_of_half(uint32_t bits) {
  float value;
  asm("{ .reg .f16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
  return value;
}
// Two values, each rounded to the nearest, ties to even; `low` in the low half.
SCALEMOE_DEVICE uint32_t halves_of_floats(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
SCALEMOE_DEVICE uint32_t bfloats_of_floats(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

}  // namespace scalemoe

#else

#include "../emulation/emulation.h"

#endif
