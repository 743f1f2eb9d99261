// What does not happen every sample: the plan transformer draws a frame, forecast and vectors are made from it, and the
// forecast from the past gets new coefficients. One block, all rows of a set of streams.
#pragma once
#include "decode_step.cuh"
#include "tones.cuh"

namespace decode {

/// Of PastForecast and of Spectrum.
constexpr prediction::White PAST_WHITE = {1e-7, 1e-6}, PLANNED_WHITE = {1e-7, 1e-8};

/// What is no number is impossible.
__device__ __forceinline__ float possible(float x) { return x == x ? x : -INFINITY; }

/// Draws from logits [n_entries][ROWS] as LogitSampler in src/sampler.rs does, for row r; the whole block. Scratch: weights and
/// order of the entries.
template <class W, int ROWS>
__device__ void draw_logits(const Room<W, ROWS>& room, const float* logits, int r, float uniform, int32_t& token) {
  const DecodeArgs& a = room.a();
  const int n = room.m().n_entries;
  double* const weights = reinterpret_cast<double*>(room.scratch());
  int* const order = reinterpret_cast<int*>(weights + n);
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float mine = possible(logits[i * ROWS + r]);
    int place = 0;
    for (int j = 0; j < n; ++j) {
      const float other = possible(logits[j * ROWS + r]);
      place += other > mine || (other == mine && j < i);
    }
    order[place] = i;
  }
  __syncthreads();  // publishes the order
  const double top = possible(logits[order[0] * ROWS + r]);
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    weights[i] = exp((double(possible(logits[order[i] * ROWS + r])) - top) / double(a.temperature));
  __syncthreads();  // publishes the weights
  if (threadIdx.x == 0) {
    int chosen = order[0];
    if (a.temperature > 0.f) {
      double total = 0.0, mass = 0.0, sum = 0.0;
      for (int i = 0; i < n; ++i) total += weights[i];
      const int limit = a.top_k == 0 ? n : min(a.top_k, n);
      int kept = 0;
      while (kept < limit && (kept == 0 || (mass < double(a.top_p) * total && weights[kept] >= double(a.min_p))))
        mass += weights[kept++];
      chosen = order[kept - 1];
      for (int i = 0; i < kept; ++i) {
        sum += weights[i];
        if (double(uniform) * mass < sum) {
          chosen = order[i];
          break;
        }
      }
    }
    token = chosen;
  }
  __syncthreads();  // publishes the token
}

/// Adds to `draw` what row r's token costs by these logits and what that is on average (PlanDraw in src/sampler.rs); one warp.
template <class W, int ROWS>
__device__ void add_surprise(const Room<W, ROWS>& room, const float* logits, int r, int token, float* draw, bool first) {
  float most = -INFINITY;
  for (int i = lane(); i < room.m().n_entries; i += WARP) {
    const float logit = logits[i * ROWS + r];
    if (isfinite(logit)) most = fmaxf(most, logit);
  }
  most = lanes_max<WARP>(most);
  double total = 0.0, weighted = 0.0;
  for (int i = lane(); i < room.m().n_entries; i += WARP) {
    const float logit = logits[i * ROWS + r];
    if (!isfinite(logit)) continue;
    const double above = double(logit) - double(most), weight = exp(above);
    total += weight;
    weighted += weight * above;
  }
  total = lanes_sum<WARP>(total);
  weighted = lanes_sum<WARP>(weighted);
  const float drawn = logits[token * ROWS + r];
  if (lane() != 0) return;
  const bool counts = isfinite(drawn);
  const float surprisal = counts ? float(log(total) - (double(drawn) - double(most))) : 0.f;
  const float entropy = counts ? float(log(total) - weighted / total) : 0.f;
  draw[0] = first ? surprisal : draw[0] + surprisal;
  draw[1] = first ? entropy : draw[1] + entropy;
}

/// `n` features of every row, value(r, j), for maps to read.
template <class W, int ROWS, class Value>
__device__ void each_pair(const Room<W, ROWS>& room, Quad<PIECES<W>>* to, int n, Value value) {
  const int pairs = (n + 1) / 2;
  for (int i = threadIdx.x; i < room.n_rows() * pairs; i += blockDim.x) {
    const int r = i / pairs, j = 2 * (i % pairs);
    room.put(to, j, r, value(r, j), j + 1 < n ? value(r, j + 1) : 0.f);
  }
}

