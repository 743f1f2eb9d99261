// The training step's other operations, each fused, forward and backward: RMSNorm, SwiGLU, SiLU after a bias, cross-entropy, the negative
// log-likelihood of the mixture head (src/model/head.rs), queries and keys made ready for attention, embeddings; and the
// optimizer's step. Elements f32 or (RMSNorm, SwiGLU, cross-entropy, heads, sums) bf16, arithmetic in f32, no atomics.
//
// Geometry: RMSNorm and cross-entropy one warp per row, 4 a block; the gain's gradient blocks of 32 columns by 8 rows over (columns,
// parts of the rows), then column sums, and so a bias's; SwiGLU, SiLU, embeddings and AdamW one thread per output; mixture one thread per sample, its head
// outputs through shared memory; heads one warp per row and head; embeddings' gradient one block per (table, 64 of its
// entries, 64 columns, part of the rows), whose threads each sum their column of these in shared memory, then column sums. Layouts in args.cuh; dynamic shared memory: see src/cuda/launch.
// Oracles: tests/kernels/training.rs.
#include "common.cuh"

namespace training {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr int SUM_ROWS = 8;
constexpr int SUM_THREADS = WARP * SUM_ROWS;
/// NORM_EPS of src/model/block.rs.
constexpr float NORM_EPS = 1e-6f;
constexpr int GATHER_COLUMNS = 64, GATHER_ENTRIES = 64;
/// As in src/sampler.rs and src/model/head.rs.
constexpr int N_FORECASTS = 2;
constexpr float MAX_OFFSET = 4.f, MAX_LOG_SCALE = 2.5f, LEAST_BIN = 1e-6f;
/// Features of half a head that a lane has, at most.
constexpr int HALF_PER_LANE = 2;

// ---- helpers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int warp_row() { return blockIdx.x * WARPS + threadIdx.x / WARP; }
__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }

/// ln sigmoid(x) without overflow on either side.
__device__ __forceinline__ float log_sigmoid(float x) { return fminf(x, 0.f) - log1pf(expf(-fabsf(x))); }

/// Sum of a column over rows threadIdx.y, threadIdx.y + 8, ..., then over the block's 8 rows; valid in its row 0.
/// Shared: one float per thread.
template <class Value>
__device__ float column_sum(int first, int end, Value value) {
  SHARED_MEMORY(float, sums);
  const int column = threadIdx.x % WARP, row = threadIdx.x / WARP;
  float sum = 0.f;
  for (int at = first + row; at < end; at += SUM_ROWS) sum += value(at);
  sums[threadIdx.x] = sum;
  __syncthreads();  // publishes the sums
  if (row == 0)
    for (int other = 1; other < SUM_ROWS; ++other) sum += sums[other * WARP + column];
  return sum;
}

/// One component of the mixture and the bin that it is asked about.
struct Component {
  float offset, log_scale;  // bounded: tanh(x / limit)
  float inverse_scale, unit;
  float low, high;  // the bin's edges in scales from the mean
  float bin;        // their distance: of the edges themselves, for it is small beside them where tokens are fine
  float mass;       // ln of the mass between them

  __device__ Component(const float* head, int k, const MixtureNllArgs& a, int sample) {
    const int forecast = sample * N_FORECASTS + k / (a.components / N_FORECASTS);
    unit = a.units[forecast];
    offset = tanhf(head[a.components + k] / MAX_OFFSET);
    log_scale = tanhf(head[2 * a.components + k] / MAX_LOG_SCALE);
    // First without the forecast, which may lie a million scales from 0 and a few from the bin.
    const float moved = offset * MAX_OFFSET * unit, around = a.forecasts[forecast];
    inverse_scale = expf(-MAX_LOG_SCALE * log_scale) / unit;
    low = (a.low[sample] - around - moved) * inverse_scale;
    high = (a.high[sample] - around - moved) * inverse_scale;
    bin = (a.high[sample] - a.low[sample]) * inverse_scale;
    // ln(sigmoid(high) - sigmoid(low))
    mass = log_sigmoid(high) + log_sigmoid(-low) + logf(-expm1f(-fmaxf(bin, LEAST_BIN)));
  }
};

