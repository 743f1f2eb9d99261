// The tones that lines of a plan go on as, with the frequencies and phases that the past has there (src/forecast/tones.rs): in f64, by
// the threads of one block.
#pragma once
#include "planned_spectrum.cuh"

namespace tones {

/// As in src/forecast/tones.rs.
constexpr double NEAR = 0.01455, NEAR_BINS = 1.5;
constexpr double HEARD = 0.063, BEGINS = 3.0;
constexpr int RISE = 128, STEPS = 32;
/// Parts that the tones are cut into, and samples that a thread sums one of them for.
constexpr int PARTS = 4, RUN = 16;
constexpr double PI = 3.14159265358979323846;

/// A tone: `amplitude cos(pi (turn t + phase))`, t samples after the frame began.
struct Tone {
  double turn, phase;
  double twice;  // 2 cos(pi turn)
  float amplitude;
  int32_t rises;  // 1: it begins now

  __device__ double at(int t) const {
    const double turns = turn * t + phase;
    return amplitude * cospi(turns - 2.0 * rint(0.5 * turns));
  }
};
static_assert(sizeof(Tone) == 32, "Tone differs from src/cuda/launch");

/// From 0 to 1 over n samples as the square of a sine, and 1 from there on.
__device__ __forceinline__ double quarter_turn(int t, int n) { return t < n ? 0.5 - 0.5 * cospi((t + 0.5) / n) : 1.0; }

/// The past under the plan's window. Room: the transform's block, which sums [PARTS][2 * hop] take later, and a tone for every other bin.
struct Past {
  fourier::Transform transform;
  double* sums;
  Tone* tones;
  int hop;
  int window_len;
  const double *window, *lobe;  // as DecodeModel has them

  __device__ Past(double* room, const prediction::PlanGrid& grid, int hop, int window_len, const double* window,
                  const double* lobe)
      : transform{2 * (grid.n_bins - 1), reinterpret_cast<const double2*>(grid.turns), reinterpret_cast<double2*>(room)},
        sums(room),
        tones(reinterpret_cast<Tone*>(room + max(transform.n, PARTS * 2 * hop))),
        hop(hop),
        window_len(window_len),
        window(window),
        lobe(lobe) {}

  /// Leaves in `tones` those of the lines of a frame (as `PlannedSpectrum::list` has them), before which `sample(i)` was heard, the
  /// last window_len samples; gives their number. Ends in a barrier.
  template <class Sample>
  __device__ int find_all(Sample sample, const float* lines) const {
    for (int i = threadIdx.x; i < transform.n; i += blockDim.x)
      transform.value(i) = i < window_len ? double(sample(i)) * window[i] : 0.0;
    __syncthreads();  // publishes the samples
    fourier::run(transform);
    const int n_lines = int(lines[0]);
    for (int i = threadIdx.x / WARP; i < n_lines; i += blockDim.x / WARP) {
      const Tone tone = find(int(lines[1 + 2 * i]), lines[2 + 2 * i]);
      if (threadIdx.x % WARP == 0) tones[i] = tone;
    }
    __syncthreads();  // publishes the tones, and the transform was read
    return n_lines;
  }

  __device__ static double square(double2 x) { return fma(x.x, x.x, __dmul_rn(x.y, x.y)); }
  __device__ double power(int bin) const { return square(transform.bin(bin)); }

  /// The window's transform at a bin that lies `offset` bins below a line.
  __device__ double2 lobe_at(double offset) const {
    const double place = (0.5 - offset) * (2 * STEPS);
    const int step = min(int(place), 2 * STEPS - 1);
    const double weight = place - step;
    const double* const low = lobe + 2 * step;
    return {fma(low[2], weight, __dmul_rn(low[0], 1.0 - weight)), fma(low[3], weight, __dmul_rn(low[1], 1.0 - weight))};
  }