/// The tokens of frame k are drawn, or priced if they are given, and the plan transformer reads them.
template <class W, int ROWS>
__device__ NO_INLINE void plan_frame(const Room<W, ROWS> room, int k) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  const int dim = m.plan.dim, books = m.n_codebooks;
  const auto frame_of = [&](int r) { return int64_t(room.rows()[r].turn) * a.n_frames + k; };
  const auto token_of = [&](int r, int q) { return a.plan_tokens[frame_of(r) * books + q]; };
  for (int r = threadIdx.x; r < room.n_rows(); r += blockDim.x)
    room.rows()[r].at[m.n_tiers].go_on(m.plan.window);
  for (int q = 0; q < books && (a.plan_uniforms || a.plan_draws); ++q) {
    each_pair(room, room.inputs(), dim, [&](int r, int j) {
      float x = room.memory(r)[m.hidden + j];
      for (int p = 0; p < q; ++p) x += a.exact[m.given + (int64_t(p) * m.n_entries + token_of(r, p)) * dim + j];
      return x;
    });
    __syncthreads();  // publishes the inputs
    room.linear_silu(room.attended(), m.heads + 2 * q, room.inputs());
    __syncthreads();  // publishes the hidden layer
    room.linear(m.heads + 2 * q + 1, room.attended(), [&](int j, int r, float low, float high) {
      room.wide()[j * ROWS + r] = low;
      room.wide()[(j + 1) * ROWS + r] = high;
    });
    __syncthreads();  // publishes the logits
    if (a.plan_uniforms) {
      for (int r = 0; r < room.n_rows(); ++r) {
        const int64_t at = frame_of(r) * books + q;
        draw_logits(room, room.wide(), r, a.plan_uniforms[at], a.plan_tokens[at]);
      }
    }
    for (int r = warp(); r < room.n_rows() && a.plan_draws; r += n_warps())
      add_surprise(room, room.wide(), r, token_of(r, q), a.plan_draws + 2 * frame_of(r), q == 0);
    __syncthreads();  // the logits were read
  }
  for (int i = threadIdx.x; i < room.n_rows() * m.n_bands; i += blockDim.x) {
    const int r = i / m.n_bands, j = i % m.n_bands;
    const float mean = a.exact[m.book_mean + j];
    float band = mean;
    for (int q = 0; q < books; ++q)
      band += a.exact[m.books + (int64_t(q) * m.n_entries + token_of(r, q)) * m.n_bands + j];
    band = fminf(band, a.exact[m.book_ceiling + j]);
    a.bands[frame_of(r) * m.n_bands + j] = band;
  }
  __syncthreads();  // publishes the bands
  const auto above_mean = [&](int r, int j) { return a.bands[frame_of(r) * m.n_bands + j] - a.exact[m.book_mean + j]; };
  each_pair(room, room.inputs(), m.n_bands, above_mean);
  __syncthreads();  // publishes them as inputs
  room.linear_stream(m.bands, room.inputs(), [&](int j, int r) {
    float2 sum = {0.f, 0.f};
    for (int q = 0; q < books; ++q) {
      const float* const embedding = a.exact + m.embeddings + (int64_t(q) * m.n_entries + token_of(r, q)) * dim;
      sum.x += 0.5f * embedding[j];
      sum.y += 0.5f * embedding[j + 1];
    }
    return sum;
  });
  __syncthreads();  // publishes the residual stream
  Work<W, ROWS> work;
  work.begin(room, 0);
  forward(
      room, work, m.plan, m.n_tiers, [](int, int) { return Begun{}; }, [] {}, [](What, int, int, float, float) {});
  for (int i = threadIdx.x; i < room.n_rows() * dim; i += blockDim.x) {
    const int r = i / dim, j = i % dim;
    room.memory(r)[m.hidden + j] = room.x()[j * ROWS + r] * room.inverse_rms(r, dim).x * a.exact[m.plan_gain + j];
    if (j == 0) room.rows()[r].plan_pos += 1;
  }
  __syncthreads();  // publishes the hidden state and the positions
  if (m.refine < 0) return;
  // What the frame is taken for, now that it has been read.
  each_pair(room, room.inputs(), m.n_bands + dim,
            [&](int r, int j) { return j < m.n_bands ? above_mean(r, j) : room.memory(r)[m.hidden + j - m.n_bands]; });
  __syncthreads();  // publishes bands and hidden state
  room.linear(m.refine, room.inputs(), [&](int j, int r, float low, float high) {
    float* const bands = a.bands + frame_of(r) * m.n_bands + j;
    bands[0] += low;
    if (j + 1 < m.n_bands) bands[1] += high;
  });
  __syncthreads();  // publishes the refined bands
}

