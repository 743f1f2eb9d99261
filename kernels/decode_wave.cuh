// One sample: what the wave transformer is told of its forecasts, its tiers, and the draw from the mixture.
#pragma once
#include "decode_step.cuh"

namespace decode {

/// As in src/codec.rs, src/model/features.rs and src/sampler.rs.
constexpr float PCM_UNIT = 32768.f;
/// In a ring of tokens a token's code lies above its 16 bits.
constexpr int TOKEN_BITS = 16;
constexpr float MU = 255.f, LN_256 = 5.545177444479562f, LN_MOST_STEPS = 11.09037f, PI = 3.14159265358979f;
constexpr float MAX_OFFSET = 4.f, MAX_LOG_SCALE = 2.5f;
constexpr float TAIL = 1e-4f;
constexpr double LEAST_BIN = 1e-12;
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

  __device__ Codec(const float* tables, bool pcm) : centres(tables), edges(tables + N_CODES), pcm(pcm) {}

  /// The bin of mu-law: the number of edges that are not above the sample; what is no number lies in the middle.
  __device__ int code(float sample) const {
    if (sample != sample) return N_CODES / 2;
    // The logarithm is one off at most; the edges decide.
    int code = int(fminf(fmaxf((compand(sample) + 1.f) * (N_CODES / 2), 0.f), N_CODES - 1.f));
    while (code > 0 && edges[code - 1] > sample) --code;
    while (code < N_CODES - 1 && edges[code] <= sample) ++code;
    return code;
  }
  /// A sample's token, and with it the token's code.
  __device__ int encode(float sample, int& its_code) const {
    const float place = floorf(sample * PCM_UNIT + 0.5f);
    const int step = sample == sample ? int(fminf(fmaxf(place, -PCM_UNIT), PCM_UNIT - 1.f) + PCM_UNIT) : int(PCM_UNIT);
    its_code = code(pcm ? (step - PCM_UNIT) / PCM_UNIT : sample);
    return pcm ? step : its_code;
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

/// All of row r's forecasts after sample `latest` but what that sample adds; a warp.
template <class W, int ROWS>
__device__ __forceinline__ void sum_ahead(const Room<W, ROWS>& room, int r, int64_t latest) {
  const DecodeModel& m = room.m();
  const auto sum_of = [&](const float* c, int order, const float* ring, int places) {
    float sum = 0.f;
#pragma unroll 8
    for (int i = 1 + lane(); i < order; i += WARP) sum = fmaf(c[i], ring[(int(latest) - i) & (places - 1)], sum);
    return sum;
  };
  const float past = sum_of(room.past() + r * m.order, m.order, room.samples() + r * m.n_recent, m.n_recent);
  const float planned = sum_of(room.planned() + r * m.planned_order, m.planned_order, room.left() + r * m.n_left, m.n_left);
  const float sums[2] = {lanes_sum<WARP>(past), lanes_sum<WARP>(planned)};
  if (lane() == 0) {
    room.rows()[r].partial[0] = sums[0];
    room.rows()[r].partial[1] = sums[1];
  }
}

/// Both forecasts of every row's sample, the `since`th since there are coefficients, and their features (src/model/features.rs), a
/// warp per row.
template <class W, int ROWS>
__device__ __forceinline__ void predict(const Room<W, ROWS>& room, int since) {
  const DecodeModel& m = room.m();
  for (int r = warp(); r < room.n_rows(); r += n_warps()) {
    Row& row = room.rows()[r];
    const int latest = int(row.n - 1);
    const auto with_latest = [](float partial, float c, float x) { return fmaf(c, x, partial); };
    const float sums[2] = {
        with_latest(row.partial[0], room.past()[r * m.order], room.samples()[r * m.n_recent + (latest & (m.n_recent - 1))]),
        with_latest(row.partial[1], room.planned()[r * m.planned_order], room.left()[r * m.n_left + (latest & (m.n_left - 1))])};
    const float tone = m.n_heard > 0 ? room.tones()[r * m.past_hop + since] : 0.f;
    const auto of = [&](float sum, float base, float most) { return prediction::held(base + (sum == sum ? sum : 0.f), most); };
    const float past = of(sums[0], 0.f, 1.f), expected = of(sums[1], tone, prediction::MOST_SAMPLE);
    const float planned = prediction::held(expected);
    // Two lanes for each kind of feature: of the past's forecast and the plan's.
    const int kind = lane() / 2;
    const float forecast = lane() % 2 ? planned : past, companded = compand(forecast), half = N_CODES / 2;
    const float place = fminf(fmaxf((companded + 1.f) * half, 0.f), N_CODES - 0.001f), code = floorf(place);
    const float fraction = place - code;
    const float apart = (__shfl_xor_sync(ALL_LANES, companded, 1) - companded) * 32.f;
    const float mine = kind == 0   ? fraction
                       : kind == 1 ? __sinf(2.f * PI * fraction)
                       : kind == 2 ? companded
                       : kind == 3 ? 4.f * forecast
                       : kind == 4 ? __logf(fabsf(forecast) + 1e-4f) / 4.f
                       : lane() % 2 ? apart
                                   : row.log_scale / 4.f + 1.f;
    const float other = __shfl_xor_sync(ALL_LANES, mine, 1);
    if (kind <= 5 && lane() % 2 == 0) room.put(room.features(), 2 * kind, r, mine, other);
    if (lane() > 0) continue;
    row.forecasts[0] = past;
    row.forecasts[1] = expected;
    row.tone = tone;
    row.past_code = int(code);
  }
}

/// What a tier's step reads: the features of the last tokens, and where the rows stand. `busy` warps have other work.
template <class W, int ROWS>
__device__ __forceinline__ void gather(const Room<W, ROWS>& room, int which, int busy) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  const DecodeTier& tier = m.tiers[which];
  const int width = m.token_width;
  const Codec codec(room.tables(), m.pcm);
  int thread = int(threadIdx.x) - busy * WARP;
  if (thread < 0) thread += blockDim.x;
  const int n_in = tier.seen * width;
  const auto feature = [&](int r, int j) {
    const int of_token = j / width, of = j - of_token * width, value = of - (width - 2);
    const unsigned at = unsigned(room.rows()[r].n) - tier.seen + of_token;
    const int coded = room.tokens()[r * m.n_tokens + (at & (m.n_tokens - 1))];
    const int token = coded & ((1 << TOKEN_BITS) - 1), code = coded >> TOKEN_BITS;
    return value < 0    ? a.exact[m.code_vectors + code * (width - 2) + of]
           : value == 0 ? codec.companded(token)
                        : 2.f * codec.decode(token);
  };
  for (int i = thread; i < ROWS * ((n_in + 1) / 2); i += blockDim.x) {
    const int r = i % ROWS, j = i / ROWS * 2;
    if (r < room.n_rows()) room.put(room.inputs(), j, r, feature(r, j), j + 1 < n_in ? feature(r, j + 1) : 0.f);
  }
  if (const int r = int(blockDim.x) - 1 - int(threadIdx.x); r < room.n_rows()) room.rows()[r].at[which].go_on(tier.stack.window);
}

/// What follows from where a sample is in its frame; one thread.
template <class W, int ROWS>
__device__ __forceinline__ void look_up(const Room<W, ROWS>& room, int in_frame) {
  const DecodeModel& m = room.m();
  Block& block = room.block();
  int first = 0;
  while (in_frame % m.tiers[first].hop != 0) ++first;  // the last one's is 1
  block.first = first;
  block.slice = in_frame / (m.plan_hop / m.slices);
  for (int tier = first; tier < m.n_tiers; ++tier)
    block.sub[tier] = tier > 0 ? in_frame % m.tiers[tier - 1].hop / m.tiers[tier].hop : 0;
}

/// One step of a tier, of the frame in `slot`, after `gather` and a barrier; its caches, and what it hands down,
/// or the head's outputs, are left behind, for a barrier to publish.
template <class W, int ROWS>
__device__ __forceinline__ void step_tier(const Room<W, ROWS>& room, Work<W, ROWS>& work, int which, int slot) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  const DecodeTier& tier = m.tiers[which];
  const int dim = tier.stack.dim;
  const bool last = which == m.n_tiers - 1;
  const auto from_elsewhere = [&](int j, int r) {
    const auto pair = [](const float* from) { return float2{from[0], from[1]}; };
    Begun begun = {{pair(room.frame(r, slot) + tier.planned + j)}};
    if (which > 0) begun.of[1] = pair(room.memory(r) + m.tiers[which - 1].handed + room.block().sub[which] * dim + j);
    if (last) {
      begun.of[2] = pair(a.exact + m.past_code_in + room.rows()[r].past_code * dim + j);
      begun.of[3] = pair(a.exact + m.residual_code_in + room.rows()[r].residual_code * dim + j);
    }
    return begun;
  };
  const auto beside = [&] {
    if (!last) return;
    for (int r = n_warps() - 1 - warp(); r < room.n_rows(); r += n_warps()) sum_ahead(room, r, room.rows()[r].n);
  };
  forward(room, work, tier.stack, which, from_elsewhere, beside, [&](What what, int j, int r, float low, float high) {
    if (what == FIRST || what == SECOND) {
      room.put(what == FIRST ? room.first() : room.second(), j, r, silu(low), silu(high));
    } else {
      const bool down = what == AFTER && !last;
      float* const to = down ? room.memory(r) + tier.handed + j : room.head() + (j + (what == DIRECT ? 3 * m.n_components : 0)) * ROWS + r;
      to[0] = low;
      to[down ? 1 : ROWS] = high;
    }
  });
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

/// Draws (or takes) sample t of row r, in the `slice`th part of its frame, and tells the stream of it; a warp, a component per lane.
/// src/sampler.rs.
template <class W, int ROWS>
__device__ __forceinline__ void draw(const Room<W, ROWS>& room, int r, int t, int slice) {
  const DecodeArgs& a = room.a();
  const DecodeModel& m = room.m();
  Row& row = room.rows()[r];
  const Codec codec(room.tables(), m.pcm);
  const int n = m.n_components, k = min(lane(), n - 1), of = k / (n / 2);
  const auto head = [&](int i) { return room.head()[i * ROWS + r] + room.head()[(3 * n + i) * ROWS + r]; };
  const float mine = lane() < n ? head(k) : -INFINITY, top = lanes_max<WARP>(mine), forecast = prediction::held(row.forecasts[of]);
  const auto bounded = [](float x) { return 1.f - __fdividef(2.f, __fadd_rn(1.f, __expf(2.f * x))); };  // tanh
  const float unit = 0.5f * __expf(row.log_scale) + 0.25f * codec.bin_width(forecast);
  const float mean = forecast + unit * MAX_OFFSET * bounded(head(n + k) / MAX_OFFSET);
  const float log_scale = bounded(head(2 * n + k) / m.own_scale) * m.own_scale + room.scales()[(r * m.slices + slice) * n + k];
  const float scale = unit * __expf(MAX_LOG_SCALE * bounded(log_scale / MAX_LOG_SCALE));
  const int64_t place = (int64_t(row.turn) * a.n_frames) * m.plan_hop + t;
  float sample, mean_square = row.mean_square;
  if (a.wave_uniforms) {
    const float weight = __expf(mine - top) * (of == 0 ? a.past_weight : 1.f);
    float sum = weight;  // of the components up to this one
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
      const float before = __shfl_sync(ALL_LANES, sum, max(lane() - distance, 0));
      if (lane() >= distance) sum += before;
    }
    const float all = __shfl_sync(ALL_LANES, sum, n - 1);
    // The first component that reaches it.
    const int chosen = n - 1 - int(lanes_max<WARP>(lane() < n && row.uniform * all < sum ? float(n - 1 - lane()) : 0.f));
    const float centre = prediction::held(row.forecasts[chosen / (n / 2)]);
    const float at = fmaf(a.offset, __shfl_sync(ALL_LANES, mean, chosen) - centre, centre);
    const float drawn = fmaf(__shfl_sync(ALL_LANES, scale, chosen), row.logit, at);
    // Drive: holds the power of what is drawn to the plan's.
    const float innovation = drawn - prediction::held(row.forecasts[1]), ratio = innovation / row.rms;
    mean_square += (fminf(ratio * ratio, MOST_SQUARE) - mean_square) / DRIVE_SAMPLES;
    const float factor = fminf(fmaxf(rsqrtf(mean_square), LEAST_DRIVE), MOST_DRIVE);
    sample = prediction::held(row.forecasts[1] + innovation * factor * a.grain, prediction::MOST_SAMPLE);
  } else {
    sample = codec.decode(a.tokens[place]);
  }
  int code;
  const int token = codec.encode(sample, code), coded = token | code << TOKEN_BITS;
  const float heard = codec.decode(token);
  if (a.nll) {
    const float log_weight = mine - (top + logf(lanes_sum<WARP>(__expf(mine - top))));
    const float nats = mixture_nll(log_weight, mean, scale, n, codec.low(token), codec.high(token));
    if (lane() == 0 && room.rank() == 0) a.nll[place] = nats;
  }
  // All lanes have read the row (no emulated schedule shows it: they met in shuffles above, which order no memory).
  __syncwarp();  // unseen
  if (lane() == 0) {
    const int64_t now = row.n;
    room.samples()[r * m.n_recent + int(now & (m.n_recent - 1))] = heard;
    room.left()[r * m.n_left + int(now & (m.n_left - 1))] = sample - row.tone;
    room.tokens()[r * m.n_tokens + int(now & (m.n_tokens - 1))] = coded;
    row.mean_square = mean_square;
    row.residual_code = m.fine_residual ? fine_residual_code(heard - row.forecasts[0])
                                        : (code + N_CODES - row.past_code) % N_CODES;
    row.n = now + 1;
    if (room.rank() == 0) {
      float* const memory = room.memory(r);
      memory[m.samples + int(now & (m.n_samples - 1))] = heard;
      memory[m.left + int(now & (m.n_left - 1))] = sample - row.tone;
      if (m.n_heard > 0) memory[m.heard + int(now & (m.n_heard - 1))] = sample;
      a.ring_tokens[int64_t(row.stream) * m.n_tokens + int(now & (m.n_tokens - 1))] = coded;
      if (a.wave_uniforms) a.tokens[place] = token;
    }
  }
}

