// The linear forecasts of src/forecast for batches of training excerpts: autocorrelations (of past samples under a window,
// or of a plan frame's sharpened spectrum), the tones of its lines, the Levinson-Durbin recursion, and the predictions. f64 up to the
// coefficients, as there.
//
// Geometry: autocorrelations one block per (block of samples, excerpt) or per frame, and so tones; the recursion one warp per
// problem; predictions one thread per sample. Dynamic shared memory: see src/cuda/launch.
// Oracle: wavegen::forecast::forecasts itself, in tests/kernels/forecast.rs.
#include "tones.cuh"

namespace forecast {

constexpr int MAX_THREADS = 1024;
constexpr int PLANNED_THREADS = 512;
constexpr int LEVINSON_WARPS = 4;
constexpr int LEVINSON_THREADS = LEVINSON_WARPS * WARP;
constexpr int PREDICT_THREADS = 256;

// ---- kernels -------------------------------------------------------------------------------------------------------

/// Shared: a prediction::Window.
__device__ void past_autocorrelation(const PastAutocorrelationArgs& a) {
  SHARED_MEMORY(double, room);
  const prediction::Window window(room, a.window_len, a.order);
  const float* const samples = a.samples + size_t(blockIdx.y) * a.len;
  const int first = (a.first_block + int(blockIdx.x)) * a.hop - a.window_len;
  for (int i = threadIdx.x; i < prediction::QUAD * window.columns; i += blockDim.x) {
    const bool sounds = i < a.window_len && first + i >= 0;
    window.at(i) = sounds ? double(samples[first + i]) * a.window[i] : 0.0;
  }
  __syncthreads();  // publishes the samples
  window.sum_parts();
  __syncthreads();  // publishes the sums
  double* const r = a.r + (size_t(blockIdx.y) * a.n_blocks + blockIdx.x) * (a.order + 1);
  for (int lag = threadIdx.x; lag <= a.order; lag += blockDim.x)
    r[lag] = prediction::with_noise(window.total(lag), lag, {a.white_relative, a.white_absolute});
}

/// Shared: a prediction::PlannedSpectrum.
__device__ void planned_autocorrelation(const PlannedAutocorrelationArgs& a) {
  SHARED_MEMORY(double, room);
  const prediction::PlanGrid grid(a.n_bands, a.n_bins, a.places, a.numbers);
  const prediction::PlannedSpectrum spectrum(room, grid);
  const float* const before = a.bands + (size_t(blockIdx.y) * (a.n_blocks + 1) + blockIdx.x) * a.n_bands;
  const size_t block = size_t(blockIdx.y) * a.n_blocks + blockIdx.x;
  spectrum.make(before, before + a.n_bands, a.deconvolution, a.lines ? a.lines + block * a.n_bins : nullptr);
  double* const r = a.r + block * (a.order + 1);
  for (int lag = threadIdx.x; lag <= a.order; lag += blockDim.x)
    r[lag] = prediction::with_noise(spectrum.autocorrelation(lag) * a.lag_window[lag], lag,
                                    {a.white_relative, a.white_absolute});
}

/// Shared: a tones::Past.
__device__ void find_tones(const TonesArgs& a) {
  SHARED_MEMORY(double, room);
  const prediction::PlanGrid grid(a.n_bands, a.n_bins, a.places, a.numbers);
  const tones::Past past(room, grid, a.hop, a.window_len, a.window, a.lobe);
  const float* const samples = a.samples + size_t(blockIdx.y) * a.len;
  const int first = (a.first_block + int(blockIdx.x)) * a.hop - a.window_len;
  const auto heard = [&](int i) { return first + i >= 0 ? samples[first + i] : 0.f; };
  const size_t block = size_t(blockIdx.y) * a.n_blocks + blockIdx.x;
  const int n_tones = past.find_all(heard, a.lines + block * a.n_bins);
  past.sing(n_tones);
  for (int t = threadIdx.x; t < a.hop; t += blockDim.x) {
    a.now[block * a.hop + t] = float(past.sound(t));
    a.later[block * a.hop + t] = float(past.sound(a.hop + t));
  }
}

/// One sample per thread.
__device__ void leave(const LeftArgs& a) {
  const int n = blockIdx.x * PREDICT_THREADS + threadIdx.x, block = n / a.hop - a.first_block, t = n % a.hop;
  if (n >= a.len) return;
  float tone = 0.f;
  if (block >= 0) {
    const size_t at = (size_t(blockIdx.y) * a.n_blocks + block) * a.hop + t;
    tone = tones::joined(a.now[at], block > 0 ? a.later[at - a.hop] : 0.f, t, a.hop);
  }
  const size_t at = size_t(blockIdx.y) * a.len + n;
  a.tones[at] = tone;
  a.left[at] = a.samples[at] - tone;
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
  double power;
  const int found = prediction::levinson(r, a, order, power);
  double damping = 0.0;
  if (args.samples) {
    const float* const samples = args.samples + size_t(problem / args.n_blocks) * args.len;
    const int end = (args.first_block + problem % args.n_blocks) * args.hop;
    double heard = 0.0;
    for (int i = max(0, end - order) + lane; i < end; i += WARP) heard += double(samples[i]) * samples[i];
    damping = prediction::damping(lanes_sum<WARP>(heard) / order, r[0]);
  }
  float* const coefficients = args.coefficients + size_t(problem) * order;
  for (int i = lane; i < order; i += WARP) coefficients[i] = prediction::damped(i < found ? float(a[i]) : 0.f, i, damping);
  if (lane == 0) args.log_scale[problem] = prediction::log_scale(power);
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
  const float tone = a.tones ? a.tones[size_t(blockIdx.y) * a.len + begin + n] : 0.f;
  a.forecasts[size_t(blockIdx.y) * (a.len - begin) + n] = prediction::held(tone + (sum == sum ? sum : 0.f));
}

// ---- entry points --------------------------------------------------------------------------------------------------

KERNEL(forecast_past_autocorrelation, PastAutocorrelationArgs, MAX_THREADS, past_autocorrelation)
KERNEL(forecast_planned_autocorrelation, PlannedAutocorrelationArgs, PLANNED_THREADS, planned_autocorrelation)
KERNEL(forecast_tones, TonesArgs, PLANNED_THREADS, find_tones)
KERNEL(forecast_left, LeftArgs, PREDICT_THREADS, leave)
KERNEL(forecast_levinson, LevinsonArgs, LEVINSON_THREADS, levinson)
KERNEL(forecast_predict, PredictArgs, PREDICT_THREADS, predict)

}  // namespace forecast