/// Where autocorrelations [ROWS][order + 1] lie in scratch: after the `room_for_them` doubles that they are made in, which later hold
/// coefficients.
template <class W, int ROWS>
__device__ double* lags_of(const Room<W, ROWS>& room, int room_for_them, int order) {
  return room.doubles() + max(room_for_them, ROWS * order);
}

/// Coefficients from autocorrelations `lags`, a warp per row, in what they were made in; `done(r, power)` once.
template <class W, int ROWS, class Store, class Done>
__device__ void solve(const Room<W, ROWS>& room, double* lags, int order, Store store, Done done) {
  for (int r = warp(); r < room.n_rows(); r += n_warps()) {
    double* const a = room.doubles() + r * order;
    double power;
    const int found = prediction::levinson(lags + r * (order + 1), a, order, power);
    for (int i = lane(); i < order; i += WARP) store(r, i, i < found ? float(a[i]) : 0.f);
    if (lane() == 0) done(r, power);
  }
}

/// The forecast by the last plan frame, into slot `slot` of the frames.
template <class W, int ROWS>
__device__ void forecast_frame(const Room<W, ROWS>& room, int slot) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  const int order = m.planned_order;
  const prediction::PlanGrid grid(m.n_bands, m.n_bins, a.places, a.doubles + m.grid_numbers);
  const prediction::PlannedSpectrum spectrum(room.doubles(), grid);
  double* const lags = lags_of(room, spectrum.size(m.n_bins, m.n_bands), order);
  for (int r = 0; r < room.n_rows(); ++r) {
    const float* const before = room.memory(r) + m.plan_frames + m.n_bands;
    float* const lines = m.n_heard > 0 ? room.frame(r, slot) + m.frame_lines : nullptr;
    spectrum.make(before, before + m.n_bands, m.deconvolution, lines);
    for (int lag = threadIdx.x; lag <= order; lag += blockDim.x)
      lags[r * (order + 1) + lag] = prediction::with_noise(
          spectrum.autocorrelation(lag) * a.doubles[m.lag_window + lag], lag, PLANNED_WHITE);
    __syncthreads();  // publishes the lags, and the spectrum was read
  }
  solve(
      room, lags, order, [&](int r, int i, float c) { room.frame(r, slot)[m.frame_coefficients + i] = c; },
      [&](int r, double power) {
        const float scale = prediction::log_scale(power);
        float* const frame = room.frame(r, slot);
        frame[0] = scale;
        frame[1] = prediction::residual_rms(scale);
        frame[2] = float(lags[r * (order + 1)]);
      });
  __syncthreads();  // publishes the frame to this block, and the scratch is free
}

/// Frame k of the plan becomes what the wave transformer reads, in slot `slot` of the frames.
template <class W, int ROWS>
__device__ NO_INLINE void prepare_frame(const Room<W, ROWS> room, int k, int slot) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  const int n_bands = m.n_bands;
  const auto bands_of = [&](int r) { return a.bands + (int64_t(room.rows()[r].turn) * a.n_frames + k) * n_bands; };
  for (int i = threadIdx.x; i < room.n_rows() * n_bands; i += blockDim.x) {
    const int r = i / n_bands, j = i % n_bands;
    float* const frames = room.memory(r) + m.plan_frames + j;
    const float older = frames[n_bands], old = frames[2 * n_bands], current = bands_of(r)[j] + a.level;
    frames[0] = older;
    frames[n_bands] = old;
    frames[2 * n_bands] = current;
  }
  __syncthreads();  // publishes the frames
  each_pair(room, room.inputs(), 3 * n_bands, [&](int r, int j) {
    const float* const frames = room.memory(r) + m.plan_frames + j % n_bands;
    const float older = frames[0], old = frames[n_bands], current = frames[2 * n_bands];
    return j < n_bands ? current : j < 2 * n_bands ? 2.f * (current - old) : 2.f * (old - older);
  });
  __syncthreads();  // publishes them as inputs
  room.linear_silu(room.attended(), m.plan_mlp, room.inputs());
  __syncthreads();  // publishes the hidden layer
  room.linear_silu(room.stream(), m.plan_mlp + 1, room.attended());
  const auto into_frame = [&](int id, const auto* in, int place) {
    __syncthreads();  // publishes the inputs
    room.linear(id, in, [&](int j, int r, float low, float high) {
      room.frame(r, slot)[place + j] = low;
      room.frame(r, slot)[place + j + 1] = high;
    });
  };
  for (int tier = 0; tier < m.n_tiers; ++tier) into_frame(m.tiers[tier].plan_in, room.stream(), m.tiers[tier].planned);
  room.linear_silu(room.attended(), m.planned_scales, room.stream());
  into_frame(m.planned_scales + 1, room.attended(), m.frame_scales);
  // The activations were read: their place is scratch now (what sharpening writes before its own first barrier lies elsewhere, so
  // that only plans that are not sharpened need this).
  __syncthreads();  // unseen
  forecast_frame(room, slot);
}

