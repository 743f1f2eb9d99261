// Runs a CUDA kernel on the CPU, to test it without a GPU. Included by common.cuh wherever the compiler is not nvcc.
//
// Each thread is a fiber that runs until it has to wait for others (a barrier, a shuffle, a flag), and is chosen from those
// that can go on by a seeded generator: what depends on the schedule changes with the seed. One block runs at a time, or all of
// a cooperative launch side by side, in clusters that see each other's shared memory. Shared memory begins as NaN and ends in
// a canary. A barrier at which not all threads meet, a warp operation that not all lanes reach, a barrier reached in different
// lines, and flags that nobody will ever set are errors. Not covered: races between two barriers that no seed brings to
// light, weak memory order, alignment, performance, asynchronous copies.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
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
#define NO_INLINE __attribute__((noinline))

struct Dim3 {
  unsigned x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
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

enum class Waits { No, ForBlock, ForWarp, ForCluster, ForFlag, Done };

struct Fiber {
  jmp_buf at;
  Waits waits;
  bool started;
  unsigned place;    // of the barrier that it waits at
  unsigned parity;   // of the next exchange
};

/// A block that runs.
struct Block {
  Dim3 index;
  std::vector<uint8_t> shared;
};

/// Names a line of a file by a number; tests/kernels/emulator.rs computes the same.
constexpr unsigned place(const char* file, unsigned line) {
  const char* name = file;
  for (const char* c = file; *c; ++c)
    if (*c == '/') name = c + 1;
  unsigned sum = 0;
  for (const char* c = name; *c; ++c) sum = (sum * 31 + static_cast<unsigned char>(*c)) % 1009;
  return sum * 100000 + line;
}

/// What the lanes of a warp hand each other; two sets, so that a fast lane does not overwrite what a slow one still reads.
struct Exchange {
  uint64_t values[2][LANES];
};

struct Launch {
  void (*body)(const void*);
  const void* args;
  unsigned left_out;  // place of a barrier that is ignored, to see that a test notices; 0 for none
  unsigned cluster;   // blocks per cluster; 0: the blocks know nothing of each other and run one by one
};

inline Launch launch;
inline std::vector<Fiber> fibers;
inline std::vector<Exchange> warps;
inline std::vector<Block> blocks;
inline std::vector<uint8_t> stacks;
inline size_t current, block_threads, shared_bytes;
inline jmp_buf scheduler;
inline ucontext_t first_entry;
inline uint64_t random_state;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "block (%u, %u, %u), thread %zu: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, current % block_threads,
          what);
  exit(3);
}

/// SplitMix64 (Steele et al., 2014).
inline uint64_t random_bits() {
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

inline uint8_t* shared_of(size_t block) {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(blocks[block].shared.data()) + 127) & ~uintptr_t(127));
}
inline uint8_t* shared_memory() { return shared_of(current / block_threads); }

/// The same place in the shared memory of block `rank` of the cluster.
template <class T>
T* peer(T* mine, int rank) {
  const size_t block = current / block_threads;
  const std::ptrdiff_t at = reinterpret_cast<uint8_t*>(mine) - shared_of(block);
  if (at < 0 || size_t(at) >= shared_bytes) fail("asked for another block's copy of what is not shared memory");
  return reinterpret_cast<T*>(shared_of(block / launch.cluster * launch.cluster + size_t(rank)) + at);
}

/// Waits until the scheduler says that the others have come.
inline void wait(Waits what, unsigned place) {
  Fiber& fiber = fibers[current];
  fiber.waits = what;
  fiber.place = place;
  if (_setjmp(fiber.at) == 0) _longjmp(scheduler, 1);
}

inline void barrier(Waits what, unsigned place) {
  if (place != launch.left_out) wait(what, place);
}

/// Waits until another block has brought `flag` to `value`.
inline void wait_for(const uint32_t* flag, uint32_t value, unsigned place) {
  while (place != launch.left_out && *flag < value) wait(Waits::ForFlag, place);
}

inline int lane() { return int(current % LANES); }

/// Every lane hands `mine` in and gets what `from(lane)` handed in.
template <class T>
T exchange(T mine, int from, unsigned place) {
  static_assert(sizeof(T) <= 8);
  const size_t me = current;
  const unsigned parity = fibers[me].parity;
  fibers[me].parity ^= 1;
  uint64_t* values = warps[me / LANES].values[parity];
  memcpy(&values[me % LANES], &mine, sizeof(T));
  wait(Waits::ForWarp, place);
  T theirs;
  memcpy(&theirs, &values[from], sizeof(T));
  return theirs;
}

