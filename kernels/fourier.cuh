// Discrete Fourier transform of a real block in f64, by the threads of one thread block, in shared memory and in place.
//
// The block's even and odd values are the real and imaginary parts of n / 2 complex ones; these are transformed by decimation in
// frequency (Gentleman and Sande, 1966) in passes of radix 4, 2 and 3, which leave them in the order of reversed digits; whoever
// reads a bin undoes both. Oracle: realfft, through src/forecast.
#pragma once
#include "common.cuh"

namespace fourier {

__device__ __forceinline__ double2 sum(double2 a, double2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ double2 difference(double2 a, double2 b) { return {a.x - b.x, a.y - b.y}; }
__device__ __forceinline__ double2 product(double2 a, double2 b) {
  return {fma(a.x, b.x, -__dmul_rn(a.y, b.y)), fma(a.x, b.y, __dmul_rn(a.y, b.x))};
}
/// -i a.
__device__ __forceinline__ double2 turned(double2 a) { return {a.y, -a.x}; }

/// Transforms of 2, 3 and 4 values.
__device__ __forceinline__ void transform(double2 (&x)[2]) {
  const double2 first = x[0];
  x[0] = sum(first, x[1]);
  x[1] = difference(first, x[1]);
}
__device__ __forceinline__ void transform(double2 (&x)[3]) {
  constexpr double SIN_60 = 0.86602540378443864676;
  const double2 both = sum(x[1], x[2]), across = turned(difference(x[1], x[2]));
  const double2 middle = {x[0].x - 0.5 * both.x, x[0].y - 0.5 * both.y}, side = {SIN_60 * across.x, SIN_60 * across.y};
  x[0] = sum(x[0], both);
  x[1] = sum(middle, side);
  x[2] = difference(middle, side);
}
__device__ __forceinline__ void transform(double2 (&x)[4]) {
  const double2 even = sum(x[0], x[2]), odd = sum(x[1], x[3]);
  const double2 even_rest = difference(x[0], x[2]), odd_rest = turned(difference(x[1], x[3]));
  x[0] = sum(even, odd);
  x[1] = sum(even_rest, odd_rest);
  x[2] = difference(even, odd);
  x[3] = difference(even_rest, odd_rest);
}

/// A transform of `n` values, n / 2 a product of twos and threes.
struct Transform {
  int n;
  const double2* turns;  // [n]: exp(-2 pi i j / n)
  double2* halves;       // [n / 2]

  /// Value i of the block before the transform.
  __device__ double& value(int i) const { return i % 2 ? halves[i / 2].y : halves[i / 2].x; }

  /// Bin j, 0 <= j <= n / 2, of the block that was transformed.
  __device__ double2 bin(int j) const {
    const int half = n / 2;
    const double2 one = halves[place(j % half)], other = halves[place((half - j) % half)];
    // The even values' transform, and i times that of the odd ones.
    const double2 even = {0.5 * (one.x + other.x), 0.5 * (one.y - other.y)};
    const double2 odd = {0.5 * (one.x - other.x), 0.5 * (one.y + other.y)};
    return sum(even, product(turned(odd), turns[j]));
  }

  __device__ static int radix(int length) { return length % 4 == 0 ? 4 : length % 2 == 0 ? 2 : 3; }

  /// Where complex bin j has come to lie.
  __device__ int place(int j) const {
    int at = 0;
    for (int length = n / 2; length > 1;) {
      const int r = radix(length);
      length /= r;
      at += j % r * length;
      j /= r;
    }
    return at;
  }

  /// Every run of `length` values becomes R runs, each of the bins with one rest modulo R.
  template <int R>
  __device__ void pass(int length) const {
    const int part = length / R;
    for (int i = threadIdx.x; i < n / 2 / R; i += blockDim.x) {
      const int k = i % part;
      double2* const at = halves + i / part * length + k;
      double2 x[R];
#pragma unroll
      for (int q = 0; q < R; ++q) x[q] = at[q * part];
      transform(x);
      at[0] = x[0];
#pragma unroll
      for (int q = 1; q < R; ++q) at[q * part] = product(x[q], turns[q * k * (n / length)]);
    }
  }
};

/// Transforms a block; a barrier before it is the caller's, it ends in one. No part of its callers' code, so that it takes none of
/// their registers.
__device__ NO_INLINE void run(Transform t) {
  for (int length = t.n / 2; length > 1; length /= t.radix(length)) {
    if (t.radix(length) == 4)
      t.pass<4>(length);
    else if (t.radix(length) == 2)
      t.pass<2>(length);
    else
      t.pass<3>(length);
    __syncthreads();  // publishes the values to the next pass, or to the caller
  }
}

}  // namespace fourier