/// Autocorrelations of the windows that end `played` samples after the rows' positions, without their last `past_hop` samples, which
/// need not be known yet. Leaves them in scratch for `renew_past`.
template <class W, int ROWS>
__device__ NO_INLINE double* past_lags(const Room<W, ROWS> room, int64_t played) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  const int order = m.order, len = m.past_window;
  const prediction::Window window(room.doubles(), len, order);
  double* const lags = lags_of(room, window.size(), order);
  for (int r = 0; r < room.n_rows(); ++r) {
    const int64_t first = room.rows()[r].n + played - len;
    for (int i = threadIdx.x; i < prediction::QUAD * window.columns; i += blockDim.x)
      window.at(i) = i < len - m.past_hop
                         ? double(room.memory(r)[m.samples + ((first + i) & (m.n_samples - 1))]) * a.doubles[m.window + i]
                         : 0.0;
    __syncthreads();  // publishes the samples
    window.sum_parts();
    __syncthreads();  // publishes the sums
    for (int lag = threadIdx.x; lag <= order; lag += blockDim.x) lags[r * (order + 1) + lag] = window.total(lag);
  }
  return lags;
}

/// Adds the products with the windows' last `past_hop` samples, and makes coefficients of it.
template <class W, int ROWS>
__device__ NO_INLINE void renew_past(const Room<W, ROWS> room, double* lags, int64_t played) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  const int order = m.order, len = m.past_window, begin = len - m.past_hop, reach = max(0, begin - order);
  const prediction::Window window(room.doubles(), len, order);
  for (int r = 0; r < room.n_rows(); ++r) {
    const int64_t first = room.rows()[r].n + played - len;
    for (int i = reach + threadIdx.x; i < len; i += blockDim.x)
      window.at(i) = double(room.memory(r)[m.samples + ((first + i) & (m.n_samples - 1))]) * a.doubles[m.window + i];
    __syncthreads();  // publishes the samples
    for (int lag = threadIdx.x; lag <= order; lag += blockDim.x) {
      double& sum = lags[r * (order + 1) + lag];
      for (int i = max(begin, lag); i < len; ++i) sum = fma(window.at(i), window.at(i - lag), sum);
      sum = prediction::with_noise(sum, lag, PAST_WHITE);
    }
    __syncthreads();  // publishes the lags, and the samples were read
  }
  solve(
      room, lags, order, [&](int r, int i, float c) { a.past[int64_t(room.rows()[r].stream) * order + i] = c; },
      [](int, double) {});
  __syncthreads();  // publishes the coefficients to this block, and the scratch is free
}

/// The tones of the frame in slot `slot`, which begins `played` samples after the rows' positions.
template <class W, int ROWS>
__device__ NO_INLINE void begin_tones(const Room<W, ROWS> room, int slot, int64_t played) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  const int hop = m.plan_hop;
  const prediction::PlanGrid grid(m.n_bands, m.n_bins, a.places, a.doubles + m.grid_numbers);
  const tones::Past past(room.doubles(), grid, hop, m.plan_window_len, a.doubles + m.plan_window, a.doubles + m.lobe);
  for (int r = 0; r < room.n_rows(); ++r) {
    float* const memory = room.memory(r);
    const int64_t first = room.rows()[r].n + played - m.plan_window_len;
    const auto heard = [&](int i) { return memory[m.heard + int((first + i) & (m.n_heard - 1))]; };
    const int n_tones = past.find_all(heard, room.frame(r, slot) + m.frame_lines);
    past.sing(n_tones);
    for (int t = threadIdx.x; t < hop; t += blockDim.x) {
      memory[m.tones + t] = tones::joined(past.sound(t), memory[m.rest + t], t, hop);
      memory[m.rest + t] = float(past.sound(hop + t));
    }
    __syncthreads();  // publishes the tones to this block, and the scratch is free
  }
}

}  // namespace decode
