// What the parts of decode_persistent.cu share: a block's shared memory, linear maps and transformer blocks of one position of
// ROWS streams, divided over a group of thread blocks.
//
// Activations lie in shared memory as [feature][ROWS], a copy in every block of the group; whoever computes one writes it
// into all copies. Every sum has one order, whatever ROWS, the group and the other rows are, so a stream plays the same alone.
#pragma once
#include "linear_prediction.cuh"

namespace decode {

/// Inputs that one thread sums, and of how many it has the weights on their way at a time.
constexpr int CHUNK = 32;
constexpr int LOADED = 16;
/// Positions of a window that one warp attends to.
constexpr int PART = WARP;
/// Positions whose angles are kept (ROPE_LOW of src/engine/cpu/stack.rs), a power of two.
constexpr int ANGLES = 64;
constexpr int N_FEATURES = 12;
/// NORM_EPS of src/model/block.rs.
constexpr float NORM_EPS = 1e-6f;

/// A block's share of a linear map.
struct Slice {
  const void* weights;  // [n_in, stride], the first output's
  const float* bias;    // of the first output, or null
  int n_in, stride;
  int first, count;  // outputs
  int exact;
};
static_assert(sizeof(Slice) == 40, "Slice differs from src/cuda/launch");

/// What a block knows of a stream.
struct Row {
  int64_t n;         // samples so far
  int64_t plan_pos;  // plan frames so far
  int64_t pos;       // of the stack that runs; what follows from it is told by `stand`
  int slot, filled;  // its place in the caches' rings, and how many of theirs are taken with it
  float mean_square, scale;
  float log_scale, rms;  // of the frame
  float forecasts[2], uniforms[2];
  int stream, residual_code, past_code;
  float tone;  // in the sample
};
static_assert(sizeof(Row) == 80, "Row differs from src/cuda/launch");

/// The row comes to a position of a stack. One thread: whole numbers of 64 bits are divided here, once.
__device__ __forceinline__ void stand(Row& row, int64_t pos, int window) {
  row.pos = pos;
  row.slot = int(pos % window);
  row.filled = int(min(pos + 1, int64_t(window)));
}

__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }
__device__ __forceinline__ int n_warps() { return blockDim.x / WARP; }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

__device__ __forceinline__ float2 load_pair(const float* w) { return *reinterpret_cast<const float2*>(w); }
__device__ __forceinline__ float2 load_pair(const bf16* w) {
#ifdef __CUDACC__
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(w));
#else
  return {to_float(w[0]), to_float(w[1])};
#endif
}

/// A feature of every row.
template <int ROWS>
__device__ __forceinline__ void load_rows(const float* in, float (&values)[ROWS]) {
  if constexpr (ROWS % 4 == 0) {
#pragma unroll
    for (int r = 0; r < ROWS; r += 4) {
      const float4 four = *reinterpret_cast<const float4*>(in + r);
      values[r] = four.x, values[r + 1] = four.y, values[r + 2] = four.z, values[r + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) values[r] = in[r];
  }
}

/// Two neighbouring outputs of `n` inputs of every row from `begin` on, into the thread's place of scratch. No part of its callers'
/// code: it is most of it.
template <class T, int ROWS>
__device__ NO_INLINE void sum_chunk(const Slice& s, int column, const float* in, int begin, int n, float* scratch) {
  const T* w = static_cast<const T*>(s.weights) + int64_t(begin) * s.stride + column;
  in += begin * ROWS;
  float sums[2][ROWS] = {};
  const auto add = [&](float2 pair) {
    float values[ROWS];
    load_rows(in, values);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[0][r] += pair.x * values[r];
      sums[1][r] += pair.y * values[r];
    }
    in += ROWS;
  };
  for (; n >= LOADED; n -= LOADED) {
    float2 pairs[LOADED];
#pragma unroll
    for (int k = 0; k < LOADED; ++k, w += s.stride) pairs[k] = load_pair(w);
#pragma unroll
    for (int k = 0; k < LOADED; ++k) add(pairs[k]);
  }
  for (; n > 0; --n, w += s.stride) add(load_pair(w));
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    scratch[r * blockDim.x + threadIdx.x] = sums[0][r];
    scratch[(ROWS + r) * blockDim.x + threadIdx.x] = sums[1][r];
  }
}