/// ln sum exp of values that come one by one.
struct LogSumExp {
  float highest = -INFINITY, sum = 0.f;
  __device__ void add(float x) {
    const float before = highest;
    highest = fmaxf(highest, x);
    // Nothing to add to, or nothing to add: what is not finite would make NaN of it.
    sum = (before == -INFINITY ? 0.f : sum * expf(before - highest)) + (x == -INFINITY ? 0.f : expf(x - highest));
  }
  __device__ float value() const { return highest + logf(sum); }
};

/// Copies rows of `width` values between device memory and shared memory, where rows are `stride` apart.
template <bool STORE>
__device__ void copy_rows(float* device, float* rows, int n_rows, int width, int stride) {
  for (int i = threadIdx.x; i < n_rows * width; i += THREADS) {
    float& in_shared = rows[i / width * stride + i % width];
    if (STORE)
      device[i] = in_shared;
    else
      in_shared = device[i];
  }
}

/// Of a vector that a warp has in memory: 1 / its root mean square.
template <class T>
__device__ float of_rms(const T* x, int n) {
  float power = 0.f;
  for (int i = lane(); i < n; i += WARP) power += to_float(x[i]) * to_float(x[i]);
  return 1.f / sqrtf(lanes_sum<WARP>(power) / n + NORM_EPS);
}

// ---- kernels: RMSNorm ----------------------------------------------------------------------------------------------

// The residual stream x is f32; T is what the maps behind the norm read.

/// y = x / rms(x) * gain
template <class T>
__device__ void rms_norm_forward(const RmsNormArgs& a) {
  const int row = warp_row();
  if (row >= a.rows) return;  // the whole warp
  const float* const x = a.x + size_t(row) * a.dim;
  T* const y = static_cast<T*>(a.y) + size_t(row) * a.dim;
  const float inverse_rms = of_rms(x, a.dim);
  for (int i = lane(); i < a.dim; i += WARP) y[i] = from_float<T>(x[i] * inverse_rms * (a.gain ? a.gain[i] : 1.f));
  if (lane() == 0) a.inverse_rms[row] = inverse_rms;
}

/// With n = x / rms(x) and g = d_y * gain: d_x = (g - n * mean(g * n)) / rms(x)
template <class T>
__device__ void rms_norm_backward(const RmsNormArgs& a) {
  const int row = warp_row();
  if (row >= a.rows) return;  // the whole warp
  const float* const x = a.x + size_t(row) * a.dim;
  const T* const d_y = static_cast<const T*>(a.d_y) + size_t(row) * a.dim;
  float* const d_x = a.d_x + size_t(row) * a.dim;
  const float inverse_rms = a.inverse_rms[row];
  auto gradient = [&](int i) { return to_float(d_y[i]) * (a.gain ? a.gain[i] : 1.f); };
  float sum = 0.f;
  for (int i = lane(); i < a.dim; i += WARP) sum += gradient(i) * x[i];
  const float mean = lanes_sum<WARP>(sum) * inverse_rms / a.dim;
  for (int i = lane(); i < a.dim; i += WARP)
    d_x[i] = (gradient(i) - x[i] * inverse_rms * mean) * inverse_rms;
}

/// d_gain = sum over rows of d_y * x / rms(x), for each part of the rows; column_sums adds the parts.
template <class T>
__device__ void rms_norm_backward_gain(const RmsNormArgs& a) {
  const int column = blockIdx.x * WARP + threadIdx.x % WARP, first = blockIdx.y * a.rows_per_part;
  const T* const d_y = static_cast<const T*>(a.d_y);
  const float sum = column_sum(first, min(a.rows, first + a.rows_per_part), [&](int row) {
    const size_t at = size_t(row) * a.dim + column;
    return column < a.dim ? to_float(d_y[at]) * a.x[at] * a.inverse_rms[row] : 0.f;
  });
  if (threadIdx.x < WARP && column < a.dim) a.d_gain_parts[size_t(blockIdx.y) * a.dim + column] = sum;
}

__device__ void column_sums(const ColumnSumsArgs& a) {
  const int column = blockIdx.x * WARP + threadIdx.x % WARP;
  const float sum =
      column_sum(0, a.rows, [&](int row) { return column < a.dim ? a.parts[size_t(row) * a.dim + column] : 0.f; });
  if (threadIdx.x < WARP && column < a.dim) a.sums[column] = sum;
}

// ---- kernels: SwiGLU -----------------------------------------------------------------------------------------------

