// One sample: what the wave transformer is told of its forecasts, its tiers, and the draw from the mixture.
#pragma once
#include "decode_step.cuh"

namespace decode {

/// As in src/codec.rs, src/model/features.rs and src/sampler.rs.
constexpr int N_CODES = 256;
constexpr float PCM_UNIT = 32768.f;
/// In a ring of tokens a token's code lies above its 16 bits.
constexpr int TOKEN_BITS = 16;
constexpr float MU = 255.f, LN_256 = 5.545177444479562f, LN_MOST_STEPS = 11.09037f, PI = 3.14159265358979f;
constexpr float MAX_OFFSET = 4.f, MAX_LOG_SCALE = 2.5f;
constexpr double TAIL = 1e-4, LEAST_BIN = 1e-12;
constexpr float DRIVE_SAMPLES = 256.f, MOST_SQUARE = 1e4f, MOST_DRIVE = 1.5f, LEAST_DRIVE = 0.05f;
/// Of the outermost bins.
constexpr double OUTER_EDGE = 50.0;

__device__ __forceinline__ float compand(float sample) {
  return copysignf(log1pf(MU * fabsf(sample)) / LN_256, sample);
}

/// residual_code of a fine residual.
__device__ __forceinline__ int fine_residual_code(float residual) {
  const float steps = residual * PCM_UNIT;
  const float companded = copysignf(log1pf(fabsf(steps)) / LN_MOST_STEPS, steps);
  // What is no number is the first.
  return int(fmaxf(fminf((companded + 1.f) * (N_CODES / 2), N_CODES - 1.f), 0.f));
}

/// A model's tokens: src/codec.rs.
struct Codec {
  const float* centres;  // [N_CODES]: samples of mu-law's tokens
  const float* edges;    // [N_CODES - 1]: between their bins
  bool pcm;

  __device__ Codec(const DecodeModel& m, const float* exact) : centres(exact + m.centres), edges(exact + m.edges), pcm(m.pcm) {}