/// 1 / root mean square of every row of x [n][ROWS], a warp each, into the rows.
template <int ROWS>
__device__ NO_INLINE void measure(const float* x, int n, Row* rows, int n_rows) {
  for (int r = warp(); r < n_rows; r += n_warps()) {
    float power = 0.f;
    for (int k = lane(); k < n; k += WARP) power += x[k * ROWS + r] * x[k * ROWS + r];
    power = lanes_sum<WARP>(power);
    if (lane() == 0) rows[r].scale = 1.f / sqrtf(power / n + NORM_EPS);
  }
}

/// A block, its role and its shared memory.
template <class W, int ROWS>
struct Room {
  const DecodeArgs& a;
  const DecodeModel& m;
  Slice* slices;
  Row* rows;
  float *samples, *left;       // rings [ROWS][n_recent], [ROWS][n_left]
  int32_t* tokens;             // ring [ROWS][n_tokens]
  float *past, *planned;       // coefficients [ROWS][order], the latest sample's first
  float* features;             // [N_FEATURES][ROWS]
  float* head;                 // [3 * n_components][ROWS]
  float* shortcut;             // two of [shortcut width][ROWS]
  float *high, *angles;        // [stacks][ROWS][angle_width], [ROWS][angle_width]
  float *x, *wide, *attended, *scratch;
  int scratch_floats;
  int rank, size;  // in the group
  int n_rows;
  bool fresh;  // no angles yet

  template <class T>
  __device__ static T* at(const DecodeArgs& a, int region) {
    SHARED_MEMORY(char, memory);
    return reinterpret_cast<T*>(memory + a.at[region]);
  }

  __device__ Room(const DecodeArgs& a, int rank, int size, bool plays)
      : a(a),
        m(*at<DecodeModel>(a, DECODE_MODEL)),
        slices(at<Slice>(a, DECODE_SLICES)),
        rows(at<Row>(a, DECODE_ROWS)),
        samples(at<float>(a, DECODE_SAMPLES)),
        left(at<float>(a, DECODE_LEFT)),
        tokens(at<int32_t>(a, DECODE_TOKENS)),
        past(at<float>(a, DECODE_PAST)),
        planned(at<float>(a, DECODE_PLANNED)),
        features(at<float>(a, DECODE_FEATURES)),
        head(at<float>(a, DECODE_HEAD)),
        shortcut(at<float>(a, DECODE_SHORTCUT)),
        high(at<float>(a, DECODE_HIGH)),
        angles(at<float>(a, DECODE_ANGLES)),
        x(at<float>(a, DECODE_X)),
        wide(at<float>(a, DECODE_WIDE)),
        attended(at<float>(a, DECODE_ATTENDED)),
        scratch(at<float>(a, DECODE_SCRATCH)),
        scratch_floats(a.scratch[plays ? 0 : 1]),
        rank(rank),
        size(size),
        n_rows(0),
        fresh(true) {}

  /// Scratch as doubles: everything from the activations on.
  __device__ double* doubles() const { return at<double>(a, DECODE_X); }
  __device__ float* memory(int r) const { return a.memory + int64_t(rows[r].stream) * m.memory_stride; }
  __device__ float* frame(int r, int slot) const {
    return a.frames + (int64_t(rows[r].stream) * 2 + slot) * m.frame_stride;
  }

  /// The residual stream changes places from sample to sample: a block may be a sample ahead of another that still reads its own.
  __device__ void alternate(int t) {
    x = at<float>(a, DECODE_X) + t % 2 * ((a.at[DECODE_WIDE] - a.at[DECODE_X]) / int(2 * sizeof(float)));
  }

  /// Writes an activation into all copies.
  __device__ void spread(float* to, float value) const {
    if (size == 1)
      *to = value;
    else
      for (int other = 0; other < size; ++other) *peer(to, other) = value;
  }

