// The linear forecasts of src/forecast for batches of training excerpts: autocorrelations (of past samples under a window,
// or of a plan frame's spectrum), the Levinson-Durbin recursion, and the predictions. f64 up to the coefficients, as there.
//
// Geometry: autocorrelations one block per (block of samples, excerpt) or per frame; the recursion one warp per problem;
// predictions one thread per sample. Dynamic shared memory: see src/cuda/launch.
// Oracle: wavegen::forecast::forecasts itself, in tests/kernels/forecast.rs.
#include "common.cuh"

namespace forecast {

constexpr int MAX_THREADS = 1024;
constexpr int LEVINSON_WARPS = 4;
constexpr int LEVINSON_THREADS = LEVINSON_WARPS * WARP;
constexpr int PREDICT_THREADS = 256;
/// Parts that the sum over a window is cut into, each summed by a thread.
constexpr int PARTS = 4;
/// Lags per thread, and samples that it reads at once.
constexpr int QUAD = 4;
/// exp(band * this) is the power; 1 / UNITS_PER_NEPER of src/plan/spectrum.rs.
constexpr double NEPERS_PER_UNIT = 4.0;
/// As in src/forecast/planned.rs.
constexpr double MEAN_TO_RMS = 0.7, LEAST_SCALE = 1e-4;

// ---- kernels -------------------------------------------------------------------------------------------------------

/// Windowed samples lie in shared memory as four rows, sample i in row i % 4, column i / 4: then threads with neighbouring
/// quads of lags read neighbouring addresses. Columns go on with zeros for as long as a lag may reach.
/// Shared: 4 rows, sums of the parts.
__device__ void past_autocorrelation(const PastAutocorrelationArgs& a) {
  SHARED_MEMORY(double, rows);
  const int n_quads = (a.window_len + QUAD - 1) / QUAD, lag_quads = a.order / QUAD + 1;
  const int columns = n_quads + lag_quads + 1;
  double* const sums = rows + QUAD * columns;  // [PARTS][lag_quads * QUAD]
  const float* const samples = a.samples + size_t(blockIdx.y) * a.len;
  const int first = (a.first_block + int(blockIdx.x)) * a.hop - a.window_len;
  for (int i = threadIdx.x; i < QUAD * columns; i += blockDim.x) {
    const bool sounds = i < a.window_len && first + i >= 0;
    rows[i % QUAD * columns + i / QUAD] = sounds ? double(samples[first + i]) * a.window[i] : 0.0;
  }
  __syncthreads();  // publishes the samples
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
  __syncthreads();  // publishes the sums
  double* const r = a.r + (size_t(blockIdx.y) * a.n_blocks + blockIdx.x) * (a.order + 1);
  for (int lag = threadIdx.x; lag <= a.order; lag += blockDim.x) {
    double sum = 0.0;
    for (int part = 0; part < PARTS; ++part) sum += sums[part * lag_quads * QUAD + lag];
    r[lag] = lag == 0 ? sum * (1.0 + a.white_relative) + a.white_absolute : sum;
  }
}

/// The cosine sum over the bins of the power spectrum. Shared: cosines of the circle's 2 * (n_bins - 1) steps, powers.
__device__ void planned_autocorrelation(const PlannedAutocorrelationArgs& a) {
  SHARED_MEMORY(double, cosines);
  const int circle = 2 * (a.n_bins - 1);
  double* const powers = cosines + circle;
  const float* const bands = a.bands + size_t(blockIdx.x) * a.n_bands;
  for (int i = threadIdx.x; i < circle; i += blockDim.x) cosines[i] = cospi(2.0 * i / circle);
  for (int bin = threadIdx.x; bin < a.n_bins; bin += blockDim.x) {
    const double below = bands[a.neighbours[2 * bin]], above = bands[a.neighbours[2 * bin + 1]], weight = a.weights[bin];
    // The bins within stand for their mirror images as well.
    const double images = bin == 0 || bin == a.n_bins - 1 ? 1.0 : 2.0;
    powers[bin] = images / circle * exp((below * (1.0 - weight) + above * weight) * NEPERS_PER_UNIT);
  }
  __syncthreads();  // publishes cosines and powers
  double* const r = a.r + size_t(blockIdx.x) * (a.order + 1);
  for (int lag = threadIdx.x; lag <= a.order; lag += blockDim.x) {
    double sum = 0.0;
    for (int bin = 0, angle = 0; bin < a.n_bins; ++bin) {
      sum += powers[bin] * cosines[angle];
      angle += lag;
      if (angle >= circle) angle -= circle;
    }
    sum *= a.lag_window[lag];
    r[lag] = lag == 0 ? sum * (1.0 + a.white_relative) + a.white_absolute : sum;
  }
}

/// One problem per warp. Shared, per warp: r, coefficients.
__device__ void levinson(const LevinsonArgs& args) {
  SHARED_MEMORY(double, shared);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, order = args.order;
  const int problem = blockIdx.x * LEVINSON_WARPS + warp;
  if (problem >= args.n) return;  // the whole warp; no barrier below is the block's
  double* const r = shared + warp * (2 * order + 1);
  double* const a = r + order + 1;
  for (int i = lane; i <= order; i += WARP) r[i] = args.r[size_t(problem) * (order + 1) + i];
  __syncwarp();  // publishes r
  double power = r[0];
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
  float* const coefficients = args.coefficients + size_t(problem) * order;
  for (int i = lane; i < order; i += WARP) coefficients[i] = i < k ? float(a[i]) : 0.f;
  if (lane == 0) args.log_scale[problem] = float(log(sqrt(power > 0.0 ? power : 0.0) * MEAN_TO_RMS + LEAST_SCALE));
}

/// One sample per thread, held to [-1, 1], 0 when it is not a number. Shared: the block's samples and `order` before them.
__device__ void predict(const PredictArgs& a) {
  SHARED_MEMORY(float, recent);
  const int begin = a.first_block * a.hop, block = blockIdx.x * PREDICT_THREADS;
  const float* const samples = a.samples + size_t(blockIdx.y) * a.len;
  for (int i = threadIdx.x; i < a.order + PREDICT_THREADS; i += PREDICT_THREADS) {
    const int at = begin + block + i - a.order;
    recent[i] = at >= 0 && at < a.len ? samples[at] : 0.f;
  }
  __syncthreads();  // publishes the samples
  const int n = block + threadIdx.x;
  if (begin + n >= a.len) return;
  const float* const c = a.coefficients + (size_t(blockIdx.y) * a.n_blocks + n / a.hop) * a.order;
  const float* const latest = recent + threadIdx.x + a.order - 1;
  float sums[4] = {};
  int i = 0;
  for (; i + 4 <= a.order; i += 4)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] += c[i + j] * latest[-(i + j)];
  for (; i < a.order; ++i) sums[0] += c[i] * latest[-i];
  const float sum = sums[0] + sums[1] + (sums[2] + sums[3]);
  a.forecasts[size_t(blockIdx.y) * (a.len - begin) + n] = sum == sum ? fminf(fmaxf(sum, -1.f), 1.f) : 0.f;
}

// ---- entry points --------------------------------------------------------------------------------------------------

KERNEL(forecast_past_autocorrelation, PastAutocorrelationArgs, MAX_THREADS, past_autocorrelation)
KERNEL(forecast_planned_autocorrelation, PlannedAutocorrelationArgs, MAX_THREADS, planned_autocorrelation)
KERNEL(forecast_levinson, LevinsonArgs, LEVINSON_THREADS, levinson)
KERNEL(forecast_predict, PredictArgs, PREDICT_THREADS, predict)

}  // namespace forecast
