// What the parts of decode_persistent.cu share: a block's shared memory, linear maps and transformer blocks of one position of
// ROWS streams, divided over a group of thread blocks.
//
// Activations lie in shared memory as [feature][ROWS], those that maps read as pairs of features, a copy in every block of the group;
// whoever computes one writes it into all copies. Every sum has one order, whatever the group, its threads and the other rows are, so a
// stream plays the same alone.
#pragma once
#include "decode_tile.cuh"
#include "linear_prediction.cuh"

namespace decode {

/// Values of 16 bytes, the unit of caches.
template <class T>
constexpr int VEC = 16 / int(sizeof(T));
/// Positions whose angles are kept (ROPE_LOW of src/engine/cpu/stack.rs), a power of two.
constexpr int ANGLES = 64;
/// As in src/codec.rs.
constexpr int N_CODES = 256;
/// NORM_EPS of src/model/block.rs.
constexpr float NORM_EPS = 1e-6f;

/// A block's share of a linear map.
struct Slice {
  const char* weights;  // of the block's first tile
  const float* bias;    // [n_out], or null
  int n_in, n_out;
  int first, count;  // tiles
  int tile_bytes;
  int pieces;  // numbers in bf16 whose sum a weight is
};
static_assert(sizeof(Slice) == 40, "Slice differs from src/cuda/launch");

/// What a block knows of a stream.
struct Row {
  int64_t n;         // samples so far
  int64_t plan_pos;  // plan frames so far
  int64_t pos;       // of the stack that runs; what follows from it is told by `stand`
  int slot, filled;  // its place in the caches' rings, and how many of theirs are taken with it
  float mean_square;
  float log_scale, rms;  // of the frame
  float forecasts[2];
  float uniform, logit;  // what chooses a component, and the other uniform's ln(u / (1 - u))
  int stream, residual_code, past_code;
  float tone;  // in the sample
};
static_assert(sizeof(Row) == 80, "Row differs from src/cuda/launch");

/// n / d, out of the way: it is seldom needed.
__device__ NO_INLINE inline int64_t divided(int64_t n, int64_t d) { return n / d; }
/// Cosine and sine, likewise.
__device__ NO_INLINE inline float2 turn_of(double angle) { return {float(cos(angle)), float(sin(angle))}; }

/// The row comes to position n / hop of a stack. One thread.
__device__ __forceinline__ void stand(Row& row, int64_t n, int hop, int window) {
  const bool small = n >> 31 == 0;
  row.pos = small ? int(n) / hop : divided(n, hop);
  row.slot = small ? int(row.pos) % window : int(row.pos - divided(row.pos, window) * window);
  row.filled = int(min(row.pos + 1, int64_t(window)));
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, __fadd_rn(1.f, __expf(-x))); }
/// x * cosine - y * sine, rounded the same wherever it is compiled: of two products in a sum, the compiler may fuse either, and not
/// the same for every ROWS. So sums of products are spelt out here.
__device__ __forceinline__ float turned_low(float x, float y, float cosine, float sine) {
  return fmaf(x, cosine, -__fmul_rn(y, sine));
}
__device__ __forceinline__ float turned_high(float x, float y, float cosine, float sine) {
  return fmaf(x, sine, __fmul_rn(y, cosine));
}

/// What becomes of a map's outputs.
enum What {
  BEGINNING,  // they are a residual stream that is added to before it is read
  BEGUN,      // they are the residual stream
  ADDED,      // they are added to it
  HEADS,      // they are queries, keys and values
  GATES,      // gates and values
  // What does not stay in a stack.
  AFTER,
  FIRST,
  SECOND,
  DIRECT
};

/// Value e of 16 bytes of a cache.
template <class T>
__device__ __forceinline__ float value_of(const float4& vector, int e) {
#ifdef __CUDACC__
  const float words[4] = {vector.x, vector.y, vector.z, vector.w};
  if constexpr (sizeof(T) == sizeof(float)) return words[e];
  const uint32_t pair = __float_as_uint(words[e / 2]);
  return __uint_as_float(e % 2 ? pair & 0xffff0000u : pair << 16);
#else
  T values[VEC<T>];
  memcpy(values, &vector, sizeof(values));
  return to_float(values[e]);
#endif
}