  /// Copies the model and the shares of its maps. `divided`: this block is one of a group. A barrier after it is the caller's.
  __device__ void open(bool divided) {
    int32_t* const to = reinterpret_cast<int32_t*>(at<DecodeModel>(a, DECODE_MODEL));
    for (int i = threadIdx.x; i < int(sizeof(DecodeModel) / 4); i += blockDim.x)
      to[i] = reinterpret_cast<const int32_t*>(a.model)[i];
    __syncthreads();  // publishes the model
    for (int id = threadIdx.x; id < m.n_linears; id += blockDim.x) {
      const DecodeLinear l = a.linears[id];
      const int stride = (l.n_out + 1) / 2 * 2, pairs = stride / 2;
      const int parts = divided && !l.whole ? size : 1, share = (pairs + parts - 1) / parts;
      const int first = parts == 1 ? 0 : min(2 * rank * share, stride), end = min(first + 2 * share, stride);
      Slice& s = slices[id];
      const int64_t offset = l.weights + first;
      s.weights = l.exact ? static_cast<const void*>(a.exact + offset)
                          : static_cast<const void*>(static_cast<const W*>(a.weights) + offset);
      s.bias = l.bias < 0 ? nullptr : a.exact + l.bias + first;
      s.n_in = l.n_in;
      s.stride = stride;
      s.first = first;
      s.count = end - first;
      s.exact = l.exact;
    }
    __syncthreads();  // publishes the shares
    if (!divided) return;
    for (int id = 0; id < m.n_linears; ++id) {
      const int place = a.linears[id].resident;
      if (place < 0) continue;
      const Slice s = slices[id];
      char* const room = at<char>(a, DECODE_RESIDENT) + place;
      for (int i = threadIdx.x; i < s.n_in * s.count; i += blockDim.x) {
        const int from = i / s.count * s.stride + i % s.count;
        if (s.exact)
          reinterpret_cast<float*>(room)[i] = static_cast<const float*>(s.weights)[from];
        else
          reinterpret_cast<W*>(room)[i] = static_cast<const W*>(s.weights)[from];
      }
    }
    __syncthreads();  // the shares were read, and publishes the copies
    for (int id = threadIdx.x; id < m.n_linears; id += blockDim.x)
      if (const int place = a.linears[id].resident; place >= 0) {
        slices[id].weights = at<char>(a, DECODE_RESIDENT) + place;
        slices[id].stride = slices[id].count;
      }
  }

  /// y = x W + b, where x [n_in][ROWS] is divided by its root mean square first if it is to be normalised. `done(j, r, y_j, y_j+1)`
  /// gets the outputs in pairs. A barrier before the next map is the caller's.
  template <class Done>
  __device__ void linear(int id, const float* in, bool normalize, Done done) {
    const Slice s = slices[id];
    if (normalize) measure<ROWS>(in, s.n_in, rows, n_rows);
    const int threads = blockDim.x, pairs = s.count / 2;
    const int length = max(CHUNK, (s.n_in + threads - 1) / threads), chunks = (s.n_in + length - 1) / length;
    const int tile = max(1, min(threads / chunks, pairs));
    for (int first = 0; first < pairs; first += tile) {
      const int chunk = threadIdx.x / tile, pair = first + threadIdx.x % tile;
      if (chunk < chunks && pair < pairs) {
        const int begin = chunk * length, n = min(length, s.n_in - begin);
        if (s.exact)
          sum_chunk<float, ROWS>(s, 2 * pair, in, begin, n, scratch);
        else
          sum_chunk<W, ROWS>(s, 2 * pair, in, begin, n, scratch);
      }
      __syncthreads();  // publishes the chunks' sums
      const int n = min(tile, pairs - first);
      for (int i = threadIdx.x; i < n * n_rows; i += threads) {
        const int r = i / n, pair = i % n;
        float low = 0.f, high = 0.f;
#pragma unroll 4
        for (int c = 0; c < chunks; ++c) {
          low += scratch[r * threads + c * tile + pair];
          high += scratch[(ROWS + r) * threads + c * tile + pair];
        }
        if (normalize) {
          low *= rows[r].scale;
          high *= rows[r].scale;
        }
        const int j = 2 * (first + pair);
        if (s.bias) {
          low += s.bias[j];
          high += s.bias[j + 1];
        }
        done(s.first + j, r, low, high);
      }
      if (first + tile < pairs) __syncthreads();  // the chunks' sums were read
    }
  }

  /// A map whose outputs become activations `to`.
  __device__ void linear_to(float* to, int id, const float* in, bool normalize) {
    linear(id, in, normalize, [&](int j, int r, float low, float high) {
      spread(&to[j * ROWS + r], low);
      spread(&to[(j + 1) * ROWS + r], high);
    });
  }

  /// silu(x W + b), computed whole by every block.
  __device__ void linear_silu(float* to, int id, const float* in) {
    linear(id, in, false, [&](int j, int r, float low, float high) {
      to[j * ROWS + r] = silu(low);
      to[(j + 1) * ROWS + r] = silu(high);
    });
  }

