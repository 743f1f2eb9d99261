// The spectrum that a plan frame's bands describe, as sharp as the sound was before the plan's analysis blurred it (src/forecast/sharp.rs),
// and its autocorrelation: in f64, by the threads of one block.
#pragma once
#include "fourier.cuh"
#include "linear_prediction.cuh"

namespace prediction {

/// As in src/forecast/sharp.rs.
constexpr int BLUNT_STEPS = 1;
constexpr double FALL = 0.4, FALL_OVER = 1.0;
constexpr double LEAST_OWN_POWER = 0.5, MOST_OWN_POWER = 4.0;
constexpr int AGREEING = 7;
/// FLOOR as in src/plan/spectrum.rs.
constexpr double FLOOR = 1e-4, LEAST_OVER_FLOOR = 0.03;
/// As in src/forecast/tones.rs.
constexpr double LEFT = 0.03, STANDS_OUT = 0.46, STANDS_OUT_OVER = 1.84;
constexpr int SURROUNDINGS = 6, LINE_REACH = 7;
/// As in src/forecast/planned.rs.
constexpr double TOO_LOUD = 0.7, LOUDEST = 8.0, DAMPING_TIME = 170.0;
/// exp(band * this) is the power; 1 / UNITS_PER_NEPER of src/plan/spectrum.rs.
constexpr double NEPERS_PER_UNIT = 4.0;

/// Held to low..high; what is no number stays none.
__device__ __forceinline__ double clamped(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

/// The analysis that a plan was made by, over the bins of a transform, in device memory: PlanGrid in args.cuh.
struct PlanGrid {
  int n_bands, n_bins;
  const int32_t *neighbours, *rows, *columns;
  const double *upper, *per_column, *turns, *row_weights;

  __device__ PlanGrid(int n_bands, int n_bins, const int32_t* places, const double* numbers)
      : n_bands(n_bands),
        n_bins(n_bins),
        neighbours(places),
        rows(neighbours + 2 * n_bins),
        columns(rows + 2 * (n_bands + 1)),
        upper(numbers),
        per_column(upper + n_bins),
        turns(per_column + n_bins),
        row_weights(turns + 4 * (n_bins - 1)) {}

  /// What lies between the values of two bands at a bin.
  template <class Value>
  __device__ double between(int bin, Value value) const {
    const double weight = upper[bin];
    return fma(value(neighbours[2 * bin + 1]), weight, __dmul_rn(value(neighbours[2 * bin]), 1.0 - weight));
  }

  /// Of the window's energy, what lies on a frame's own samples: after the last weight, where plans are sharpened.
  __device__ double own_share() const { return row_weights[rows[2 * n_bands + 1]]; }

  /// What the analysis finds in a band, by a warp; the same in all lanes.
  __device__ double find(int band, const double* powers) const {
    const int first = rows[2 * band], begin = rows[2 * band + 1], end = rows[2 * band + 3];
    double sum = 0.0;
#pragma unroll 4
    for (int i = begin + int(threadIdx.x) % WARP; i < end; i += WARP) sum = fma(row_weights[i], powers[first + i - begin], sum);
    return lanes_sum<WARP>(sum);
  }

  /// The mean over the bands that see a bin, each as much as it sees of it.
  __device__ double back(int bin, const double* of_bands) const {
    double sum = 0.0;
#pragma unroll 4
    for (int band = columns[2 * bin]; band < columns[2 * bin + 1]; ++band)
      sum = fma(of_bands[band], row_weights[rows[2 * band + 1] + bin - rows[2 * band]], sum);
    return sum * per_column[bin];
  }
};

/// Room: powers [n_bins]; the transform's block [2 * (n_bins - 1)], in whose place lie, until the powers go there, the blunt powers
/// [n_bins] (then what is left of each bin's) and two values per band.
struct PlannedSpectrum {
  const PlanGrid& grid;
  fourier::Transform transform;
  double *powers, *blunt, *planned, *missed;

  /// Doubles of room.
  __device__ static int size(int n_bins, int n_bands) {
    return even(n_bins) + max(2 * (n_bins - 1), n_bins + 2 * n_bands);
  }
  __device__ static int even(int n) { return (n + 1) / 2 * 2; }

  __device__ PlannedSpectrum(double* room, const PlanGrid& grid)
      : grid(grid),
        transform{2 * (grid.n_bins - 1), reinterpret_cast<const double2*>(grid.turns),
                  reinterpret_cast<double2*>(room + even(grid.n_bins))},
        powers(room),
        blunt(room + even(grid.n_bins)),
        planned(blunt + grid.n_bins),
        missed(planned + grid.n_bands) {}

  /// The spectrum of a frame [n_bands], sharpened in `steps` steps (0: the bands alone) where it does not fall from the frame
  /// `before`. `lines`, if not null: its lines' power is taken out, and goes there (as `list` has it). A barrier before it is the
  /// caller's; it ends in one, after which `autocorrelation` may be asked for.
  __device__ void make(const float* before, const float* frame, int steps, float* lines) const {
    const auto nepers = [&](int band) { return double(frame[band]) * NEPERS_PER_UNIT; };
    const auto fall = [&](int band) { return double(before[band]) * NEPERS_PER_UNIT - nepers(band); };
    if (steps > 0) {
      steepen(nepers, fall);
      for (int bin = threadIdx.x; bin < grid.n_bins; bin += blockDim.x)
        powers[bin] = exp(grid.between(bin, [&](int band) { return planned[band]; }));
      __syncthreads();  // the bands' logarithms were read
      for (int band = threadIdx.x; band < grid.n_bands; band += blockDim.x) planned[band] = exp(planned[band]);
      __syncthreads();  // publishes bands and powers
      for (int step = 0; step < steps; ++step) sharpen(step == BLUNT_STEPS);
    } else {
      for (int bin = threadIdx.x; bin < grid.n_bins; bin += blockDim.x) powers[bin] = exp(grid.between(bin, nepers));
    }
    const auto falls = [&](int band) { return clamped((fall(band) - FALL) / FALL_OVER, 0.0, 1.0); };
    // A bin's thread has read its blunt power when it writes there.
    for (int bin = threadIdx.x; bin < grid.n_bins; bin += blockDim.x) {
      if (steps > BLUNT_STEPS) powers[bin] += grid.between(bin, falls) * (blunt[bin] - powers[bin]);
      blunt[bin] = 1.0;
    }
    if (lines) take_out(lines);
    // Powers are real and even, so their transform is, but for 1 / n, the inverse one. What else lay in this place nobody reads any
    // more.
    for (int bin = threadIdx.x; bin < grid.n_bins; bin += blockDim.x) {
      const double power = powers[bin] * blunt[bin];
      transform.value(bin) = power;
      if (bin > 0) transform.value(transform.n - bin) = power;
    }
    __syncthreads();  // publishes the spectrum
    fourier::run(transform);
  }

  __device__ double autocorrelation(int lag) const { return transform.bin(lag).x / transform.n; }

  /// Leaves in `planned` the power of the frame itself, nepers: what the window has seen and the frame before had not, as far as
  /// neighbouring bands agree, without the plan's floor.
  template <class Nepers, class Fall>
  __device__ void steepen(Nepers nepers, Fall fall) const {
    const double share = grid.own_share();
    double* own = powers;  // nobody needs them yet
    for (int band = threadIdx.x; band < grid.n_bands; band += blockDim.x)
      own[band] = log(clamped((1.0 - (1.0 - share) * exp(fall(band))) / share, LEAST_OWN_POWER, MOST_OWN_POWER));
    __syncthreads();  // publishes what each band has by itself
    for (int band = threadIdx.x; band < grid.n_bands; band += blockDim.x) {
      double sum = 0.0;
      for (int d = -AGREEING; d <= AGREEING; ++d)
        sum += (AGREEING + 1 - abs(d)) * own[min(max(band + d, 0), grid.n_bands - 1)];
      const double power = exp(nepers(band) + sum / ((AGREEING + 1) * (AGREEING + 1)));
      planned[band] = log(fmax(power - FLOOR, LEAST_OVER_FLOOR * FLOOR));
    }
    __syncthreads();  // publishes the bands
  }

  /// One step of Richardson and Lucy's deconvolution; `keep`: the powers before it stay, as the blunt ones.
  __device__ void sharpen(bool keep) const {
    for (int band = threadIdx.x / WARP; band < grid.n_bands; band += blockDim.x / WARP) {
      const double found = grid.find(band, powers);
      if (threadIdx.x % WARP == 0) missed[band] = planned[band] / (found + LEAST_POWER);
    }
    __syncthreads();  // publishes what the bands miss
    for (int bin = threadIdx.x; bin < grid.n_bins; bin += blockDim.x) {
      if (keep) blunt[bin] = powers[bin];
      powers[bin] *= grid.back(bin, missed);
    }
    __syncthreads();  // publishes the powers, and what the bands miss was read
  }

  /// Lowers in `blunt` what is left of the bins of lines, and lists them.
  __device__ void take_out(float* lines) const {
    double* const surroundings = missed;
    for (int band = threadIdx.x; band < grid.n_bands; band += blockDim.x) surroundings[band] = log(median(band));
    __syncthreads();  // publishes powers and surroundings
    for (int bin = threadIdx.x; bin < grid.n_bins; bin += blockDim.x) {
      if (!is_peak(bin)) continue;
      const double around = grid.between(bin, [&](int band) { return surroundings[band]; });
      const double stands_out = (log(powers[bin]) - around - STANDS_OUT) / STANDS_OUT_OVER;
      if (!(stands_out > 0.0)) continue;
      const Line line = line_of(bin);
      for (int i = line.first; i < line.end; ++i) blunt[i] = 1.0 - fmin(stands_out, 1.0) * (1.0 - LEFT);
    }
    __syncthreads();  // publishes what is left
    list(lines);
    __syncthreads();  // powers and what is left were read
  }

  /// The number of lines, and of each its peak and the power that was taken, by rising peaks: [1 + 2 * lines]. Every warp counts all
  /// lines and lists those of its turns.
  __device__ void list(float* lines) const {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    int below = 0;
    for (int first = 0, turn = 0; first < grid.n_bins; first += WARP, turn = (turn + 1) % n_warps) {
      const int bin = first + lane;
      const bool is_line = bin < grid.n_bins && blunt[bin] < 1.0 && is_peak(bin);
      const unsigned all = __ballot_sync(ALL_LANES, is_line);
      if (is_line && turn == warp) {
        const int place = below + __popc(all & ((1u << lane) - 1));
        const Line line = line_of(bin);
        double power = 0.0;
        for (int i = line.first; i < line.end; ++i) power += powers[i];
        lines[1 + 2 * place] = float(bin);
        lines[2 + 2 * place] = float((1.0 - blunt[bin]) * power);
      }
      below += __popc(all);
    }
    if (threadIdx.x == 0) lines[0] = float(below);
  }

  __device__ bool is_peak(int bin) const {
    return 0 < bin && bin < grid.n_bins - 1 && powers[bin] > powers[bin - 1] && powers[bin] >= powers[bin + 1];
  }

  /// Bins `first..end` around a peak that fall to both sides, the lowest on its left included; no other line has one of them.
  struct Line {
    int first, end;
  };
  __device__ Line line_of(int peak) const {
    int first = peak, end = peak + 1;
    while (first > 0 && peak - first < LINE_REACH && powers[first - 1] < powers[first]) --first;
    while (end + 1 < grid.n_bins && end - peak < LINE_REACH && powers[end] < powers[end - 1] && powers[end + 1] < powers[end])
      ++end;
    return {first, end};
  }

  /// Of the planned powers around a band, itself among them; beyond the ends all is as there.
  __device__ double median(int band) const {
    const auto around = [&](int d) { return planned[min(max(band + d, 0), grid.n_bands - 1)]; };
    for (int d = -SURROUNDINGS; d <= SURROUNDINGS; ++d) {
      const double one = around(d);
      int below = 0, equal = 0;
      for (int e = -SURROUNDINGS; e <= SURROUNDINGS; ++e) {
        below += around(e) < one;
        equal += around(e) == one;
      }
      if (below <= SURROUNDINGS && SURROUNDINGS < below + equal) return one;
    }
    return planned[band];  // among what is no number
  }

  /// f64::MIN_POSITIVE of Rust.
  static constexpr double LEAST_POWER = 2.2250738585072014e-308;
};

/// ln of what the poles of a forecast shrink by from sample to sample where `power` was heard and `planned` was to be.
__device__ __forceinline__ double damping(double power, double planned) {
  return -clamped(log(power / planned) - TOO_LOUD, 0.0, LOUDEST) / (2.0 * DAMPING_TIME);
}

/// Coefficient i, the latest sample's being the first, with the poles shrunk.
__device__ __forceinline__ float damped(float coefficient, int i, double damping) {
  return coefficient * float(exp(damping * (i + 1)));
}

}  // namespace prediction