/// Sample t of all rows, sample in_frame of the frame in `slot`, the `since`th since there are coefficients.
template <class W, int ROWS>
__device__ __forceinline__ void step(int t, int in_frame, int since, int slot) {
  const Room<W, ROWS> room = {t % 2};
  const DecodeModel& m = room.m();
  const DecodeArgs& a = room.a();
  // What a row needs for its draw, asked for now.
  const int uniforms_of = int(blockDim.x) - 1 - int(threadIdx.x);
  const bool draws = a.wave_uniforms && uniforms_of < room.n_rows();
  float uniforms[2] = {};
  if (draws) {
    const float* const from = a.wave_uniforms + 2 * (int64_t(room.rows()[uniforms_of].turn) * a.n_frames * m.plan_hop + t);
    uniforms[0] = from[0];
    uniforms[1] = from[1];
  }
  const int first = room.block().first;
#pragma unroll 1
  for (int tier = first; tier < m.n_tiers; ++tier) {
    Work<W, ROWS> work;
    work.begin(room, m.tiers[tier].first_map);
    // Forecasts, tokens and places are the work of different warps where there are enough.
    gather(room, tier, tier == first ? min(room.n_rows(), n_warps() - 1) : 0);
    if (tier == first) {
      predict(room, since);
      __syncthreads();  // publishes forecasts, tokens' features, positions
    } else {
      GROUP_BARRIER(room.size());  // publishes what is handed down, tokens' features, positions
    }
    step_tier(room, work, tier, slot);
  }
  if (draws) {
    const float u = fminf(fmaxf(uniforms[1], TAIL), 1.f - TAIL);
    room.rows()[uniforms_of].uniform = uniforms[0];
    room.rows()[uniforms_of].logit = logf(u) - log1pf(-u);
  }
  const int slice = room.block().slice;
  __syncthreads();  // publishes the head's outputs
  if (threadIdx.x == blockDim.x - 1) {
    room.block().fresh = false;
    if (in_frame + 1 < m.plan_hop) look_up(room, in_frame + 1);
  }
  for (int r = warp(); r < room.n_rows(); r += n_warps()) draw(room, r, t, slice);
  __syncthreads();  // publishes the sample
}

}  // namespace decode