/// A block, its role and its shared memory.
template <class W, int ROWS>
struct Room {
  using Pair = Split<PIECES<W>>;
  /// A linear map to be computed; none if `id` is negative.
  struct Map {
    int id;
    int in;  // place in shared memory
    What what;
    bool normalized;  // its inputs are the residual stream, to be divided by their root mean square
  };
  __device__ static Map nothing() { return {-1, 0, BEGUN, false}; }
  __device__ static int place_of(const Pair* in) {
    SHARED_MEMORY(char, memory);
    return int(reinterpret_cast<const char*>(in) - memory);
  }
  int rank, size;  // in the group
  int place;       // of the two that maps read the residual stream from
  int n_rows;
  bool fresh;  // no angles yet

  __device__ Room(int rank, int size) : rank(rank), size(size), place(0), n_rows(0), fresh(true) {}

  /// Arguments and model lie first in shared memory: whatever function wants them knows where.
  __device__ static const DecodeArgs& a() {
    SHARED_MEMORY(char, memory);
    return *reinterpret_cast<const DecodeArgs*>(memory);
  }
  __device__ static const DecodeModel& m() {
    SHARED_MEMORY(char, memory);
    return *reinterpret_cast<const DecodeModel*>(memory + sizeof(DecodeArgs));
  }
  template <class T>
  __device__ static T* at(int region) {
    SHARED_MEMORY(char, memory);
    return reinterpret_cast<T*>(memory + a().at[region]);
  }
  // Places in shared memory follow from the arguments: registers are for other things.
  __device__ Slice* slices() const { return at<Slice>(DECODE_SLICES); }
  __device__ Row* rows() const { return at<Row>(DECODE_ROWS); }
  __device__ float* samples() const { return at<float>(DECODE_SAMPLES); }  // ring [ROWS][n_recent]
  __device__ float* left() const { return at<float>(DECODE_LEFT); }  // ring [ROWS][n_left]
  __device__ int32_t* tokens() const { return at<int32_t>(DECODE_TOKENS); }  // ring [ROWS][n_tokens]
  __device__ float* past() const { return at<float>(DECODE_PAST); }  // coefficients [ROWS][order], the latest sample's first
  __device__ float* planned() const { return at<float>(DECODE_PLANNED); }  // likewise, [ROWS][planned_order]
  __device__ Pair* features() const { return at<Pair>(DECODE_FEATURES); }  // of the forecasts, [6][ROWS]
  __device__ float* head() const { return at<float>(DECODE_HEAD); }  // two of [3 * n_components][ROWS]: of the last tier, of the features by themselves
  __device__ Pair* shortcut() const { return at<Pair>(DECODE_SHORTCUT); }  // two of [shortcut width / 2][ROWS]
  __device__ float* tones() const { return at<float>(DECODE_TONES); }  // of the samples until coefficients are renewed, [ROWS][past_hop]
  __device__ float* scales() const { return at<float>(DECODE_SCALES); }  // planned for the frame, [ROWS][slices, n_components]
  __device__ float* bases() const { return at<float>(DECODE_HIGH); }  // [stacks][ROWS][angle_width]
  __device__ float* angles() const { return at<float>(DECODE_ANGLES); }  // [ROWS][angle_width]
  __device__ float* tables() const { return at<float>(DECODE_TABLES); }  // centres and edges of mu-law's tokens
  __device__ float* x() const { return at<float>(DECODE_X); }  // the residual stream; a block has what it computes
  /// What maps read of it. A block may be a sample ahead of another that still reads its own: it changes places from sample to sample.
  __device__ Pair* stream() const {
    return at<Pair>(DECODE_STREAM) + place * ((a().at[DECODE_POWER] - a().at[DECODE_STREAM]) / int(2 * sizeof(Pair)));
  }
  /// Sums of squares over its tiles, [tile][ROWS], likewise.
  __device__ float* power() const {
    return at<float>(DECODE_POWER) + place * ((a().at[DECODE_WIDE] - a().at[DECODE_POWER]) / int(2 * sizeof(float)));
  }
  __device__ float* wide() const { return at<float>(DECODE_WIDE); }  // queries, keys, values; logits
  __device__ Pair* inputs() const { return at<Pair>(DECODE_WIDE); }  // of other maps, in the same place: they take turns
  __device__ Pair* attended() const { return at<Pair>(DECODE_ATTENDED); }
  __device__ float* scratch() const { return at<float>(DECODE_SCRATCH); }