  /// The bin of mu-law: the number of edges that are not above the sample; what is no number lies in the middle.
  __device__ int code(float sample) const {
    if (sample != sample) return N_CODES / 2;
    // The logarithm is one off at most; the edges decide.
    int code = int(fminf(fmaxf((compand(sample) + 1.f) * (N_CODES / 2), 0.f), N_CODES - 1.f));
    while (code > 0 && edges[code - 1] > sample) --code;
    while (code < N_CODES - 1 && edges[code] <= sample) ++code;
    return code;
  }
  __device__ int encode(float sample) const {
    if (!pcm) return code(sample);
    const float place = floorf(sample * PCM_UNIT + 0.5f);
    return sample == sample ? int(fminf(fmaxf(place, -PCM_UNIT), PCM_UNIT - 1.f) + PCM_UNIT) : int(PCM_UNIT);
  }
  __device__ float decode(int token) const { return pcm ? (token - PCM_UNIT) / PCM_UNIT : centres[token]; }
  __device__ float companded(int token) const {
    return pcm ? compand(decode(token)) : (token + 0.5f) / (N_CODES / 2) - 1.f;
  }
  /// Edges of a token's bin.
  __device__ float low(int token) const {
    return token == 0 ? -float(OUTER_EDGE) : pcm ? (token - 0.5f - PCM_UNIT) / PCM_UNIT : edges[token - 1];
  }
  __device__ float high(int token) const {
    const int last = pcm ? int(2.f * PCM_UNIT) - 1 : N_CODES - 1;
    return token == last ? float(OUTER_EDGE) : low(token + 1);
  }
  __device__ float bin_width(float sample) const {
    return pcm ? 1.f / PCM_UNIT : (fabsf(sample) + 1.f / MU) * (LN_256 / (N_CODES / 2));
  }
};

__device__ __forceinline__ double log_sigmoid(double x) {
  return x >= 0.0 ? -log1p(exp(-x)) : x - log1p(exp(x));
}

/// Both forecasts of every row's sample in_frame of a frame, a warp each.
template <class W, int ROWS>
__device__ void predict(Room<W, ROWS>& room, int in_frame) {
  const DecodeModel& m = room.m;
  for (int task = warp(); task < 2 * room.n_rows; task += n_warps()) {
    const int r = task / 2, which = task % 2;
    const int order = which ? m.planned_order : m.order, mask = (which ? m.n_left : m.n_recent) - 1;
    const float* const c = which ? room.planned + r * m.planned_order : room.past + r * m.order;
    const float* const ring = which ? room.left + r * m.n_left : room.samples + r * m.n_recent;
    const float tone = which && m.n_heard > 0 ? room.memory(r)[m.tones + in_frame] : 0.f;
    const int latest = int((room.rows[r].n - 1) & mask);
    float sum = 0.f;
    for (int i = lane(); i < order; i += WARP) sum += c[i] * ring[(latest - i) & mask];
    sum = lanes_sum<WARP>(sum);
    if (lane() != 0) continue;
    room.rows[r].forecasts[which] = prediction::held(tone + (sum == sum ? prediction::held(sum) : 0.f));
    if (which) room.rows[r].tone = tone;
  }
}

/// Features of the forecasts (src/model/features.rs) of every row, a thread per forecast.
template <class W, int ROWS>
__device__ void describe(Room<W, ROWS>& room) {
  for (int i = threadIdx.x; i < 2 * room.n_rows; i += blockDim.x) {
    const int r = i / 2, which = i % 2;
    Row& row = room.rows[r];
    const float forecast = row.forecasts[which], companded = compand(forecast), half = N_CODES / 2;
    const float place = fminf(fmaxf((companded + 1.f) * half, 0.f), N_CODES - 0.001f), code = floorf(place);
    const float fraction = place - code;
    const float values[5] = {fraction, sinf(2.f * PI * fraction), companded, 4.f * forecast,
                             logf(fabsf(forecast) + 1e-4f) / 4.f};
    for (int kind = 0; kind < 5; ++kind) room.features[(2 * kind + which) * ROWS + r] = values[kind];
    if (which == 0) {
      row.past_code = int(code);
      room.features[10 * ROWS + r] = row.log_scale / 4.f + 1.f;
      room.features[11 * ROWS + r] = (companded - compand(row.forecasts[1])) * 32.f;
    }
  }
}

/// One step of a tier, at sample in_frame of the frame in `slot`; its caches, and what it hands down, are left behind.
template <class W, int ROWS>
__device__ void step_tier(Room<W, ROWS>& room, int which, int in_frame, int slot) {
  const DecodeArgs& a = room.a;
  const DecodeModel& m = room.m;
  const DecodeTier& tier = m.tiers[which];
  const int width = m.token_width, dim = tier.stack.dim;
  const bool last = which == m.n_tiers - 1;
  const Codec codec(m, a.exact);
  for (int i = threadIdx.x; i < room.n_rows * tier.seen * width; i += blockDim.x) {
    const int r = i % room.n_rows, j = i / room.n_rows;
    const int64_t at = room.rows[r].n - tier.seen + j / width;
    const int coded = room.tokens[r * m.n_tokens + int(at & (m.n_tokens - 1))];
    const int token = coded & ((1 << TOKEN_BITS) - 1), code = coded >> TOKEN_BITS, of = j % width - (width - 2);
    room.wide[j * ROWS + r] = of < 0    ? a.exact[m.code_vectors + code * (width - 2) + j % width]
                              : of == 0 ? codec.companded(token)
                                        : 2.f * codec.decode(token);
  }
  for (int r = threadIdx.x; r < room.n_rows; r += blockDim.x)
    stand(room.rows[r], room.rows[r].n / tier.hop, tier.stack.window);
  // Of the step that the tier above has handed down.
  const int sub_step = which > 0 ? in_frame % m.tiers[which - 1].hop / tier.hop : 0;
  __syncthreads();  // publishes the tokens' features and the positions
  room.linear(tier.input, room.wide, false, [&](int j, int r, float low, float high) {
    const Row& row = room.rows[r];
    if (last) {
      const Slice& s = room.slices[m.feature_in];
      const float* w = static_cast<const float*>(s.weights) + j;
      float of_low = 0.f, of_high = 0.f;
      for (int k = 0; k < N_FEATURES; ++k, w += s.stride) {
        of_low += room.features[k * ROWS + r] * w[0];
        of_high += room.features[k * ROWS + r] * w[1];
      }
      if (s.bias) {
        of_low += s.bias[j];
        of_high += s.bias[j + 1];
      }
      const float* const past_code = a.exact + m.past_code_in + row.past_code * dim + j;
      const float* const residual_code = a.exact + m.residual_code_in + row.residual_code * dim + j;
      low = low + of_low + past_code[0] + residual_code[0];
      high = high + of_high + past_code[1] + residual_code[1];
    }
    const float* const planned = room.frame(r, slot) + tier.planned + j;
    low += planned[0];
    high += planned[1];
    if (which > 0) {
      const DecodeTier& above = m.tiers[which - 1];
      const float* const handed = room.memory(r) + above.handed + sub_step * dim + j;
      low += handed[0];
      high += handed[1];
    }
    room.spread(&room.x[j * ROWS + r], low);
    room.spread(&room.x[(j + 1) * ROWS + r], high);
  });
  GROUP_BARRIER(room.size);  // publishes the residual stream
  room.forward(tier.stack, which);
  if (last) return;
  room.linear(tier.down, room.x, false, [&](int j, int r, float low, float high) {
    room.memory(r)[tier.handed + j] = low;
    room.memory(r)[tier.handed + j + 1] = high;
  });
  GROUP_BARRIER(room.size);  // publishes what is handed down
}

/// The head's outputs: the last tier's, what the features say by themselves, and the planned scales.
template <class W, int ROWS>
__device__ void finish(Room<W, ROWS>& room, int slot, int slice) {
  const DecodeModel& m = room.m;
  float* const first = room.shortcut;
  float* const second = first + room.slices[m.shortcut].stride * ROWS;
  room.linear_silu(first, m.shortcut, room.features);
  __syncthreads();  // publishes the first layer
  room.linear_silu(second, m.shortcut + 1, first);
  __syncthreads();  // publishes the second layer
  const auto whole = [&](int j, int r, float low, float high) {
    room.head[j * ROWS + r] = low;
    room.head[(j + 1) * ROWS + r] = high;
  };
  room.linear(m.head, room.x, true, whole);
  __syncthreads();  // publishes the last tier's outputs, and its sums were read
  room.linear(m.shortcut + 2, second, false, [&](int j, int r, float low, float high) {
    const float of[2] = {low, high};
    for (int i = 0; i < 2; ++i) {
      float& out = room.head[(j + i) * ROWS + r];
      out += of[i];
      if (const int scale = j + i - 2 * m.n_components; scale >= 0)
        out = tanhf(out / m.own_scale) * m.own_scale +
              room.frame(r, slot)[m.frame_scales + slice * m.n_components + scale];
    }
  });
  __syncthreads();  // publishes the head's outputs
}

/// -ln of the mass in a token's bin, of lane k's component; the same in all lanes.
__device__ __forceinline__ float mixture_nll(float log_weight, float mean, float scale, int n, float low, float high) {
  const double a = (double(low) - mean) / scale, b = (double(high) - mean) / scale;
  const double term = log_weight + log_sigmoid(b) + log_sigmoid(-a) + log(-expm1(-fmax(b - a, LEAST_BIN)));
  double top = -INFINITY, sum = 0.0;
  for (int k = 0; k < n; ++k) top = fmax(top, __shfl_sync(ALL_LANES, term, k));
  for (int k = 0; k < n; ++k) sum += exp(__shfl_sync(ALL_LANES, term, k) - top);
  return float(-(top + log(sum)));
}

/// Draws (or takes) sample t of row r and tells the stream of it; a warp, a component per lane. src/sampler.rs.
template <class W, int ROWS>
__device__ void draw(Room<W, ROWS>& room, int r, int t) {
  const DecodeArgs& a = room.a;
  const DecodeModel& m = room.m;
  Row& row = room.rows[r];
  const Codec codec(m, a.exact);
  const int n = m.n_components, k = min(lane(), n - 1), of = k / (n / 2);
  const float* const head = room.head + r;
  float top = -INFINITY, total = 0.f;
  for (int i = 0; i < n; ++i) top = fmaxf(top, head[i * ROWS]);
  for (int i = 0; i < n; ++i) total += expf(head[i * ROWS] - top);
  const float log_weight = head[k * ROWS] - (top + logf(total)), forecast = row.forecasts[of];
  const float unit = 0.5f * expf(row.log_scale) + 0.25f * codec.bin_width(forecast);
  const float mean = forecast + unit * MAX_OFFSET * tanhf(head[(n + k) * ROWS] / MAX_OFFSET);
  const float scale = unit * expf(MAX_LOG_SCALE * tanhf(head[(2 * n + k) * ROWS] / MAX_LOG_SCALE));
  const int64_t place = (int64_t(row.stream) * a.n_frames) * m.plan_hop + t;
  float sample, mean_square = row.mean_square;
  int token;
  if (a.wave_uniforms) {
    const double weight = exp(double(log_weight)) * (of == 0 ? double(a.past_weight) : 1.0);
    double all = 0.0, sum = 0.0;
    for (int i = 0; i < n; ++i) all += __shfl_sync(ALL_LANES, weight, i);
    int chosen = n;
    for (int i = 0; i < n; ++i) {
      sum += __shfl_sync(ALL_LANES, weight, i);
      if (chosen == n && double(row.uniforms[0]) * all < sum) chosen = i;
    }
    chosen = min(chosen, n - 1);
    const double centre = row.forecasts[chosen / (n / 2)];
    const double at = centre + double(a.offset) * (double(__shfl_sync(ALL_LANES, mean, chosen)) - centre);
    const double u = fmin(fmax(double(row.uniforms[1]), TAIL), 1.0 - TAIL);
    const float drawn = float(at + double(__shfl_sync(ALL_LANES, scale, chosen)) * log(u / (1.0 - u)));
    // Drive: holds the power of what is drawn to the plan's.
    const float innovation = drawn - row.forecasts[1], ratio = innovation / row.rms;
    mean_square += (fminf(ratio * ratio, MOST_SQUARE) - mean_square) / DRIVE_SAMPLES;
    const float factor = fminf(fmaxf(1.f / sqrtf(mean_square), LEAST_DRIVE), MOST_DRIVE);
    sample = prediction::held(row.forecasts[1] + innovation * factor * a.grain);
    token = codec.encode(sample);
  } else {
    token = a.tokens[place];
    sample = codec.decode(token);
  }
  const float heard = codec.decode(token);
  const int code = codec.pcm ? codec.code(heard) : token, coded = token | code << TOKEN_BITS;
  if (a.nll) {
    const float nats = mixture_nll(log_weight, mean, scale, n, codec.low(token), codec.high(token));
    if (lane() == 0 && room.rank == 0) a.nll[place] = nats;
  }
  // All lanes have read the row (no emulated schedule shows it: they met in shuffles above, which order no memory).
  __syncwarp();  // unseen
  if (lane() == 0) {
    const int64_t now = row.n;
    room.samples[r * m.n_recent + int(now & (m.n_recent - 1))] = heard;
    room.left[r * m.n_left + int(now & (m.n_left - 1))] = sample - row.tone;
    room.tokens[r * m.n_tokens + int(now & (m.n_tokens - 1))] = coded;
    row.mean_square = mean_square;
    row.residual_code = m.fine_residual ? fine_residual_code(heard - row.forecasts[0])
                                        : (code + N_CODES - row.past_code) % N_CODES;
    row.n = now + 1;
    if (room.rank == 0) {
      float* const memory = room.memory(r);
      memory[m.samples + int(now & (m.n_samples - 1))] = heard;
      memory[m.left + int(now & (m.n_left - 1))] = sample - row.tone;
      if (m.n_heard > 0) memory[m.heard + int(now & (m.n_heard - 1))] = sample;
      a.ring_tokens[int64_t(row.stream) * m.n_tokens + int(now & (m.n_tokens - 1))] = coded;
      if (a.wave_uniforms) a.tokens[place] = token;
    }
  }
}

/// Sample t of all rows, where sample t % plan_hop of the frame in `slot`.
template <class W, int ROWS>
__device__ void step(Room<W, ROWS>& room, int t, int slot) {
  const DecodeModel& m = room.m;
  const DecodeArgs& a = room.a;
  room.alternate(t);
  // Loaded here so that they are there when the draw wants them.
  if (a.wave_uniforms)
    for (int i = threadIdx.x; i < 2 * room.n_rows; i += blockDim.x) {
      Row& row = room.rows[i / 2];
      row.uniforms[i % 2] = a.wave_uniforms[2 * (int64_t(row.stream) * a.n_frames * m.plan_hop + t) + i % 2];
    }
  const int in_frame = t % m.plan_hop;
  predict(room, in_frame);
  __syncthreads();  // publishes the forecasts
  describe(room);  // published by the first barrier of the tiers, of which the last always runs
  for (int tier = 0; tier < m.n_tiers; ++tier)
    if (in_frame % m.tiers[tier].hop == 0) step_tier(room, tier, in_frame, slot);
  room.fresh = false;
  finish(room, slot, in_frame / (m.plan_hop / m.slices));
  for (int r = warp(); r < room.n_rows; r += n_warps()) draw(room, r, t);
  __syncthreads();  // publishes the sample
}

}  // namespace decode
