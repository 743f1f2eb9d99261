// Runs a CUDA kernel on the CPU, to test it without a GPU. Included by common.cuh wherever the compiler is not nvcc.
//
// One block runs at a time. Each of its threads is a fiber that runs until it has to wait for others (a barrier, a
// shuffle), and is chosen from those that can go on by a seeded generator: what depends on the schedule changes with the
// seed. Shared memory begins as NaN and ends in a canary. A barrier at which not all threads meet, a warp operation that
// not all lanes reach, and a barrier reached in different lines are errors. Not covered: races between two barriers that no
// seed brings to light, alignment, performance, clusters, asynchronous copies.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict

struct Dim3 {
  unsigned x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

/// Rounds to the nearest, ties to even, as the GPU does.
struct bf16 {
  uint16_t bits;
};
inline float __bfloat162float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline bf16 __float2bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace emulator {

constexpr int LANES = 32;
constexpr size_t STACK = 64 * 1024;
constexpr size_t CANARY = 256;
constexpr uint8_t CANARY_BYTE = 0xa5;

enum class Waits { No, ForBlock, ForWarp, Done };

struct Fiber {
  jmp_buf at;
  Waits waits;
  bool started;
  int line;          // of the barrier that it waits at
  unsigned parity;   // of the next exchange
};

/// What the lanes of a warp hand each other; two sets, so that a fast lane does not overwrite what a slow one still reads.
struct Exchange {
  uint64_t values[2][LANES];
};

struct Launch {
  void (*body)(const void*);
  const void* args;
  int left_out;  // line of a barrier that is ignored, to see that a test notices; 0 for none
};

inline Launch launch;
inline std::vector<Fiber> fibers;
inline std::vector<Exchange> warps;
inline std::vector<uint8_t> shared, stacks;
inline size_t current;
inline jmp_buf scheduler;
inline ucontext_t first_entry;
inline uint64_t random_state;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "block (%u, %u, %u), thread %zu: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, current, what);
  exit(3);
}

/// SplitMix64 (Steele et al., 2014).
inline uint64_t random_bits() {
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

inline uint8_t* shared_memory() {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared.data()) + 127) & ~uintptr_t(127));
}

/// Waits until the scheduler says that the others have come.
inline void wait(Waits what, int line) {
  Fiber& fiber = fibers[current];
  fiber.waits = what;
  fiber.line = line;
  if (_setjmp(fiber.at) == 0) _longjmp(scheduler, 1);
}

inline void block_barrier(int line) {
  if (line != launch.left_out) wait(Waits::ForBlock, line);
}

inline void warp_barrier(int line) {
  if (line != launch.left_out) wait(Waits::ForWarp, line);
}

inline int lane() { return int(current % LANES); }

/// Every lane hands `mine` in and gets what `from(lane)` handed in.
template <class T>
T exchange(T mine, int from, int line) {
  static_assert(sizeof(T) <= 8);
  const size_t me = current;
  const unsigned parity = fibers[me].parity;
  fibers[me].parity ^= 1;
  uint64_t* values = warps[me / LANES].values[parity];
  memcpy(&values[me % LANES], &mine, sizeof(T));
  wait(Waits::ForWarp, line);
  T theirs;
  memcpy(&theirs, &values[from], sizeof(T));
  return theirs;
}

inline void set_thread(size_t i) {
  current = i;
  threadIdx.x = unsigned(i % blockDim.x);
  threadIdx.y = unsigned(i / blockDim.x % blockDim.y);
  threadIdx.z = unsigned(i / (size_t(blockDim.x) * blockDim.y));
}

inline void enter() {
  launch.body(launch.args);
  fibers[current].waits = Waits::Done;
  _longjmp(scheduler, 1);
}

/// Runs a fiber until it waits or ends.
inline void resume(size_t i) {
  set_thread(i);
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[i];
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&first_entry);
  first_entry.uc_stack.ss_sp = stacks.data() + i * STACK;
  first_entry.uc_stack.ss_size = STACK;
  first_entry.uc_link = nullptr;
  makecontext(&first_entry, enter, 0);
  setcontext(&first_entry);
}

inline bool all_of(size_t begin, size_t end, Waits what) {
  return std::all_of(fibers.begin() + begin, fibers.begin() + end, [&](const Fiber& f) { return f.waits == what; });
}

/// Lets the fibers `begin..end` go on if all of them wait for `what`.
inline void release(size_t begin, size_t end, Waits what) {
  if (!all_of(begin, end, what)) return;
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].line != fibers[begin].line) fail("threads meet at barriers of different lines");
    fibers[i].waits = Waits::No;
  }
}

inline void run_block(size_t n_threads, size_t shared_bytes) {
  shared.assign(shared_bytes + 128 + CANARY, 0xff);  // all bits set: NaN in every floating-point type
  uint8_t* const canary = shared_memory() + shared_bytes;
  memset(canary, CANARY_BYTE, CANARY);
  fibers.assign(n_threads, Fiber{});
  warps.assign(n_threads / LANES, Exchange{});
  stacks.resize(n_threads * STACK);
  std::vector<size_t> order(n_threads);
  for (size_t i = 0; i < n_threads; ++i) order[i] = i;
  for (;;) {
    if (random_state != 0)
      for (size_t i = n_threads - 1; i > 0; --i) std::swap(order[i], order[random_bits() % (i + 1)]);
    bool ran = false;
    for (size_t i : order)
      if (fibers[i].waits == Waits::No) {
        ran = true;
        resume(i);
      }
    for (size_t w = 0; w < n_threads; w += LANES) release(w, w + LANES, Waits::ForWarp);
    release(0, n_threads, Waits::ForBlock);
    if (all_of(0, n_threads, Waits::Done)) break;
    if (!ran && !std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.waits == Waits::No; }))
      fail("threads wait for others that never come");
  }
  for (size_t i = 0; i < CANARY; ++i)
    if (canary[i] != CANARY_BYTE) fail("wrote beyond its shared memory");
}

/// A kernel by name, as KERNEL(...) registers it.
struct Kernel {
  const char* name;
  size_t args_size;
  unsigned max_threads;
  void (*body)(const void*);
};
inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}
inline bool add(Kernel kernel) {
  kernels().push_back(kernel);
  return true;
}

}  // namespace emulator

#define SHARED_MEMORY(type, name) type* const name = reinterpret_cast<type*>(emulator::shared_memory())
#define KERNEL(name, Args, threads, ...)                                                   \
  static const bool registered_##name = emulator::add(                                     \
      {#name, sizeof(Args), threads, [](const void* args) { __VA_ARGS__(*static_cast<const Args*>(args)); }});

#define __syncthreads() emulator::block_barrier(__LINE__)
#define __syncwarp() emulator::warp_barrier(__LINE__)
#define __shfl_xor_sync(mask, value, distance) emulator::exchange(value, emulator::lane() ^ (distance), __LINE__)
#define __shfl_sync(mask, value, from) emulator::exchange(value, from, __LINE__)
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline double cospi(double x) { return std::cos(3.14159265358979323846 * x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
using std::max;
using std::min;