  /// Scratch as doubles: everything from the activations on.
  __device__ double* doubles() const { return at<double>(DECODE_X); }
  __device__ float* memory(int r) const { return a().memory + int64_t(rows()[r].stream) * m().memory_stride; }
  __device__ float* frame(int r, int slot) const {
    return a().frames + (int64_t(rows()[r].stream) * 2 + slot) * m().frame_stride;
  }

  /// Writes an activation into all copies.
  template <class T>
  __device__ void spread(T* to, T value) const {
    if (size == 1) {
      *to = value;
    } else {
      // Code that is fetched, not instructions that are issued, is what a sample waits for.
#pragma unroll 1
      for (int other = 0; other < size; ++other) *peer(to, other) = value;
    }
  }
  /// Features j (even) and j + 1 of row r for maps to read.
  __device__ static void put(Pair* to, int j, int r, float low, float high) {
    to[j / 2 * ROWS + r] = split<PIECES<W>>(low, high);
  }

  /// Copies arguments, the model and the shares of its maps. `divided`: this block is one of a group. A barrier after it is the
  /// caller's.
  __device__ void open(const DecodeArgs& args, bool divided) const {
    SHARED_MEMORY(int32_t, to);
    constexpr int N_ARGS = sizeof(DecodeArgs) / sizeof(int32_t), N_MODEL = sizeof(DecodeModel) / sizeof(int32_t);
    for (int i = threadIdx.x; i < N_ARGS + N_MODEL; i += blockDim.x)
      to[i] = i < N_ARGS ? reinterpret_cast<const int32_t*>(&args)[i] : reinterpret_cast<const int32_t*>(args.model)[i - N_ARGS];
    __syncthreads();  // publishes arguments and model
    for (int i = threadIdx.x; i < 2 * N_CODES - 1; i += blockDim.x)
      tables()[i] = i < N_CODES ? args.exact[m().centres + i] : args.exact[m().edges + i - N_CODES];
    for (int id = threadIdx.x; id < m().n_linears; id += blockDim.x) {
      const DecodeLinear l = a().linears[id];
      const int tiles = (l.n_out + TILE - 1) / TILE, parts = divided && !l.whole ? size : 1;
      const int share = (tiles + parts - 1) / parts;
      Slice& s = slices()[id];
      s.n_in = l.n_in;
      s.n_out = l.n_out;
      s.first = parts == 1 ? 0 : min(rank * share, tiles);
      s.count = min(s.first + share, tiles) - s.first;
      s.pieces = l.pieces;
      s.tile_bytes = (l.n_in + STEP - 1) / STEP * l.pieces * STEP_BYTES;
      s.weights = reinterpret_cast<const char*>(a().weights + l.weights) + s.first * s.tile_bytes;
      s.bias = l.bias < 0 ? nullptr : a().exact + l.bias;
    }
    __syncthreads();  // publishes the shares
    if (!divided) return;
    for (int id = 0; id < m().n_linears; ++id) {
      const int place = a().linears[id].resident;
      if (place < 0) continue;
      const Slice s = slices()[id];
      float4* const room = at<float4>(DECODE_RESIDENT) + place / sizeof(float4);
      for (int i = threadIdx.x; i < s.count * s.tile_bytes / int(sizeof(float4)); i += blockDim.x)
        room[i] = reinterpret_cast<const float4*>(s.weights)[i];
    }
    __syncthreads();  // the shares were read, and publishes the copies
    for (int id = threadIdx.x; id < m().n_linears; id += blockDim.x)
      if (const int place = a().linears[id].resident; place >= 0)
        slices()[id].weights = at<char>(DECODE_RESIDENT) + place;
  }

