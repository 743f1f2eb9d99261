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
/// Numbers in bf16 whose sum an activation is; weights have as many or fewer (`Slice`).
template <class W>
constexpr int PIECES = sizeof(W) == sizeof(float) ? 3 : 2;

__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }
__device__ __forceinline__ int n_warps() { return blockDim.x / WARP; }

/// Two features as sums of numbers in bf16, the large ones first, the first feature in the lower half.
template <int N>
struct alignas(N == 2 ? 8 : 4) Split {
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

/// A tile's products with all rows: what a lane gets of them, outputs 2 * (lane / 4) and the next of rows 2 * (lane % 4) and the next.
struct Products {
  float of[2][2];  // [output][row]
};

#ifdef __CUDACC__
/// sums += weights x inputs, 16 outputs by 16 inputs by 8 rows.
__device__ __forceinline__ void multiply_add(float (&sums)[4], uint4 w, uint32_t x, uint32_t y) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(x), "r"(y));
}

/// A tile, whose weights have `OF` pieces, times `in` [n_in / 2][ROWS], by one warp; what is smaller than the smallest piece is left out.
/// ROWS is 1 (then all columns are that row, and nobody asks for the others) or 8.
template <int OF, int N, int ROWS>
__device__ __forceinline__ Products multiply(const char* tile, const int n_in, const Split<N>* in) {
  const int pair = lane() % 4, steps = n_in / STEP;
  const uint4* const w = reinterpret_cast<const uint4*>(tile) + lane();
  const Split<N>* const x = in + pair * ROWS + (ROWS == 1 ? 0 : lane() / 4);
  constexpr int AT_A_TIME = LOADED / OF;
  float sums[2][2][4] = {};  // of steps in turn, of large and small
  const auto add = [&](float (&to)[2][4], const uint4 (&weights)[OF], Split<N> low, Split<N> high) {
#pragma unroll
    for (int of = 0; of < OF; ++of)
#pragma unroll
      for (int by = 0; of + by < N; ++by) multiply_add(to[of + by > 0], weights[of], low.of[by], high.of[by]);
  };
#pragma unroll 1
  for (int first = 0; first < steps; first += AT_A_TIME) {
    uint4 loaded[AT_A_TIME][OF];
#pragma unroll
    for (int i = 0; i < AT_A_TIME; ++i)
#pragma unroll
      for (int piece = 0; piece < OF; ++piece)
        loaded[i][piece] = first + i < steps ? w[((first + i) * OF + piece) * WARP] : uint4{0, 0, 0, 0};
    // Steps that are not there are the last one's inputs times 0: were they conditional, each load would be put where it is used.
#pragma unroll
    for (int i = 0; i < AT_A_TIME; ++i) {
      const Split<N>* const from = x + min(first + i, steps - 1) * 8 * ROWS;
      add(sums[i % 2], loaded[i], from[0], from[4 * ROWS]);
    }
  }
  if (n_in % STEP != 0) {
    uint4 last[OF];
#pragma unroll
    for (int piece = 0; piece < OF; ++piece) last[piece] = w[(steps * OF + piece) * WARP];
    // Beyond the inputs lies anything.
    const int at = steps * STEP + 2 * pair;
    Split<N> low = {}, high = {};
    if (at < n_in) low = x[steps * 8 * ROWS];
    if (at + 8 < n_in) high = x[(steps * 8 + 4) * ROWS];
    add(sums[0], last, low, high);
  }
  Products products;
#pragma unroll
  for (int i = 0; i < 4; ++i) products.of[i / 2][i % 2] = sums[0][0][i] + sums[1][0][i] + (sums[0][1][i] + sums[1][1][i]);
  return products;
}
#else
template <int OF, int N, int ROWS>
Products multiply(const char* tile, int n_in, const Split<N>* in) {
  const auto value = [](uint32_t pair, int which) { return to_float(bf16{uint16_t(pair >> 16 * which)}); };
  const int pair = lane() % 4;
  Products products = {};
  for (int k = 0; k < n_in; ++k) {
    float w[2] = {}, x[2] = {};
    for (int of = 0; of < OF; ++of) {
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(tile) +
                                    ((k / STEP * OF + of) * WARP + lane() / 4 * 4 + k / 2 % 4) * 4 + k % STEP / 8 * 2;
      for (int output = 0; output < 2; ++output) w[output] += value(words[output], k % 2);
    }
    for (int row = 0; row < 2 && 2 * pair + row < ROWS; ++row)
      for (int by = 0; by < N; ++by) x[row] += value(in[k / 2 * ROWS + 2 * pair + row].of[by], k % 2);
    for (int i = 0; i < 4; ++i) products.of[i / 2][i % 2] += w[i / 2] * x[i % 2];
  }
  return products;
}
#endif

}  // namespace decode
