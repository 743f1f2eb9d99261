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
          for (int lag = 0; lag < QUAD; ++lag) sum[lag] += x * later[i + lag];
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
/// counts as 0) and the residual power. r has been published to the warp; a is when it returns.
__device__ __forceinline__ int levinson(const double* r, double* a, int order, double& power) {
  const int lane = threadIdx.x % WARP;
  power = r[0];
  int k = 0;
  // Stops early where r is not positive definite, or no number. All lanes know the same power.
  for (; k < order && power > 0.0; ++k) {
    double sum = 0.0;
    for (int i = lane; i < k; i += WARP) sum += a[i] * r[k - i];
    // What every lane read of a is in this sum, so a may change after it.
    const double reflection = (r[k + 1] - lanes_sum<WARP>(sum)) / power;
    for (int i = lane; i < (k + 1) / 2; i += WARP) {
      const int mirror = k - 1 - i;
      const double low = a[i], high = a[mirror];
      a[i] = low - reflection * high;
      a[mirror] = high - reflection * low;
    }
    if (lane == 0) a[k] = reflection;
    power *= 1.0 - reflection * reflection;
    __syncwarp();  // publishes a
  }
  power = power > 0.0 ? power : 0.0;
  return k;
}

/// Held to what a sample may be.
__device__ __forceinline__ float held(float x) { return fminf(fmaxf(x, -1.f), 1.f); }

/// ln of the mean |residual| of a prediction.
__device__ __forceinline__ float log_scale(double power) { return float(log(sqrt(power) * MEAN_TO_RMS + LEAST_SCALE)); }

/// The root mean square that is meant by it.
__device__ __forceinline__ float residual_rms(float log_scale) {
  return fmaxf(expf(log_scale) - float(LEAST_SCALE), 0.f) / float(MEAN_TO_RMS);
}

}  // namespace prediction