  /// A tile of this block's share of a map.
  __device__ __forceinline__ Products products(const Slice& s, int tile, const Pair* in) const {
    constexpr int N = PIECES<W>, FEWEST = N == 2 ? 1 : N;
    const char* const weights = s.weights + tile * s.tile_bytes;
    if constexpr (FEWEST < N)
      if (s.pieces == FEWEST) return multiply<FEWEST, N, ROWS>(weights, s.n_in, in);
    return multiply<N, N, ROWS>(weights, s.n_in, in);
  }

  /// What the residual stream of row r and the next (the last one's is 0) is to be multiplied with to be normalised.
  __device__ __forceinline__ float2 inverse_rms(int r, int dim) const {
    const float* const sums = power() + (ROWS == 1 ? 0 : r);
    float2 sum = {0.f, 0.f};
#pragma unroll 4
    for (int tile = 0; tile < (dim + TILE - 1) / TILE; ++tile) {
      sum.x += sums[tile * ROWS];
      if (r + 1 < ROWS) sum.y += sums[tile * ROWS + 1];
    }
    return {rsqrtf(sum.x / dim + NORM_EPS), rsqrtf(sum.y / dim + NORM_EPS)};
  }

  /// y = x W + b + start of a map, whose inputs are divided by their root mean square first if they are the residual stream to be
  /// normalised, and then of a second map, for the warps that the first leaves idle. `start(what, j, r)` gives what outputs j and j + 1
  /// begin with; `done(what, tile, j, r, there, y_j, y_j+1)` is called by whole warps, also where there is no such output or row. Barriers
  /// before and after are the caller's.
  template <class Start, class Done>
  __device__ __forceinline__ void linear_from(const Map first, const Map second, Start start, Done done) const {
    const int count = slices()[first.id].count, all = second.id < 0 ? count : count + slices()[second.id].count;
    float2 scale = {1.f, 1.f};
    if (first.normalized) scale = inverse_rms(row(), slices()[first.id].n_in);
#pragma unroll 1
    for (int task = warp(); task < all; task += n_warps()) {
      const bool is_first = task < count;
      const Map map = is_first ? first : second;
      const Slice& s = slices()[map.id];
      const int tile = is_first ? task : task - count, j = (s.first + tile) * TILE + 2 * (lane() / 4);
      float begun[2][2] = {};
      for (int i = 0; i < (ROWS == 1 ? 1 : 2); ++i) {
        if (row() + i >= n_rows || j >= s.n_out) continue;
        const float2 from = start(map.what, j, row() + i);
        begun[0][i] = from.x, begun[1][i] = from.y;
        if (s.bias) begun[0][i] += s.bias[j], begun[1][i] += s.bias[j + 1];
      }
      // By its place, so that the compiler knows where it lies.
      SHARED_MEMORY(char, memory);
      const Products y = products(s, tile, reinterpret_cast<const Pair*>(memory + map.in));
#pragma unroll 1
      for (int i = 0; i < (ROWS == 1 ? 1 : 2); ++i) {
        const bool next = ROWS > 1 && i > 0;
        const auto of = [&](int output) {
          const float factor = is_first ? next ? scale.y : scale.x : 1.f;
          return fmaf(next ? y.of[output][1] : y.of[output][0], factor, next ? begun[output][1] : begun[output][0]);
        };
        done(map.what, s.first + tile, j, row() + i, row() + i < n_rows && j < s.n_out, of(0), of(1));
      }
    }
  }
  __device__ static int row() { return 2 * (lane() % 4); }

  /// x W + b; `done(j, r, y_j, y_j+1)` gets what there is.
  template <class Done>
  __device__ __forceinline__ void linear(int id, const Pair* in, Done done) const {
    linear_from(
        {id, place_of(in), BEGUN, false}, nothing(), [](What, int, int) { return float2{0.f, 0.f}; },
        [&](What, int, int j, int r, bool there, float low, float high) {
          if (there) done(j, r, low, high);
        });
  }