  /// The tone of a line of the plan whose bins have the power `of_bins` in sum; by a warp, the same in all lanes. No part of
  /// its callers' code, so that it takes none of their registers.
  __device__ NO_INLINE Tone find(int peak, double of_bins) const {
    const double planned = of_bins * lobe[2 * (2 * STEPS + 1)];
    const double of_peak = 2.0 / square({lobe[2 * STEPS], lobe[2 * STEPS + 1]});
    const int n_bins = transform.n / 2 + 1;
    const double reach = fmax(peak * NEAR, NEAR_BINS);
    const int first = max(int(floor(peak - reach)), 1), last = min(int(ceil(peak + reach)), n_bins - 2);
    // The loudest bin near by, of equals the first.
    int bin = peak;
    double at = -1.0;
    for (int near = first + int(threadIdx.x) % WARP; near <= last; near += WARP)
      if (const double here = power(near); here > at) at = here, bin = near;
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
      const double other = __shfl_xor_sync(ALL_LANES, at, distance);
      const int other_bin = __shfl_xor_sync(ALL_LANES, bin, distance);
      if (other > at || (other == at && other_bin < bin)) at = other, bin = other_bin;
    }
    double offset = 0.0;
    const double before = power(bin - 1), after = power(bin + 1);
    if (!(at >= HEARD * planned / of_peak && at >= before && at >= after && before > 0.0 && after > 0.0)) {
      bin = peak;  // likewise where nothing is a number
    } else {
      // The vertex of a parabola through the logarithms.
      const double rise = log(at) - log(before), fall = log(at) - log(after), bend = rise + fall;
      if (bend > 0.0) offset = prediction::clamped(0.5 * (rise - fall) / bend, -0.5, 0.5);
    }
    const double2 heard = transform.bin(bin), unit = lobe_at(offset);
    const double2 turned = fourier::product(heard, {unit.x, -unit.y});
    const double angle = square(turned) > 0.0 ? atan2(turned.y, turned.x) : 0.0;
    const double turn = 2.0 * (bin + offset) / transform.n;
    const bool begins = planned > exp(BEGINS) * 2.0 * square(heard) / square(unit);
    return {turn, angle / PI + turn * window_len, 2.0 * cospi(turn), float(sqrt(2.0 * planned)), begins};
  }

  /// Sums all tones over the frame in which they begin and over the next, where they would go on. Ends in a barrier. No part of its
  /// callers' code, likewise.
  __device__ NO_INLINE void sing(int n_tones) const {
    const int hop = this->hop, runs = (2 * hop + RUN - 1) / RUN;
    const Tone* const tones = this->tones;
    for (int task = threadIdx.x; task < PARTS * runs; task += blockDim.x) {
      const int part = task / runs, begin = task % runs * RUN;
      double* const out = sums + part * 2 * hop + begin;
      for (int rising = 0; rising < 2; ++rising) {
        double sum[RUN] = {};
        for (int i = n_tones * part / PARTS; i < n_tones * (part + 1) / PARTS; ++i) {
          if (tones[i].rises != rising) continue;
          // Chebyshev's recurrence.
          const double twice = tones[i].twice;
          double now = tones[i].at(begin), next = tones[i].at(begin + 1);
#pragma unroll
          for (int k = 0; k < RUN; ++k) {
            sum[k] += now;
            const double after = twice * next - now;
            now = next;
            next = after;
          }
        }
#pragma unroll
        for (int k = 0; k < RUN; ++k) {
          const int t = begin + k;
          if (t >= 2 * hop) continue;
          out[k] = (rising ? out[k] : 0.0) + sum[k] * (t < hop ? quarter_turn(t, rising ? RISE : hop) : 1.0);
        }
      }
    }
    __syncthreads();  // publishes the sums
  }

  /// What was summed at a time, of this frame or the next.
  __device__ double sound(int t) const {
    double sum = 0.0;
    for (int part = 0; part < PARTS; ++part) sum += sums[part * 2 * hop + t];
    return sum;
  }
};

/// The tones of a frame, and those of the frame before, which would go on as `rest`, fading out.
__device__ __forceinline__ float joined(double now, float rest, int t, int hop) {
  return float(now + rest * (1.0 - quarter_turn(t, hop)));
}

}  // namespace tones
