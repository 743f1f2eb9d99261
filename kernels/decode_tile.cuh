// Tiles of linear maps on tensor cores: activations as sums of numbers in bf16, and a warp's products of a tile with all rows.
#pragma once
#include "common.cuh"

namespace decode {

/// Weights come in tiles of so many outputs; a warp has one at a time.
constexpr int TILE = 16;
/// Inputs of a step of a tile. A piece of its weights is 16 bytes for each lane, in the order in which it multiplies with them.
constexpr int STEP = 16;
constexpr int STEP_BYTES = 16 * WARP;
/// Pieces of weights that are on their way at a time.
constexpr int LOADED = 6;
/// Numbers in bf16 whose sum an activation is; weights have as many or fewer.
template <class W>
constexpr int PIECES = sizeof(W) == sizeof(float) ? 3 : 2;

__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }
__device__ __forceinline__ int n_warps() { return blockDim.x / WARP; }

/// Two features as sums of numbers in bf16, the large ones first, the first feature in the lower half.
template <int N>
struct Split {
  uint32_t of[N];
};

template <int N>
__device__ __forceinline__ Split<N> split(float low, float high) {
  Split<N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) {
#ifdef __CUDACC__
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    const float2 back = __bfloat1622float2(pair);
    to.of[i] = *reinterpret_cast<const uint32_t*>(&pair);
#else
    const bf16 pair[2] = {from_float<bf16>(low), from_float<bf16>(high)};
    const float2 back = {to_float(pair[0]), to_float(pair[1])};
    to.of[i] = pair[0].bits | uint32_t(pair[1].bits) << 16;
#endif
    low -= back.x;
    high -= back.y;
  }
  return to;
}

/// Features that maps read, of one row: two pairs of a step's eight, q and q + 4, side by side, as `mma.sync` takes them.
template <int N>
struct alignas(N == 2 ? 16 : 8) Quad {
  uint32_t of[N][2];
};

/// Where pair `pair` of row r begins in features [step][4][ROWS]; its other pieces lie two words on each.
template <int ROWS, int N>
__device__ __forceinline__ uint32_t* pair_at(Quad<N>* features, int pair, int r) {
  return &features[(pair / 8 * 4 + pair % 4) * ROWS + r].of[0][pair % 8 / 4];
}

/// A tile's products with all rows: what a lane gets of them, outputs 2 * (lane / 4) and the next of rows 2 * (lane % 4) and the next.
struct Products {
  float of[2][2];  // [output][row]
};

#ifdef __CUDACC__
/// Pieces of weights on their way.
struct Loaded {
  uint4 of[LOADED];
};

/// 16 bytes of weights; those in device memory leave the level-1 cache to others.
template <bool SHARED>
__device__ __forceinline__ uint4 read_weights(const char* from) {
  uint4 w;
  if (SHARED)
    w = *reinterpret_cast<const uint4*>(from);
  else
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from));
  return w;
}

/// Asks for as many of the `n` pieces at `from` as there is room for; what there is not is the last.
template <bool SHARED>
__device__ __forceinline__ void load(Loaded& to, const char* from, int n) {
  from += lane() * int(sizeof(uint4));
  if (n >= LOADED) {
#pragma unroll
    for (int i = 0; i < LOADED; ++i) to.of[i] = read_weights<SHARED>(from + i * STEP_BYTES);
  } else {
#pragma unroll
    for (int i = 0; i < LOADED; ++i) to.of[i] = read_weights<SHARED>(from + min(i, n - 1) * STEP_BYTES);
  }
}

/// sums += weights x inputs, 16 outputs by 16 inputs by 8 rows.
__device__ __forceinline__ void multiply_add(float (&sums)[4], uint4 w, uint32_t x, uint32_t y) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(x), "r"(y));
}

/// Sums of a tile's products: of steps in turn, of large and small pieces.
struct Sums {
  float of[2][2][4] = {};

  __device__ Products total() const {
    Products products;
#pragma unroll
    for (int i = 0; i < 4; ++i) products.of[i / 2][i % 2] = of[0][0][i] + of[1][0][i] + (of[0][1][i] + of[1][1][i]);
    return products;
  }
};

/// Adds the products of LOADED / OF steps from step `first` on, whose weights have OF pieces each, with `in` [n_in / 16][4][ROWS]; what is
/// smaller than the smallest piece is left out. A whole warp. ROWS is 1 (then all columns are that row, and nobody asks for the others)
/// or 8.
template <int OF, int ROWS, int N>
__device__ __forceinline__ void multiply(Sums& sums, const Loaded& weights, int first, int n_in, const Quad<N>* in) {
  constexpr int AT_A_TIME = LOADED / OF;
  const Quad<N>* const x = in + (first * 4 + lane() % 4) * ROWS + (ROWS == 1 ? 0 : lane() / 4);
  Quad<N> inputs[AT_A_TIME];
  const int left = n_in - first * STEP;
  if (left >= AT_A_TIME * STEP) {
#pragma unroll
    for (int i = 0; i < AT_A_TIME; ++i) inputs[i] = x[i * 4 * ROWS];
  } else {
    // Beyond the inputs lies anything, which is 0 here.
#pragma unroll
    for (int i = 0; i < AT_A_TIME; ++i) {
      inputs[i] = x[min(i, (left - 1) / STEP) * 4 * ROWS];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (i * STEP + 2 * (lane() % 4) + 8 * half >= left)
#pragma unroll
          for (int by = 0; by < N; ++by) inputs[i].of[by][half] = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < AT_A_TIME; ++i)
#pragma unroll
    for (int of = 0; of < OF; ++of)
#pragma unroll
      for (int by = 0; of + by < N; ++by)
        multiply_add(sums.of[i % 2][of + by > 0], weights.of[i * OF + of], inputs[i].of[by][0], inputs[i].of[by][1]);
}
#else
struct Loaded {
  const char* from;
};
template <bool SHARED>
void load(Loaded& to, const char* from, int) {
  to.from = from;
}

struct Sums {
  Products products = {};

  Products total() const { return products; }
};

template <int OF, int ROWS, int N>
void multiply(Sums& sums, const Loaded& weights, int first, int n_in, const Quad<N>* in) {
  const auto value = [](uint32_t pair, int which) { return to_float(bf16{uint16_t(pair >> 16 * which)}); };
  const int pair = lane() % 4;
  for (int k = first * STEP; k < min(n_in, (first + LOADED / OF) * STEP); ++k) {
    float w[2] = {}, x[2] = {};
    for (int of = 0; of < OF; ++of) {
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(weights.from) +
                                    (((k / STEP - first) * OF + of) * WARP + lane() / 4 * 4 + k / 2 % 4) * 4 + k % STEP / 8 * 2;
      for (int output = 0; output < 2; ++output) w[output] += value(words[output], k % 2);
    }
    for (int row = 0; row < 2 && 2 * pair + row < ROWS; ++row)
      for (int by = 0; by < N; ++by)
        x[row] += value(in[(k / STEP * 4 + k / 2 % 4) * ROWS + 2 * pair + row].of[by][k % STEP / 8], k % 2);
    for (int i = 0; i < 4; ++i) sums.products.of[i / 2][i % 2] += w[i / 2] * x[i % 2];
  }
}
#endif

}  // namespace decode