  /// silu(x W + b) for maps to read, computed whole by every block.
  __device__ void linear_silu(Pair* to, int id, const Pair* in) const {
    linear(id, in, [&](int j, int r, float low, float high) { put(to, j, r, silu(low), silu(high)); });
  }

  /// A tile's outputs j and j + 1 are the new residual stream's.
  __device__ __forceinline__ void to_stream(int tile, int j, int r, bool there, float low, float high) const {
    float sum = there ? fmaf(low, low, __fmul_rn(high, high)) : 0.f;
    if (there) {
      x()[j * ROWS + r] = low;
      x()[(j + 1) * ROWS + r] = high;
      spread(&stream()[j / 2 * ROWS + r], split<PIECES<W>>(low, high));
    }
#pragma unroll
    for (int distance = 4; distance < WARP; distance *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (there && lane() < 4) spread(&power()[tile * ROWS + r], sum);
  }

  /// A map whose outputs are the new residual stream.
  template <class Start>
  __device__ __forceinline__ void linear_stream(int id, const Pair* in, Start start) const {
    linear_from(
        {id, place_of(in), BEGUN, false}, nothing(), [&](What, int j, int r) { return start(j, r); },
        [&](What, int tile, int j, int r, bool there, float low, float high) { to_stream(tile, j, r, there, low, high); });
  }

  /// Cosines and sines at the rows' positions: those of the multiple of ANGLES below, reduced in f64, turned on by the rest.
  __device__ void turn(const DecodeStack& stack, int which) const {
    const int head_dim = stack.dim / stack.n_heads, half = head_dim / 2;
    const float* const low = a().exact + stack.angles;
    for (int i = threadIdx.x; i < n_rows * half; i += blockDim.x) {
      const int r = i / half, f = i % half;
      const int64_t pos = rows()[r].pos;
      const int rest = int(pos & (ANGLES - 1));
      float* const base = bases() + (which * ROWS + r) * m().angle_width + f;
      // Each thread keeps its own.
      if (fresh || rest == 0) {
        const float2 turned = turn_of(double(pos - rest) * a().doubles[stack.frequencies + f]);
        base[0] = turned.x;
        base[half] = turned.y;
      }
      const float cos_a = base[0], sin_a = base[half];
      const float cos_b = low[rest * head_dim + f], sin_b = low[rest * head_dim + half + f];
      float* const out = angles() + r * m().angle_width + f;
      out[0] = turned_low(cos_a, sin_a, cos_b, sin_b);
      out[half] = turned_high(cos_a, sin_a, cos_b, sin_b);
    }
  }

  /// A row's cache of the block of a stack whose caches begin at `cache`: those of all streams lie together, so that a fine tier's
  /// are few pages.
  __device__ W* cached(const DecodeStack& stack, int64_t cache, int r) const {
    return static_cast<W*>(a().caches) + cache * a().streams + int64_t(rows()[r].stream) * stack.block_cache;
  }

  /// Lanes that share the positions, when each has one of so many vectors of the values; a power of two.
  __device__ static constexpr int sharing(int vectors) {
    int sharers = 1;
    while (2 * sharers * vectors <= WARP) sharers *= 2;
    return sharers;
  }

  /// Attention of this block's heads, a warp for a head of a row: queries and keys of `wide` normalised and rotated, keys and values
  /// into the caches, softmax over what is there; `attended` in all copies. HEAD_DIM is 0 where it is known only at run time.
  template <int HEAD_DIM>
  __device__ __forceinline__ void attend(const DecodeStack& stack, int64_t cache) const {
    // 16 bytes on their way at a time; a lane's pairs of features.
    constexpr int V = VEC<W>, LOADS = 8, PAIRS = HEAD_DIM > 0 ? (HEAD_DIM / 2 + WARP - 1) / WARP : 2;
    const int head_dim = HEAD_DIM > 0 ? HEAD_DIM : stack.dim / stack.n_heads, half = head_dim / 2, window = stack.window;
    const int vectors = (head_dim + V - 1) / V, padded = vectors * V, sharers = sharing(vectors), shared_by = WARP / sharers;
    const int sharer = lane() / vectors, mine = lane() % vectors, heads = (stack.n_heads - rank + size - 1) / size;
    const int room = (m().angle_width + VEC<bf16> - 1) / VEC<bf16> * VEC<bf16>;
    float* const query = scratch() + warp() * 2 * room;
    W* const new_value = reinterpret_cast<W*>(query + room);
    const auto vector = [](const W* from) { return *reinterpret_cast<const float4*>(from); };
    for (int task = warp(); task < n_rows * heads; task += n_warps()) {
      const int r = ROWS == 1 ? 0 : task % n_rows, h = rank + (ROWS == 1 ? task : task / n_rows) * size;
      const int slot = rows()[r].slot, filled = rows()[r].filled;
      W* const keys = cached(stack, cache, r) + h * window * padded;                      // [vectors][window][V]
      W* const values = cached(stack, cache, r) + (stack.n_heads + h) * window * padded;  // [window][padded]
      float most = 0.f, total = 0.f, sum[V] = {};
#pragma unroll 1
      for (int first = 0; first < filled; first += WARP) {
        float4 key[LOADS], value[LOADS];
        const auto load_keys = [&](int begin) {
          const int at = min(first + lane(), filled - 1);
#pragma unroll
          for (int i = 0; i < LOADS; ++i)
            key[i] = begin + i < vectors ? vector(keys + ((begin + i) * window + at) * V) : float4{0.f, 0.f, 0.f, 0.f};
        };
        const auto load_values = [&](int begin) {
#pragma unroll
          for (int i = 0; i < LOADS; ++i) {
            const int at = first + sharer + (begin + i) * sharers;
            value[i] = begin + i < shared_by && sharer < sharers && at < filled ? vector(values + at * padded + mine * V) : float4{0.f, 0.f, 0.f, 0.f};
          }
        };
        load_keys(0);
        load_values(0);
        if (first == 0) {
          // While they are on their way: the position that is added, which needs no memory.
          const float *const q = wide() + h * head_dim * ROWS + r, *const k = q + stack.dim * ROWS, *const v = k + stack.dim * ROWS;
          const float* const turned = angles() + r * m().angle_width;
          float of_q[PAIRS][2], of_k[PAIRS][2], power_q = 0.f, power_k = 0.f, score = 0.f;
#pragma unroll
          for (int p = 0; p < PAIRS; ++p)
#pragma unroll
            for (int second = 0; second < 2; ++second) {
              const int i = p * WARP + lane(), f = second * half + i;
              const bool there = i < half;
              of_q[p][second] = there ? q[f * ROWS] : 0.f;
              of_k[p][second] = there ? k[f * ROWS] : 0.f;
              power_q = fmaf(of_q[p][second], of_q[p][second], power_q);
              power_k = fmaf(of_k[p][second], of_k[p][second], power_k);
              if (there) values[slot * padded + f] = new_value[f] = from_float<W>(v[f * ROWS]);
            }
          const float scale_q = rsqrtf((lanes_sum<WARP>(power_q) / head_dim + NORM_EPS) * head_dim);
          const float scale_k = rsqrtf(lanes_sum<WARP>(power_k) / head_dim + NORM_EPS);
#pragma unroll
          for (int p = 0; p < PAIRS; ++p) {
            const int i = p * WARP + lane();
            if (i >= half) continue;
            const float cosine = turned[i], sine = turned[half + i];
            const float low_q = of_q[p][0] * scale_q, high_q = of_q[p][1] * scale_q, low_k = of_k[p][0] * scale_k,
                        high_k = of_k[p][1] * scale_k;
            const auto place = [&](int f, float of_query, float of_key) {
              const W as_kept = from_float<W>(of_key);
              query[f] = of_query;
              keys[(f / V * window + slot) * V + f % V] = as_kept;
              score = fmaf(of_query, to_float(as_kept), score);
            };
            place(i, turned_low(low_q, high_q, cosine, sine), turned_low(low_k, high_k, cosine, sine));
            place(half + i, turned_high(low_q, high_q, cosine, sine), turned_high(low_k, high_k, cosine, sine));
          }
          if (const int f = head_dim + lane(); HEAD_DIM % V != 0 || HEAD_DIM == 0)
            if (f < padded) query[f] = 0.f, new_value[f] = from_float<W>(0.f);
          most = lanes_sum<WARP>(score);
          total = lane() == 0 ? 1.f : 0.f;
          // Publishes query and value (no emulated schedule shows it: lanes met in shuffles since, which order no memory).
          __syncwarp();  // unseen
          if (sharer == 0) {
            const float4 own = vector(new_value + mine * V);
#pragma unroll
            for (int e = 0; e < V; ++e) sum[e] = value_of<W>(own, e);
          }
        }
        float scores[2] = {};
#pragma unroll
        for (int begin = 0; begin < vectors; begin += LOADS) {
          if (begin > 0) load_keys(begin);
#pragma unroll
          for (int i = 0; i < LOADS; ++i) {
            if (begin + i >= vectors) continue;
#pragma unroll
            for (int e = 0; e < V; ++e) scores[e % 2] = fmaf(query[(begin + i) * V + e], value_of<W>(key[i], e), scores[e % 2]);
          }
        }
        // In the new position's place lies what was there before it.
        const int at = first + lane();
        const float scored = at < filled && at != slot ? scores[0] + scores[1] : -INFINITY, before = most;
        most = fmaxf(most, lanes_max<WARP>(scored));
        const float factor = __expf(before - most), weight = __expf(scored - most);
        total = fmaf(total, factor, weight);
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] = __fmul_rn(sum[e], factor);
#pragma unroll
        for (int begin = 0; begin < shared_by; begin += LOADS) {
          if (begin > 0) load_values(begin);
#pragma unroll
          for (int i = 0; i < LOADS; ++i) {
            if (begin + i >= shared_by) continue;
            const float of = __shfl_sync(ALL_LANES, weight, (sharer + (begin + i) * sharers) % WARP);
#pragma unroll
            for (int e = 0; e < V; ++e) sum[e] = fmaf(of, value_of<W>(value[i], e), sum[e]);
          }
        }
      }
      const float inverse = __fdividef(1.f, lanes_sum<WARP>(total));
#pragma unroll
      for (int other = sharers / 2; other > 0; other /= 2)
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += __shfl_sync(ALL_LANES, sum[e], ((sharer ^ other) * vectors + mine) % WARP);
      // The sharers, who all have the sums now, write a pair in turn.
      Pair* const to = attended() + (h * head_dim + mine * V) / 2 * ROWS + r;
#pragma unroll 1
      for (int pair = sharer; pair < V / 2 && sharer < sharers; pair += sharers) {
        float low = sum[0], high = sum[1];
#pragma unroll
        for (int other = 1; other < V / 2; ++other)
          if (other == pair) low = sum[2 * other], high = sum[2 * other + 1];
        if (mine * V + 2 * pair < head_dim) spread(&to[pair * ROWS], split<PIECES<W>>(low * inverse, high * inverse));
      }
      // What the warp keeps was read (no emulated schedule shows it: lanes met in shuffles since, which order no memory).
      __syncwarp();  // unseen
    }
  }