/// y = silu(gate) * value
template <class T>
__device__ void swiglu_forward(const SwigluArgs& a) {
  const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size_t(a.rows) * a.hidden) return;
  const size_t at = i + i / a.hidden * a.hidden;
  const T* const up = static_cast<const T*>(a.up);
  const float gate = to_float(up[at]), value = to_float(up[at + a.hidden]);
  static_cast<T*>(a.y)[i] = from_float<T>(gate * sigmoid(gate) * value);
}

template <class T>
__device__ void swiglu_backward(const SwigluArgs& a) {
  const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size_t(a.rows) * a.hidden) return;
  const size_t at = i + i / a.hidden * a.hidden;
  const T* const up = static_cast<const T*>(a.up);
  const float gate = to_float(up[at]), value = to_float(up[at + a.hidden]), d_y = to_float(static_cast<const T*>(a.d_y)[i]);
  const float open = sigmoid(gate);
  T* const d_up = static_cast<T*>(a.d_up);
  d_up[at] = from_float<T>(d_y * value * open * (1.f + gate * (1.f - open)));
  d_up[at + a.hidden] = from_float<T>(d_y * gate * open);
}

// ---- kernels: SiLU -------------------------------------------------------------------------------------------------

__device__ void silu_forward(const SiluArgs& a) {
  const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size_t(a.rows) * a.dim) return;
  const float x = a.z[i] + a.bias[i % a.dim];
  a.y[i] = x * sigmoid(x);
}

__device__ void silu_backward(const SiluArgs& a) {
  const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size_t(a.rows) * a.dim) return;
  const float x = a.z[i] + a.bias[i % a.dim], open = sigmoid(x);
  a.d_z[i] = a.d_y[i] * open * (1.f + x * (1.f - open));
}

/// d_bias = sum over rows of d_z, for each part of the rows; column_sums adds the parts.
__device__ void silu_backward_bias(const SiluArgs& a) {
  const int column = blockIdx.x * WARP + threadIdx.x % WARP, first = blockIdx.y * a.rows_per_part;
  const float sum = column_sum(first, min(a.rows, first + a.rows_per_part),
                               [&](int row) { return column < a.dim ? a.d_z[size_t(row) * a.dim + column] : 0.f; });
  if (threadIdx.x < WARP && column < a.dim) a.d_bias_parts[size_t(blockIdx.y) * a.dim + column] = sum;
}

// ---- kernels: cross-entropy ----------------------------------------------------------------------------------------

template <class T>
__device__ void cross_entropy_forward(const CrossEntropyArgs& a) {
  const int row = warp_row();
  if (row >= a.rows) return;  // the whole warp
  const T* const logits = static_cast<const T*>(a.logits) + size_t(row) * a.classes;
  float highest = -INFINITY, sum = 0.f;
  for (int i = lane(); i < a.classes; i += WARP) highest = fmaxf(highest, to_float(logits[i]));
  highest = lanes_max<WARP>(highest);
  for (int i = lane(); i < a.classes; i += WARP) sum += expf(to_float(logits[i]) - highest);
  const float lse = highest + logf(lanes_sum<WARP>(sum));
  if (lane() != 0) return;
  const uint32_t target = a.targets[row];
  a.lse[row] = lse;
  a.nll[row] = target < uint32_t(a.classes) ? lse - to_float(logits[target]) : NAN;
}

/// d_logits = d_nll * (softmax - one-hot)
template <class T>
__device__ void cross_entropy_backward(const CrossEntropyArgs& a) {
  const int row = warp_row();
  if (row >= a.rows) return;  // the whole warp
  const T* const logits = static_cast<const T*>(a.logits) + size_t(row) * a.classes;
  T* const d_logits = static_cast<T*>(a.d_logits) + size_t(row) * a.classes;
  const float lse = a.lse[row], d_nll = a.d_nll[row];
  const uint32_t target = a.targets[row];
  for (int i = lane(); i < a.classes; i += WARP)
    d_logits[i] = from_float<T>(d_nll * (expf(to_float(logits[i]) - lse) - (uint32_t(i) == target ? 1.f : 0.f)));
}

// ---- kernels: mixture of logistics ---------------------------------------------------------------------------------

/// Rows of the head in shared memory have an odd stride: neighbouring threads' values lie in different banks.
__device__ __forceinline__ int head_stride(const MixtureNllArgs& a) { return 3 * a.components | 1; }

