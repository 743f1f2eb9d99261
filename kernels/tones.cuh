// The tones that lines of a plan go on as, with the frequencies and phases that the past has there (src/forecast/tones.rs): in f64, by
// the threads of one block.
#pragma once
#include "planned_spectrum.cuh"

namespace tones {

/// As in src/forecast/tones.rs.
constexpr double NEAR = 0.01455, NEAR_BINS = 1.5;
constexpr double HEARD = 0.063, BEGINS = 3.0;
constexpr int RISE = 128, STEPS = 32;
constexpr double PI = 3.14159265358979323846;

/// A tone: `amplitude cos(pi (turn t + phase))`, t samples after the frame began.
struct Tone {
  double turn, phase;
  float amplitude;
  int32_t rises;  // 1: it begins now

  __device__ double at(int t) const {
    const double turns = turn * t + phase;
    return amplitude * double(cospif(float(turns - 2.0 * rint(0.5 * turns))));
  }
};
static_assert(sizeof(Tone) == 24, "Tone differs from src/cuda/launch");

/// From 0 to 1 over n samples as the square of a sine, and 1 from there on.
__device__ __forceinline__ double quarter_turn(int t, int n) { return t < n ? 0.5 - 0.5 * cospi((t + 0.5) / n) : 1.0; }

/// The past under the plan's window, transformed.
struct Past {
  fourier::Transform transform;
  int window_len;
  const double* lobe;  // as DecodeModel has it

  __device__ static double square(double2 x) { return x.x * x.x + x.y * x.y; }
  __device__ double power(int bin) const { return square(transform.bin(bin)); }

  /// The window's transform at a bin that lies `offset` bins below a line.
  __device__ double2 lobe_at(double offset) const {
    const double place = (0.5 - offset) * (2 * STEPS);
    const int step = min(int(place), 2 * STEPS - 1);
    const double weight = place - step;
    const double* const low = lobe + 2 * step;
    return {low[0] * (1.0 - weight) + low[2] * weight, low[1] * (1.0 - weight) + low[3] * weight};
  }

  /// The tone of a line of the plan whose bins have the power `of_bins` in sum; by a warp, the same in all lanes.
  __device__ Tone find(int peak, double of_bins) const {
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
    if (at < HEARD * planned / of_peak || at < before || at < after || before <= 0.0 || after <= 0.0) {
      bin = peak;
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
    return {turn, angle / PI + turn * window_len, float(sqrt(2.0 * planned)), begins};
  }
};

/// The tones of `n_lines` lines, in room for them; a barrier after it is the caller's. No part of its callers' code, so that it takes
/// none of their registers.
__device__ NO_INLINE void find(const Past& past, const float* lines, int n_lines, Tone* tones) {
  for (int i = threadIdx.x / WARP; i < n_lines; i += blockDim.x / WARP) {
    const Tone tone = past.find(int(lines[2 * i]), lines[2 * i + 1]);
    if (threadIdx.x % WARP == 0) tones[i] = tone;
  }
}

/// What they sound like for `hop` samples, the tones before, which would go on as `rest`, fading out; leaves in `rest` how these would
/// go on.
__device__ NO_INLINE void sing(const Tone* tones, int n_tones, int hop, float* ahead, float* rest) {
  for (int t = threadIdx.x; t < hop; t += blockDim.x) {
    double steady = 0.0, rising = 0.0, later = 0.0;
    for (int i = 0; i < n_tones; ++i) {
      const double now = tones[i].at(t);
      (tones[i].rises ? rising : steady) += now;
      later += tones[i].at(hop + t);
    }
    const double fade = quarter_turn(t, hop);
    ahead[t] = float(steady * fade + rest[t] * (1.0 - fade) + rising * quarter_turn(t, RISE));
    rest[t] = float(later);
  }
}

}  // namespace tones