  /// A tile's outputs j and j + 1 of a map of the stack's blocks, or of the tier's that leads into it. Queries, keys and values go into
  /// `wide`, to the block that has the head. Of gates and values, outputs j and j + 1 are gate and value of unit j / 2; four lanes on are the
  /// next unit's; silu(gate) * value into `inputs`.
  __device__ __forceinline__ void keep(What what, const DecodeStack& stack, int tile, int j, int r, bool there, float low, float high) const {
    if (what == BEGUN || what == ADDED) {
      to_stream(tile, j, r, there, low, high);
    } else if (what == GATES) {
      const float unit = silu(low) * high, next = __shfl_sync(ALL_LANES, unit, (lane() + 4) % WARP);
      if (there && lane() / 4 % 2 == 0) spread(&inputs()[j / 4 * ROWS + r], split<PIECES<W>>(unit, next));
    } else if (there) {
      float* const to = what == HEADS ? &wide()[j * ROWS + r] : &x()[j * ROWS + r];
      float* const at = what == HEADS && size > 1 ? peer(to, j % stack.dim / (stack.dim / stack.n_heads) % size) : to;
      at[0] = low;
      at[ROWS] = high;
    }
  }
};

/// What leads into a stack and out of it: maps, or less than 0.
struct Ends {
  int before;  // of the inputs, what the residual stream begins with
  int added;   // of the features, added to it
  int after;   // of the residual stream
  bool normalized;  // that is, first
};