/// nll = ln sum exp(weight) - ln sum exp(weight + mass). Shared: the block's head outputs.
__device__ void mixture_nll_forward(const MixtureNllArgs& a) {
  SHARED_MEMORY(float, heads);
  const int first = blockIdx.x * THREADS, width = 3 * a.components, stride = head_stride(a);
  const int n = min(THREADS, a.n - first), sample = first + threadIdx.x;
  copy_rows<false>(const_cast<float*>(a.head) + size_t(first) * width, heads, n, width, stride);
  __syncthreads();  // publishes the head outputs
  if (sample >= a.n) return;
  const float* const head = heads + threadIdx.x * stride;
  LogSumExp weights, terms;
  for (int k = 0; k < a.components; ++k) {
    weights.add(head[k]);
    terms.add(head[k] + Component(head, k, a, sample).mass);
  }
  a.nll[sample] = weights.value() - terms.value();
}

/// With share = softmax(weight + mass): d_weight = softmax(weight) - share, and of mass -share. Shared: as forward, where
/// each thread writes gradients over its own outputs.
__device__ void mixture_nll_backward(const MixtureNllArgs& a) {
  SHARED_MEMORY(float, heads);
  const int first = blockIdx.x * THREADS, width = 3 * a.components, stride = head_stride(a);
  const int n = min(THREADS, a.n - first), sample = first + threadIdx.x;
  copy_rows<false>(const_cast<float*>(a.head) + size_t(first) * width, heads, n, width, stride);
  __syncthreads();  // publishes the head outputs
  if (sample < a.n) {
    float* const head = heads + threadIdx.x * stride;
    LogSumExp weights, terms;
    for (int k = 0; k < a.components; ++k) {
      weights.add(head[k]);
      terms.add(head[k] + Component(head, k, a, sample).mass);
    }
    const float all_weights = weights.value(), all_terms = terms.value(), d_nll = a.d_nll[sample];
    for (int k = 0; k < a.components; ++k) {
      const Component c(head, k, a, sample);
      const float share = expf(head[k] + c.mass - all_terms);
      // What ln P gains by moving an edge up: of the upper one alone, of the lower one alone, of both together.
      const float above = sigmoid(-c.high), below = sigmoid(c.low);
      const float between = c.bin > LEAST_BIN ? 1.f / expm1f(c.bin) : 0.f;
      const float d_mean = share * (above - below) * c.inverse_scale;
      const float d_log_scale = share * (above * c.high - below * c.low + between * c.bin);
      head[k] = d_nll * (expf(head[k] - all_weights) - share);
      head[a.components + k] = d_nll * d_mean * c.unit * (1.f - c.offset * c.offset);
      head[2 * a.components + k] = d_nll * d_log_scale * (1.f - c.log_scale * c.log_scale);
    }
  }
  __syncthreads();  // publishes the gradients
  copy_rows<true>(a.d_head + size_t(first) * width, heads, n, width, stride);
}

// ---- kernels: queries, keys and values -----------------------------------------------------------------------------

/// A row and head of qkv, for a warp.
template <class T>
struct Head {
  const T *q, *k, *v;
  size_t in_qkv, dim;  // where the query begins, and how far key and value lie behind it and each other
  size_t in_heads;     // where it begins in q, k, v
  int position;

  __device__ Head(const SplitHeadsArgs& a, int item) {
    const int row = item / a.n_heads, head = item % a.n_heads;
    dim = size_t(a.n_heads) * a.head_dim;
    in_qkv = row * 3 * dim + head * a.head_dim;
    position = row % a.len;
    in_heads = ((size_t(row / a.len) * a.n_heads + head) * a.len + position) * a.head_dim;
    q = static_cast<const T*>(a.qkv) + in_qkv;
    k = q + dim;
    v = k + dim;
  }
};

/// Cosine and sine of what feature i of the first half and its partner are turned by.
struct Turn {
  float cosine, sine;
  __device__ Turn(const SplitHeadsArgs& a, int position, int i) {
    const float* const turns = a.turns + size_t(position) * a.head_dim;
    cosine = turns[i];
    sine = turns[a.head_dim / 2 + i];
  }
};

