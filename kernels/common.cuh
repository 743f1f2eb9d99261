// Types and helpers of every kernel, and what makes one source compile for the GPU and for the emulator.
//
// A kernel is a template over element type and sizes that takes one argument struct (args.cuh); KERNEL(...) makes
// entry points of it. Arithmetic is in f32 or f64, whatever the elements in memory are.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>

#include <cstdint>
using bf16 = __nv_bfloat16;
/// Dynamic shared memory as an array; its first address is 16-byte aligned.
#define SHARED_MEMORY(type, name)              \
  extern __shared__ float4 shared_memory_[];   \
  type* const name = reinterpret_cast<type*>(shared_memory_)
/// An entry point called `name` that runs `body` with `threads` threads a block.
#define KERNEL(name, Args, threads, ...)                                                          \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args args) { \
    __VA_ARGS__(args);                                                                            \
  }
#define NO_INLINE __noinline__
/// Waits until all threads of a group of blocks have come and publishes to them what each has written; a group of more than one
/// is a cluster, which sm_90 and later have.
#if __CUDA_ARCH__ >= 900
#define GROUP_BARRIER(size)                                                                                  \
  do {                                                                                                       \
    if ((size) > 1)                                                                                          \
      asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");         \
    else                                                                                                     \
      __syncthreads();                                                                                       \
  } while (0)
#else
#define GROUP_BARRIER(size) __syncthreads()
#endif
/// Waits until another block has brought a flag in device memory to `value`; for one thread. What that block wrote before is
/// then there, for the whole block after its next barrier.
#define WAIT_FOR(flag, value) \
  while (load_acquire(flag) < (value)) __nanosleep(20)
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
/// Publishes what this thread wrote, and what its block wrote before the last barrier.
__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
/// The same place in the shared memory of block `rank` of the cluster.
template <class T>
__device__ __forceinline__ T* peer(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(mine, rank));
#else
  return mine;
#endif
}
#else
#include "emulator/emulator.h"
#endif

#include "args.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

/// Sum over `WIDTH` neighbouring lanes, the same in each of them; the order is fixed.
template <int WIDTH, class T>
__device__ __forceinline__ T lanes_sum(T x) {
#pragma unroll
  for (int distance = WIDTH / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}

template <int WIDTH>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int distance = WIDTH / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
  return x;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