/// A bit for every lane that says yes.
inline unsigned ballot(bool yes, unsigned place) {
  unsigned bits = unsigned(yes) << lane();
  for (int distance = 1; distance < LANES; distance *= 2) bits |= exchange(bits, lane() ^ distance, place);
  return bits;
}

inline void set_thread(size_t i) {
  current = i;
  blockIdx = blocks[i / block_threads].index;
  i %= block_threads;
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
    if (fibers[i].place != fibers[begin].place) fail("threads meet at barriers of different lines");
    fibers[i].waits = Waits::No;
  }
}

/// Runs blocks side by side until all have ended.
inline void run(const std::vector<Dim3>& indices) {
  blocks.resize(indices.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i].index = indices[i];
    blocks[i].shared.assign(shared_bytes + 128 + CANARY, 0xff);  // all bits set: NaN in every floating-point type
    memset(shared_of(i) + shared_bytes, CANARY_BYTE, CANARY);
  }
  const size_t n = blocks.size() * block_threads, in_cluster = block_threads * std::max(launch.cluster, 1u);
  fibers.assign(n, Fiber{});
  warps.assign(n / LANES, Exchange{});
  stacks.resize(n * STACK);
  std::vector<size_t> order(n);
  for (size_t i = 0; i < n; ++i) order[i] = i;
  // Now and then a thread, a warp or a block is left behind for a while.
  size_t late_begin = 0, late_end = 0, late_for = 0;
  for (;;) {
    if (random_state != 0) {
      for (size_t i = n - 1; i > 0; --i) std::swap(order[i], order[random_bits() % (i + 1)]);
      if (late_for == 0 && random_bits() % 4 == 0) {
        const size_t together[] = {1, LANES, block_threads}, size = together[random_bits() % 3];
        late_begin = random_bits() % n / size * size;
        late_end = late_begin + size;
        late_for = random_bits() % 256;
      }
    }
    // Who waits for a flag looks again, but only a flag that has changed is progress.
    bool ran = false;
    for (size_t i : order) {
      const Waits before = fibers[i].waits;
      if (before != Waits::No && before != Waits::ForFlag) continue;
      if (late_for > 0 && late_begin <= i && i < late_end) continue;
      resume(i);
      ran |= before == Waits::No || fibers[i].waits != Waits::ForFlag;
    }
    for (size_t w = 0; w < n; w += LANES) release(w, w + LANES, Waits::ForWarp);
    for (size_t b = 0; b < n; b += block_threads) release(b, b + block_threads, Waits::ForBlock);
    for (size_t c = 0; c < n; c += in_cluster) release(c, c + in_cluster, Waits::ForCluster);
    if (all_of(0, n, Waits::Done)) break;
    const bool all_came = late_for == 0;
    late_for = ran && late_for > 0 ? late_for - 1 : 0;
    if (!ran && all_came && !std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.waits == Waits::No; }))
      fail("threads wait for others that never come");
  }
  for (size_t b = 0; b < blocks.size(); ++b)
    for (size_t i = 0; i < CANARY; ++i)
      if (shared_of(b)[shared_bytes + i] != CANARY_BYTE) fail("wrote beyond its shared memory");
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

#define HERE ([] { constexpr unsigned here = emulator::place(__FILE__, __LINE__); return here; }())
#define __syncthreads() emulator::barrier(emulator::Waits::ForBlock, HERE)
#define __syncwarp() emulator::barrier(emulator::Waits::ForWarp, HERE)
#define __shfl_xor_sync(mask, value, distance) emulator::exchange(value, emulator::lane() ^ (distance), HERE)
#define __shfl_sync(mask, value, from) emulator::exchange(value, from, HERE)
#define __ballot_sync(mask, yes) emulator::ballot(yes, HERE)
#define __popc(bits) __builtin_popcount(bits)
#define GROUP_BARRIER(size) emulator::barrier((size) > 1 ? emulator::Waits::ForCluster : emulator::Waits::ForBlock, HERE)
#define WAIT_FOR(flag, value) emulator::wait_for(flag, value, HERE)
template <class T>
T* peer(T* mine, int rank) {
  return emulator::peer(mine, rank);
}
inline void store_release(uint32_t* flag, uint32_t value) { *flag = value; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double cospi(double x) { return std::cos(3.14159265358979323846 * x); }
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(3.14159265358979323846 * x);
  *cosine = cospi(x);
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
using std::isfinite;
using std::max;
using std::min;