template <class T>
__device__ void split_heads_forward(const SplitHeadsArgs& a) {
  const int item = warp_row();
  if (item >= a.rows * a.n_heads) return;  // the whole warp
  const Head<T> from(a, item);
  const int half = a.head_dim / 2;
  const float scale_q = of_rms(from.q, a.head_dim), scale_k = of_rms(from.k, a.head_dim);
  auto rotate = [&](const T* x, float scale, void* to, int i, const Turn& turn) {
    T* const y = static_cast<T*>(to) + from.in_heads;
    const float low = to_float(x[i]) * scale, high = to_float(x[i + half]) * scale;
    y[i] = from_float<T>(low * turn.cosine - high * turn.sine);
    y[i + half] = from_float<T>(low * turn.sine + high * turn.cosine);
  };
  for (int i = lane(); i < half; i += WARP) {
    const Turn turn(a, from.position, i);
    rotate(from.q, scale_q, a.q, i, turn);
    rotate(from.k, scale_k, a.k, i, turn);
  }
  T* const v = static_cast<T*>(a.v) + from.in_heads;
  for (int i = lane(); i < a.head_dim; i += WARP) v[i] = from.v[i];
}

/// With n = x / rms(x) and g = d_y turned back: d_x = (g - n * mean(g * n)) / rms(x)
template <class T>
__device__ void split_heads_backward(const SplitHeadsArgs& a) {
  const int item = warp_row();
  if (item >= a.rows * a.n_heads) return;  // the whole warp
  const Head<T> from(a, item);
  const int half = a.head_dim / 2;
  const T* const inputs[2] = {from.q, from.k};
  const void* const gradients[2] = {a.d_q, a.d_k};
  T* const d_qkv = static_cast<T*>(a.d_qkv) + from.in_qkv;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const T* const x = inputs[part];
    const T* const d_y = static_cast<const T*>(gradients[part]) + from.in_heads;
    T* const d_x = d_qkv + part * from.dim;
    const float scale = of_rms(x, a.head_dim);
    float sum = 0.f, low[HALF_PER_LANE], high[HALF_PER_LANE];
#pragma unroll
    for (int n = 0; n < HALF_PER_LANE; ++n) {
      const int i = lane() + n * WARP;
      if (i >= half) continue;
      const Turn turn(a, from.position, i);
      const float d_low = to_float(d_y[i]), d_high = to_float(d_y[i + half]);
      low[n] = d_low * turn.cosine + d_high * turn.sine;
      high[n] = d_high * turn.cosine - d_low * turn.sine;
      sum += low[n] * to_float(x[i]) + high[n] * to_float(x[i + half]);
    }
    const float mean = lanes_sum<WARP>(sum) * scale / a.head_dim;
#pragma unroll
    for (int n = 0; n < HALF_PER_LANE; ++n) {
      const int i = lane() + n * WARP;
      if (i >= half) continue;
      d_x[i] = from_float<T>((low[n] - to_float(x[i]) * scale * mean) * scale);
      d_x[i + half] = from_float<T>((high[n] - to_float(x[i + half]) * scale * mean) * scale);
    }
  }
  const T* const d_v = static_cast<const T*>(a.d_v) + from.in_heads;
  for (int i = lane(); i < a.head_dim; i += WARP) d_qkv[2 * from.dim + i] = d_v[i];
}

// ---- kernels: embeddings -------------------------------------------------------------------------------------------

/// y = x + the rows of its codes
__device__ void gather_forward(const GatherArgs& a) {
  const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size_t(a.rows) * a.dim) return;
  const uint32_t* const codes = a.codes + i / a.dim * a.n_tables;
  float y = a.x[i];
  for (int t = 0; t < a.n_tables; ++t) y += a.table[size_t(codes[t]) * a.dim + i % a.dim];
  a.y[i] = y;
}