/// The residual stream through all blocks of a stack at the rows' positions; `which` counts the stacks. `attend(cache)` is the stack's
/// attention, `start(j, r)` what the map before begins with, `beside(k)` a map for the warps that the k-th map leaves idle (k from 0,
/// which adds the features), `done(what, j, r, y_j, y_j+1)` gets outputs that do not stay in the stack. No barrier comes after the map after.
///
/// One loop for all maps, and nothing in it twice: a sample goes through this code once, so that what it waits for is the code.
template <class W, int ROWS, class Attend, class Start, class Beside, class Done>
__device__ __forceinline__ void forward(const Room<W, ROWS>& room, const DecodeStack& stack, int which, const Ends ends, Attend attend,
                                        Start start, Beside beside, Done done) {
  constexpr int BEFORE = -2, ADD = -1, OF_A_BLOCK = 5, ATTEND = 1, GATE = 3, DOWN = 4;
  const int n = OF_A_BLOCK * stack.n_layers;
#pragma unroll 1
  for (int i = BEFORE; i <= n; ++i) {
    const int block = i / OF_A_BLOCK, part = i % OF_A_BLOCK;
    if (part == ATTEND && i < n) {
      attend(stack.cache + int64_t(block) * stack.block_cache);
    } else {
      typename Room<W, ROWS>::Map map = {stack.linears + 4 * block + max(part - 1, 0), room.place_of(room.stream()), part == GATE ? GATES : HEADS, true};
      if (part > ATTEND && part != GATE)
        map = {map.id, room.place_of(part == DOWN ? room.inputs() : room.attended()), ADDED, false};
      if (i == BEFORE) map = {ends.before, room.place_of(room.inputs()), ends.added < 0 ? BEGUN : BEGINNING, false};
      if (i == ADD) map = {ends.added, room.place_of(room.features()), ADDED, false};
      if (i == n) map = {ends.after, room.place_of(room.stream()), AFTER, ends.normalized};
      if (map.id < 0) continue;
      room.linear_from(
          map, beside(i <= 0 ? i - ADD : i),
          [&](What what, int j, int r) {
            if (what == ADDED) return float2{room.x()[j * ROWS + r], room.x()[(j + 1) * ROWS + r]};
            return what == BEGUN || what == BEGINNING ? start(j, r) : float2{0.f, 0.f};
          },
          [&](What what, int tile, int j, int r, bool there, float low, float high) {
            if (what < AFTER)
              room.keep(what, stack, tile, j, r, there, low, high);
            else if (there)
              done(what, j, r, low, high);
          });
      if (i == 0) room.turn(stack, which);
      // To the beginning each lane adds itself.
      if (map.what == BEGINNING || i == n) continue;
    }
    GROUP_BARRIER(room.size);  // publishes what comes next: heads (in their block, with the angles), what was attended to, gated values, the residual stream
  }
}

/// Attention of heads of any size, out of its callers' way.
template <class W, int ROWS>
__device__ NO_INLINE void attend_any(const Room<W, ROWS> room, const DecodeStack& stack, int64_t cache) {
  room.template attend<0>(stack, cache);
}

}  // namespace decode