  /// A map whose outputs are added to the residual stream.
  __device__ void linear_add(int id, const float* in) {
    linear(id, in, false, [&](int j, int r, float low, float high) {
      spread(&x[j * ROWS + r], x[j * ROWS + r] + low);
      spread(&x[(j + 1) * ROWS + r], x[(j + 1) * ROWS + r] + high);
    });
  }

  /// Cosines and sines at the rows' positions: those of the multiple of ANGLES below, reduced in f64, turned on by the rest.
  __device__ void turn(const DecodeStack& stack, int which) {
    const int head_dim = stack.dim / stack.n_heads, half = head_dim / 2;
    const float* const low = a.exact + stack.angles;
    for (int i = threadIdx.x; i < n_rows * half; i += blockDim.x) {
      const int r = i / half, f = i % half;
      const int64_t pos = rows[r].pos;
      const int rest = int(pos & (ANGLES - 1));
      float* const base = high + (which * ROWS + r) * m.angle_width + f;
      // Each thread keeps its own.
      if (fresh || rest == 0) {
        const double angle = double(pos - rest) * a.doubles[stack.frequencies + f];
        base[0] = float(cos(angle));
        base[half] = float(sin(angle));
      }
      const float cos_a = base[0], sin_a = base[half];
      const float cos_b = low[rest * head_dim + f], sin_b = low[rest * head_dim + half + f];
      float* const out = angles + r * m.angle_width + f;
      out[0] = cos_a * cos_b - sin_a * sin_b;
      out[half] = sin_a * cos_b + cos_a * sin_b;
    }
  }

  /// A row's cache of the block of a stack whose caches begin at `cache`: those of all streams lie together, so that a fine tier's
  /// are few pages.
  __device__ float* cached(const DecodeStack& stack, int64_t cache, int r) const {
    return a.caches + cache * a.streams + int64_t(rows[r].stream) * (2 * stack.dim * stack.window);
  }

  /// Queries and keys of this block's heads normalised and rotated, keys and values into the caches.
  __device__ void place(const DecodeStack& stack, int64_t cache) {
    const int head_dim = stack.dim / stack.n_heads, half = head_dim / 2;
    const int heads = (stack.n_heads - rank + size - 1) / size;
    for (int task = warp(); task < n_rows * heads * 2; task += n_warps()) {
      const bool is_key = task % 2;
      const int h = rank + task / 2 % heads * size, r = task / 2 / heads;
      float* const part = wide + (is_key ? stack.dim + h * head_dim : h * head_dim) * ROWS + r;
      const float* const turned = angles + r * m.angle_width;
      float power = 0.f;
      for (int i = lane(); i < head_dim; i += WARP) power += part[i * ROWS] * part[i * ROWS];
      power = lanes_sum<WARP>(power);
      const float scale = (is_key ? 1.f : 1.f / sqrtf(float(head_dim))) / sqrtf(power / head_dim + NORM_EPS);
      float* const mine = cached(stack, cache, r);
      const int slot = rows[r].slot;
      float* const key = mine + h * head_dim * stack.window + slot;
      float* const values = mine + int64_t(stack.dim) * stack.window + (h * stack.window + slot) * head_dim;
      for (int i = lane(); i < half; i += WARP) {
        const float cosine = turned[i], sine = turned[half + i];
        const float low = part[i * ROWS] * scale, high = part[(half + i) * ROWS] * scale;
        const float new_low = low * cosine - high * sine, new_high = low * sine + high * cosine;
        if (is_key) {
          key[i * stack.window] = new_low;
          key[(half + i) * stack.window] = new_high;
        } else {
          part[i * ROWS] = new_low;
          part[(half + i) * ROWS] = new_high;
        }
      }
      if (is_key)
        for (int i = lane(); i < head_dim; i += WARP) values[i] = wide[(2 * stack.dim + h * head_dim + i) * ROWS + r];
    }
  }