/// The other way for some entries of a table, some columns and a part of the rows. Shared: those columns of these entries. A thread adds
/// to its sums one row after the other, each of which waits for the one before; so a block has few entries, and a multiprocessor many
/// blocks.
__device__ void gather_backward(const GatherArgs& a) {
  constexpr int AHEAD = 8;
  SHARED_MEMORY(float, sums);
  const int groups = (a.entries + GATHER_ENTRIES - 1) / GATHER_ENTRIES, t = blockIdx.x / groups % a.n_tables;
  const int first_entry = int(blockIdx.x % groups) * GATHER_ENTRIES, n_entries = min(GATHER_ENTRIES, a.entries - first_entry);
  const int column = blockIdx.x / groups / a.n_tables * GATHER_COLUMNS + threadIdx.x;
  if (column >= a.dim) return;  // no thread reads another's sums
  float* const mine = sums + threadIdx.x;
  for (int entry = 0; entry < n_entries; ++entry) mine[entry * GATHER_COLUMNS] = 0.f;
  const int first = blockIdx.y * a.rows_per_part, end = min(a.rows, first + a.rows_per_part);
  for (int row = first; row < end; row += AHEAD) {
    int entries[AHEAD];
    float values[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      entries[i] = row + i < end ? int(a.codes[size_t(row + i) * a.n_tables + t]) - t * a.entries - first_entry : -1;
      if (unsigned(entries[i]) < unsigned(n_entries)) values[i] = a.d_y[size_t(row + i) * a.dim + column];
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (unsigned(entries[i]) < unsigned(n_entries)) mine[entries[i] * GATHER_COLUMNS] += values[i];
  }
  float* const part = a.d_table_parts + ((size_t(blockIdx.y) * a.n_tables + t) * a.entries + first_entry) * a.dim + column;
  for (int entry = 0; entry < n_entries; ++entry) part[size_t(entry) * a.dim] = mine[entry * GATHER_COLUMNS];
}

// ---- kernels: sums -------------------------------------------------------------------------------------------------

/// y = x + z
template <class T>
__device__ void add(const AddArgs& a) {
  const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i < size_t(a.n)) a.y[i] = a.x[i] + to_float(static_cast<const T*>(a.z)[i]);
}

// ---- kernels: AdamW ------------------------------------------------------------------------------------------------

/// As `Slot::update` of src/train/optimizer.rs.
__device__ void adamw(const AdamwArgs& a) {
  constexpr float BETA_1 = 0.9f, BETA_2 = 0.95f, EPSILON = 1e-8f;
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= a.n) return;
  const float gradient = a.gradients[i] * a.gradient;
  const float mean = a.means[i] + (1.f - BETA_1) * (gradient - a.means[i]);
  const float square = a.squares[i] + (1.f - BETA_2) * (gradient * gradient - a.squares[i]);
  const float weight = a.weights[i] * a.decay - a.rate * mean / (sqrtf(square * a.square) + EPSILON);
  a.means[i] = mean;
  a.squares[i] = square;
  a.weights[i] = weight;
  a.averages[i] += a.average * (weight - a.averages[i]);
}

// ---- entry points --------------------------------------------------------------------------------------------------

#define ENTRIES(name, T)                                                                                \
  KERNEL(training_rms_norm_forward_##name, RmsNormArgs, THREADS, rms_norm_forward<T>)                   \
  KERNEL(training_rms_norm_backward_##name, RmsNormArgs, THREADS, rms_norm_backward<T>)                 \
  KERNEL(training_rms_norm_backward_gain_##name, RmsNormArgs, SUM_THREADS, rms_norm_backward_gain<T>)   \
  KERNEL(training_split_heads_forward_##name, SplitHeadsArgs, THREADS, split_heads_forward<T>)          \
  KERNEL(training_split_heads_backward_##name, SplitHeadsArgs, THREADS, split_heads_backward<T>)        \
  KERNEL(training_add_##name, AddArgs, THREADS, add<T>)                                                 \
  KERNEL(training_swiglu_forward_##name, SwigluArgs, THREADS, swiglu_forward<T>)                        \
  KERNEL(training_swiglu_backward_##name, SwigluArgs, THREADS, swiglu_backward<T>)                      \
  KERNEL(training_cross_entropy_forward_##name, CrossEntropyArgs, THREADS, cross_entropy_forward<T>)    \
  KERNEL(training_cross_entropy_backward_##name, CrossEntropyArgs, THREADS, cross_entropy_backward<T>)

ENTRIES(f32, float)
ENTRIES(bf16, bf16)
KERNEL(training_silu_forward, SiluArgs, THREADS, silu_forward)
KERNEL(training_silu_backward, SiluArgs, THREADS, silu_backward)
KERNEL(training_silu_backward_bias, SiluArgs, SUM_THREADS, silu_backward_bias)
KERNEL(training_column_sums, ColumnSumsArgs, SUM_THREADS, column_sums)
KERNEL(training_mixture_nll_forward, MixtureNllArgs, THREADS, mixture_nll_forward)
KERNEL(training_mixture_nll_backward, MixtureNllArgs, THREADS, mixture_nll_backward)
KERNEL(training_gather_forward, GatherArgs, THREADS, gather_forward)
KERNEL(training_gather_backward, GatherArgs, GATHER_COLUMNS, gather_backward)
KERNEL(training_adamw, AdamwArgs, THREADS, adamw)

#undef ENTRIES

}  // namespace training
