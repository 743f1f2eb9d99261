// Autocorrelations and the Levinson-Durbin recursion of src/forecast, in f64, by the threads of one block: what the kernels of
// training (forecast.cu) and of generation (decode_persistent.cu) share.
#pragma once
#include "common.cuh"

namespace prediction {

/// Parts that the sum over a window is cut into, each summed by a thread.
constexpr int PARTS = 4;
/// Lags per thread, and samples that it reads at once.
constexpr int QUAD = 4;
/// As in src/forecast/planned.rs.
constexpr double MEAN_TO_RMS = 0.7, LEAST_SCALE = 1e-4;
/// White noise added to the power, relative and absolute: PastForecast::WHITE and Spectrum::WHITE.
struct White {
  double relative, absolute;
};

/// Samples of a window lie in shared memory as four rows, sample i in row i % 4, column i / 4: then threads with neighbouring
/// quads of lags read neighbouring addresses. Columns go on with zeros for as long as a lag may reach.
struct Window {
  int n_quads, lag_quads, columns;
  double* rows;  // [QUAD][columns]
  double* sums;  // [PARTS][lag_quads * QUAD]

  __device__ Window(double* room, int len, int order)
      : n_quads((len + QUAD - 1) / QUAD),
        lag_quads(order / QUAD + 1),
        columns(n_quads + lag_quads + 1),
        rows(room),
        sums(room + QUAD * columns) {}

  /// Doubles of room.
  __device__ int size() const { return QUAD * columns + PARTS * lag_quads * QUAD; }

  __device__ double& at(int i) const { return rows[i % QUAD * columns + i / QUAD]; }

  /// Sums of products, in parts; barriers before and after are the caller's.
  __device__ void sum_parts() const {
    for (int task = threadIdx.x; task < PARTS * lag_quads; task += blockDim.x) {
      const int part = task / lag_quads, lags = task % lag_quads;
      const int end = (part + 1) * n_quads / PARTS;
      double sum[QUAD] = {};
      for (int quad = part * n_quads / PARTS; quad < end; ++quad) {
        double later[2 * QUAD - 1];
#pragma unroll
        for (int j = 0; j < 2 * QUAD - 1; ++j) later[j] = rows[j % QUAD * columns + quad + lags + j / QUAD];
#pragma unroll
        for (int i = 0; i < QUAD; ++i) {
          const double x = rows[i * columns + quad];
#pragma unroll
          for (int lag = 0; lag < QUAD; ++lag) sum[lag] = fma(x, later[i + lag], sum[lag]);
        }
      }
      for (int lag = 0; lag < QUAD; ++lag) sums[(part * lag_quads + lags) * QUAD + lag] = sum[lag];
    }
  }

  /// The sum over all parts.
  __device__ double total(int lag) const {
    double sum = 0.0;
    for (int part = 0; part < PARTS; ++part) sum += sums[part * lag_quads * QUAD + lag];
    return sum;
  }
};

__device__ __forceinline__ double with_noise(double r, int lag, White white) {
  return lag == 0 ? r * (1.0 + white.relative) + white.absolute : r;
}

/// r [order + 1] -> a [order], both in shared memory, by one warp; gives the number of coefficients that could be had (the rest
/// counts as 0) and the residual power. Of r only r[0] is left. r has been
/// published to the warp, or lane l has written r[l], r[l + 32] and so on itself; a is published when it returns.
///
/// Schur's recursion (Le Roux and Gueguen, 1977): the reflections need no sum. At step k, r[k + 1..] are the correlations of the forward
/// residual with the past, a[k..] those of the backward residual, and a[..k] are coefficients.
__device__ __forceinline__ int levinson(double* r, double* a, int order, double& power) {
  constexpr int GROUP = 4;
  const int lane = threadIdx.x % WARP;
  for (int i = lane; i < order; i += WARP) a[i] = r[i];
  __syncwarp();  // publishes a
  power = r[0];
  double ahead = order > 0 ? r[1] : 0.0;  // forward, at k + 1
  int k = 0;
  // Stops early where r is not positive definite, or no number. All lanes know the same power.
  for (; k < order && power > 0.0; ++k) {
    const double reflection = ahead / power;
    const double next_forward = k + 2 <= order ? r[k + 2] : 0.0, next_backward = k + 1 < order ? a[k + 1] : 0.0;
    // From the end on: a's places are read before they are written.
    for (int end = order; end > k; end -= GROUP * WARP) {
      double forward[GROUP], backward[GROUP];
#pragma unroll
      for (int j = 0; j < GROUP; ++j) {
        const int i = end - j * WARP - lane;
        forward[j] = i > k ? r[i] : 0.0;
        backward[j] = i > k ? a[i - 1] : 0.0;
      }
      __syncwarp();  // they were read
#pragma unroll
      for (int j = 0; j < GROUP; ++j) {
        const int i = end - j * WARP - lane;
        if (i <= k) continue;
        r[i] = forward[j] - reflection * backward[j];
        if (i < order) a[i] = backward[j] - reflection * forward[j];
      }
    }
    for (int i = lane; i < (k + 1) / 2; i += WARP) {
      const int mirror = k - 1 - i;
      const double low = a[i], high = a[mirror];
      a[i] = low - reflection * high;
      a[mirror] = high - reflection * low;
    }
    if (lane == 0) a[k] = reflection;
    power -= reflection * ahead;
    ahead = next_forward - reflection * next_backward;
    __syncwarp();  // publishes r and a
  }
  power = power > 0.0 ? power : 0.0;
  return k;
}

/// What is played, before it is clipped to a token (src/forecast/mod.rs).
constexpr float MOST_SAMPLE = 4.f;
/// Held to what a sample may be.
__device__ __forceinline__ float held(float x, float most = 1.f) { return fminf(fmaxf(x, -most), most); }

/// ln of the mean |residual| of a prediction.
__device__ __forceinline__ float log_scale(double power) { return float(log(sqrt(power) * MEAN_TO_RMS + LEAST_SCALE)); }

/// The root mean square that is meant by it.
__device__ __forceinline__ float residual_rms(float log_scale) {
  return fmaxf(expf(log_scale) - float(LEAST_SCALE), 0.f) / float(MEAN_TO_RMS);
}

}  // namespace prediction