  /// Softmax attention of this block's heads over the caches, a warp per PART positions; `attended` in all copies.
  __device__ void attend(const DecodeStack& stack, int64_t cache) {
    const int head_dim = stack.dim / stack.n_heads, window = stack.window;
    const int heads = (stack.n_heads - rank + size - 1) / size, parts = (window + PART - 1) / PART;
    // Of each part: greatest score, sum of exponentials, sum of values.
    const int width = head_dim + 2;
    const int at_once = heads == 0 ? n_rows : min(n_rows, scratch_floats / (heads * parts * width));
    for (int first = 0; first < n_rows; first += at_once) {
      const int n = min(at_once, n_rows - first);
      for (int task = warp(); task < n * heads * parts; task += n_warps()) {
        const int part = task % parts, head = task / parts % heads, r = first + task / parts / heads;
        const int h = rank + head * size, slot = part * PART + lane();
        const int filled = rows[r].filled;
        if (part * PART >= filled) continue;  // the whole warp
        const float* const mine = cached(stack, cache, r);
        const float* const keys = mine + h * head_dim * window + min(slot, window - 1);
        const float* const values = mine + int64_t(stack.dim) * window + (h * window + part * PART) * head_dim;
        const float* const q = wide + h * head_dim * ROWS + r;
        float score = 0.f;
#pragma unroll 16
        for (int i = 0; i < head_dim; ++i) score += q[i * ROWS] * keys[i * window];
        if (slot >= filled) score = -INFINITY;
        const float most = lanes_max<WARP>(score), weight = expf(score - most), sum = lanes_sum<WARP>(weight);
        float* const out = scratch + task * width;
        const int in_part = min(PART, filled - part * PART);
        // Two features a lane; lanes left over share the positions. Many loads are on their way at once.
        for (int begin = 0; begin < head_dim; begin += 2 * WARP) {
          const int pairs = min(WARP, (head_dim - begin) / 2), sharers = WARP / pairs, sharer = lane() / pairs;
          const int f = begin + 2 * (lane() % pairs);
          float low = 0.f, high = 0.f;
#pragma unroll 16
          for (int k = sharer; k - sharer < in_part; k += sharers) {
            const float of = __shfl_sync(ALL_LANES, weight, k % WARP);
            float2 pair = {0.f, 0.f};
            if (sharer < sharers && k < in_part) pair = load_pair(values + k * head_dim + f);
            low += of * pair.x;
            high += of * pair.y;
          }
          const float first_low = low, first_high = high;
          for (int other = 1; other < sharers; ++other) {
            low += __shfl_sync(ALL_LANES, first_low, (lane() + other * pairs) % WARP);
            high += __shfl_sync(ALL_LANES, first_high, (lane() + other * pairs) % WARP);
          }
          if (sharer == 0) {
            out[2 + f] = low;
            out[3 + f] = high;
          }
        }
        if (lane() == 0) {
          out[0] = most;
          out[1] = sum;
        }
      }
      __syncthreads();  // publishes the parts
      for (int i = threadIdx.x; i < n * heads * head_dim; i += blockDim.x) {
        const int f = i % head_dim, head = i / head_dim % heads, r = first + i / head_dim / heads;
        const int used = (rows[r].filled + PART - 1) / PART;
        const float* const of = scratch + (i / head_dim) * parts * width;
        float most = of[0];
        for (int part = 1; part < used; ++part) most = fmaxf(most, of[part * width]);
        float total = 0.f, value = 0.f;
        for (int part = 0; part < used; ++part) {
          const float factor = expf(of[part * width] - most);
          total += factor * of[part * width + 1];
          value += factor * of[part * width + 2 + f];
        }
        spread(&attended[((rank + head * size) * head_dim + f) * ROWS + r], value / total);
      }
      if (first + at_once < n_rows) __syncthreads();  // the parts were read
    }
  }

  /// The residual stream x through all blocks of a stack at the rows' positions; `which` counts the stacks.
  __device__ void forward(const DecodeStack& stack, int which) {
    turn(stack, which);
    const int64_t block_cache = 2 * int64_t(stack.dim) * stack.window;
    for (int block = 0; block < stack.n_layers; ++block) {
      const int maps = stack.linears + 4 * block;
      const int64_t cache = stack.cache + block * block_cache;
      linear_to(wide, maps, x, true);
      GROUP_BARRIER(size);  // publishes queries, keys, values (and, in its block, the angles)
      place(stack, cache);
      __syncthreads();  // publishes rotated queries and the caches
      attend(stack, cache);
      GROUP_BARRIER(size);  // publishes what was attended to
      linear_add(maps + 1, attended);
      GROUP_BARRIER(size);  // publishes the residual stream
      linear(maps + 2, x, true, [&](int j, int r, float gate, float value) {
        spread(&wide[j / 2 * ROWS + r], silu(gate) * value);
      });
      GROUP_BARRIER(size);  // publishes the gated values
      linear_add(maps + 3, wide);
      GROUP_BARRIER(size);  // publishes the residual stream
    }
  }
};

}  // namespace decode
