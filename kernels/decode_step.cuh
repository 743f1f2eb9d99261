// What the parts of decode_persistent.cu share: a block's shared memory, linear maps and transformer blocks of one position of
// ROWS streams, divided over a group of thread blocks.
//
// Activations lie in shared memory as [feature][ROWS], those that maps read in steps of features (`Quad`), a copy in every block of the group;
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

/// What becomes of a map's outputs.
enum What : uint8_t {
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

/// Where a stream stands in a stack.
struct Standing {
  int64_t pos;
  int slot, filled;  // its place in the caches' rings, and how many of theirs are taken with it

  /// `pos` steps are behind it. What divides is done once a launch.
  __device__ void begin(int64_t steps, int window) {
    pos = steps - 1;
    slot = int((pos + window) % window);
    filled = int(min(steps, int64_t(window)));
  }
  __device__ __forceinline__ void go_on(int window) {
    pos += 1;
    slot = slot + 1 < window ? slot + 1 : 0;
    filled = min(filled + 1, window);
  }
};

/// What a block knows of a stream.
struct Row {
  int64_t n;         // samples so far
  int64_t plan_pos;  // plan frames so far
  float mean_square;
  float log_scale, rms;  // of the frame
  float forecasts[2];    // the plan's may lie beyond what a sample may be, and is held to that where the mixture stands around it
  float partial[2];      // of the forecasts of the sample after the one that is being made: all but what that adds
  float uniform, logit;  // what chooses a component, and the other uniform's ln(u / (1 - u))
  int stream, residual_code, past_code;
  float tone;  // in the sample
  int turn;    // its place among those whose turn it is
  Standing at[MAX_TIERS + 1];  // of the tiers, and then of the plan's stack
};
static_assert(sizeof(Row) == 152, "Row differs from src/cuda/launch");

/// What a block is at. It lies in shared memory, not in registers: what a function that is called keeps of these costs more in a sample
/// than to read it anew.
struct Block {
  int rank, size;  // in the group
  int n_rows;
  int fresh;  // no angles yet
  // Of the sample:
  int first;           // tier that has a step
  int slice;           // part of its frame
  int sub[MAX_TIERS];  // of the step that the tier above has handed down
};
static_assert(sizeof(Block) == 40, "Block differs from src/cuda/launch");

__device__ __forceinline__ float silu(float x) { return __fdividef(x, __fadd_rn(1.f, __expf(-x))); }
/// x * cosine - y * sine, rounded the same wherever it is compiled: of two products in a sum, the compiler may fuse either, and not
/// the same for every ROWS. So sums of products are spelt out here.
__device__ __forceinline__ float turned_low(float x, float y, float cosine, float sine) {
  return fmaf(x, cosine, -__fmul_rn(y, sine));
}
__device__ __forceinline__ float turned_high(float x, float y, float cosine, float sine) {
  return fmaf(x, sine, __fmul_rn(y, cosine));
}

/// What outputs j and j + 1 of a map begin with: the sum of these, which may still be on their way.
struct Begun {
  float2 of[4] = {};
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
  using Features = Quad<PIECES<W>>;
  int place;  // of the two that maps read the residual stream from

  // What the block is at.
  __device__ static Block& block() {
    SHARED_MEMORY(char, memory);
    return *reinterpret_cast<Block*>(memory + sizeof(DecodeArgs) + sizeof(DecodeModel));
  }
  __device__ static int rank() { return block().rank; }
  __device__ static int size() { return block().size; }
  __device__ static int n_rows() { return block().n_rows; }

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
  __device__ static DecodeMap* maps() { return at<DecodeMap>(DECODE_MAPS); }
  __device__ static Row* rows() { return at<Row>(DECODE_ROWS); }
  __device__ float* samples() const { return at<float>(DECODE_SAMPLES); }  // ring [ROWS][n_recent]
  __device__ float* left() const { return at<float>(DECODE_LEFT); }  // ring [ROWS][n_left]
  __device__ int32_t* tokens() const { return at<int32_t>(DECODE_TOKENS); }  // ring [ROWS][n_tokens]
  __device__ float* past() const { return at<float>(DECODE_PAST); }  // coefficients [ROWS][order], the latest sample's first
  __device__ float* planned() const { return at<float>(DECODE_PLANNED); }  // likewise, [ROWS][planned_order]
  __device__ Features* features() const { return at<Features>(DECODE_FEATURES); }  // of the forecasts
  __device__ float* head() const { return at<float>(DECODE_HEAD); }  // two of [3 * n_components][ROWS]: of the last tier, of the features by themselves
  __device__ Features* first() const { return at<Features>(DECODE_FIRST); }  // hidden layers of what features say by themselves
  __device__ Features* second() const { return at<Features>(DECODE_SECOND); }
  __device__ float* tones() const { return at<float>(DECODE_TONES); }  // of the samples until coefficients are renewed, [ROWS][past_hop]
  __device__ float* scales() const { return at<float>(DECODE_SCALES); }  // planned for the frame, [ROWS][slices, n_components]
  __device__ float* bases() const { return at<float>(DECODE_HIGH); }  // [stacks][ROWS][angle_width]
  __device__ float* angles() const { return at<float>(DECODE_ANGLES); }  // [ROWS][angle_width]
  __device__ static float* tables() { return at<float>(DECODE_TABLES); }  // centres and edges of mu-law's tokens
  __device__ float* x() const { return at<float>(DECODE_X); }  // the residual stream; a block has what it computes
  /// What maps read of it. A block may be a sample ahead of another that still reads its own: it changes places from sample to sample.
  __device__ Features* stream() const {
    return reinterpret_cast<Features*>(at<char>(DECODE_STREAM) + place * ((a().at[DECODE_POWER] - a().at[DECODE_STREAM]) / 2));
  }
  /// Sums of squares over its tiles, [tile][ROWS], likewise.
  __device__ float* power() const {
    return at<float>(DECODE_POWER) + place * ((a().at[DECODE_WIDE] - a().at[DECODE_POWER]) / int(2 * sizeof(float)));
  }
  __device__ float* wide() const { return at<float>(DECODE_WIDE); }  // queries, keys, values; logits
  __device__ Features* inputs() const { return at<Features>(DECODE_WIDE); }  // of other maps, in the same place: they take turns
  __device__ Features* attended() const { return at<Features>(DECODE_ATTENDED); }
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
    if (size() == 1) {
      *to = value;
    } else {
      for (int other = 0; other < size(); ++other) *peer(to, other) = value;
    }
  }
  /// Pair `pair` of row r of features, into all copies.
  __device__ void spread(Features* to, int pair, int r, Split<PIECES<W>> value) const {
    uint32_t* const words = pair_at<ROWS>(to, pair, r);
#pragma unroll
    for (int i = 0; i < PIECES<W>; ++i) spread(words + 2 * i, value.of[i]);
  }
  /// Features j (even) and j + 1 of row r for maps to read.
  __device__ static void put(Features* to, int j, int r, float low, float high) {
    const Split<PIECES<W>> value = split<PIECES<W>>(low, high);
    uint32_t* const words = pair_at<ROWS>(to, j / 2, r);
#pragma unroll
    for (int i = 0; i < PIECES<W>; ++i) words[2 * i] = value.of[i];
  }

  /// Copies arguments, the model, and, if the block is one that plays, as many weights as there is room for. A barrier after it is the
  /// caller's.
  __device__ static void open(const DecodeArgs& args, int its_rank, int its_size, bool playing) {
    SHARED_MEMORY(int32_t, to);
    if (threadIdx.x == 0) {
      block() = {};
      block().rank = its_rank;
      block().size = its_size;
    }
    constexpr int N_ARGS = sizeof(DecodeArgs) / sizeof(int32_t), N_MODEL = sizeof(DecodeModel) / sizeof(int32_t);
    for (int i = threadIdx.x; i < N_ARGS + N_MODEL; i += blockDim.x)
      to[i] = i < N_ARGS ? reinterpret_cast<const int32_t*>(&args)[i] : reinterpret_cast<const int32_t*>(args.model)[i - N_ARGS];
    __syncthreads();  // publishes arguments and model
    for (int i = threadIdx.x; i < 2 * N_CODES - 1; i += blockDim.x)
      tables()[i] = i < N_CODES ? args.exact[m().centres + i] : args.exact[m().edges + i - N_CODES];
    for (int i = threadIdx.x; i < a().n_maps; i += blockDim.x) maps()[i] = a().maps[rank() * a().n_maps + i];
    for (int id = 0; id < m().n_linears && playing; ++id) {
      const DecodeLinear l = a().linears[id];
      if (l.resident < 0) continue;
      const int tiles = (l.n_out + TILE - 1) / TILE, share = l.whole ? tiles : (tiles + size() - 1) / size();
      const int first = l.whole ? 0 : min(rank() * share, tiles), count = min(first + share, tiles) - first;
      const int64_t bytes = tile_bytes(l), n = count * bytes / int(sizeof(float4));
      const float4* const from = reinterpret_cast<const float4*>(reinterpret_cast<const char*>(a().weights + l.weights) + first * bytes);
      float4* const room = at<float4>(DECODE_RESIDENT) + l.resident / int(sizeof(float4));
      for (int i = threadIdx.x; i < n; i += blockDim.x) room[i] = from[i];
    }
  }
  __device__ static int tile_bytes(const DecodeLinear& l) { return (l.n_in + STEP - 1) / STEP * l.pieces * STEP_BYTES; }

  /// What the residual stream of row r and the next (the last one's is anything, or 0 where it is the only one) is to be multiplied with to be normalised.
  __device__ __forceinline__ float2 inverse_rms(int r, int dim) const {
    constexpr int AT_A_TIME = 6;
    const float* const sums = power() + (ROWS == 1 ? 0 : r);
    const int tiles = (dim + TILE - 1) / TILE;
    float2 sum = {0.f, 0.f};
#pragma unroll 1
    for (int first = 0; first < tiles; first += AT_A_TIME) {
      float2 of[AT_A_TIME];
#pragma unroll
      for (int i = 0; i < AT_A_TIME; ++i) {
        of[i] = {0.f, 0.f};
        if (first + i >= tiles) continue;
        of[i].x = sums[(first + i) * ROWS];
        if (ROWS > 1) of[i].y = sums[(first + i) * ROWS + 1];
      }
#pragma unroll
      for (int i = 0; i < AT_A_TIME; ++i) sum.x += of[i].x, sum.y += of[i].y;
    }
    const float over = __fdividef(1.f, float(dim));
    return {rsqrtf(fmaf(sum.x, over, NORM_EPS)), rsqrtf(fmaf(sum.y, over, NORM_EPS))};
  }

  /// y = x W + b + start of tile `tile` of a share of a map, by one warp. `loaded` has the first of its weights, and in the end what
  /// `load_next` asks for. `start(what, j, r)` gives what outputs j and j + 1 begin with; `done(what, j, r, there, y_j, y_j+1)` is called by the
  /// whole warp, also where there is no such output or row. Barriers before and after are the caller's.
  template <class LoadNext, class Start, class Done>
  __device__ __forceinline__ void compute(const DecodeMap& map, int tile, Loaded& loaded, LoadNext load_next, Start start, Done done) const {
    constexpr int N = PIECES<W>, FEWEST = N == 2 ? 1 : N, SIDE = ROWS == 1 ? 1 : 2;
    const What what = What(map.what);
    const int j = map.output + tile * TILE + 2 * (lane() / 4), n = map.tile_bytes / STEP_BYTES, n_in = map.n_in;
    const bool is_output = j < map.n_out;
    Begun begun[SIDE];
    float2 bias = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < SIDE; ++i)
      if (row() + i < n_rows() && is_output) begun[i] = start(what, j, row() + i);
    if (map.bias >= 0 && is_output) bias = {a().exact[map.bias + j], a().exact[map.bias + j + 1]};
    // By its place, so that the compiler knows where it lies.
    SHARED_MEMORY(char, memory);
    const Features* const x = reinterpret_cast<const Features*>(memory + 16 * (place ? map.odd_inputs : map.inputs));
    Sums sums;
#pragma unroll 1
    for (int piece = 0; piece < n; piece += LOADED) {
      if (FEWEST < N && map.of == FEWEST)
        multiply<FEWEST, ROWS>(sums, loaded, piece / FEWEST, n_in, x);
      else
        multiply<N, ROWS>(sums, loaded, piece / N, n_in, x);
      // Into the place of what has been used: to move what is on its way would be to wait for it.
      if (piece + LOADED < n) load_tile(loaded, map, tile, piece + LOADED);
    }
    load_next();
    float2 scale = {1.f, 1.f};
    if (map.normalized) scale = inverse_rms(row(), n_in);
    const Products y = sums.total();
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
      float2 from = begun[i].of[0];
#pragma unroll
      for (int k = 1; k < 4; ++k) from.x += begun[i].of[k].x, from.y += begun[i].of[k].y;
      const float factor = i ? scale.y : scale.x;
      done(what, j, row() + i, row() + i < n_rows() && is_output, fmaf(y.of[0][i], factor, from.x + bias.x),
           fmaf(y.of[1][i], factor, from.y + bias.y));
    }
  }
  __device__ static int row() { return 2 * (lane() % 4); }

  /// Asks for weights of a tile from piece `piece` on.
  __device__ static void load_tile(Loaded& loaded, const DecodeMap& map, int tile, int piece = 0) {
    SHARED_MEMORY(char, memory);
    const int64_t at = map.weights + int64_t(tile) * map.tile_bytes + piece * STEP_BYTES;
    const int n = map.tile_bytes / STEP_BYTES - piece;
    if (map.resident)
      load<true>(loaded, memory + at, n);
    else
      load<false>(loaded, reinterpret_cast<const char*>(a().weights) + at, n);
  }

  /// A map by itself, whole, of inputs at `in`; as `compute`.
  template <class Start, class Done>
  __device__ __forceinline__ void linear_from(int id, const Features* in, Start start, Done done) const {
    SHARED_MEMORY(char, memory);
    const DecodeLinear l = a().linears[id];
    DecodeMap map = {};
    map.weights = int64_t(sizeof(bf16)) * l.weights;
    map.tile_bytes = tile_bytes(l);
    map.bias = int32_t(l.bias);
    map.inputs = map.odd_inputs = uint16_t((reinterpret_cast<const char*>(in) - memory) / 16);
    map.n_in = uint16_t(l.n_in);
    map.n_out = uint16_t(l.n_out);
    map.what = BEGUN;
    map.of = uint8_t(l.pieces);
    const int tiles = (l.n_out + TILE - 1) / TILE;
    Loaded loaded;
    if (warp() < tiles) load_tile(loaded, map, warp());
#pragma unroll 1
    for (int tile = warp(); tile < tiles; tile += n_warps()) {
      const int next = tile + n_warps();
      compute(map, tile, loaded, [&] { if (next < tiles) load_tile(loaded, map, next); }, start, done);
    }
  }

  /// x W + b; `done(j, r, y_j, y_j+1)` gets what there is.
  template <class Done>
  __device__ __forceinline__ void linear(int id, const Features* in, Done done) const {
    linear_from(
        id, in, [](What, int, int) { return Begun{}; },
        [&](What, int j, int r, bool there, float low, float high) {
          if (there) done(j, r, low, high);
        });
  }

  /// silu(x W + b) for maps to read, computed whole by every block.
  __device__ void linear_silu(Features* to, int id, const Features* in) const {
    linear(id, in, [&](int j, int r, float low, float high) { put(to, j, r, silu(low), silu(high)); });
  }

  /// A tile's outputs j and j + 1 are the new residual stream's.
  __device__ __forceinline__ void to_stream(int j, int r, bool there, float low, float high) const {
    float sum = there ? fmaf(low, low, __fmul_rn(high, high)) : 0.f;
    if (there) {
      x()[j * ROWS + r] = low;
      x()[(j + 1) * ROWS + r] = high;
      spread(stream(), j / 2, r, split<PIECES<W>>(low, high));
    }
#pragma unroll
    for (int distance = 4; distance < WARP; distance *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (there && lane() < 4) spread(&power()[j / TILE * ROWS + r], sum);
  }

  /// A map whose outputs are the new residual stream.
  template <class Start>
  __device__ __forceinline__ void linear_stream(int id, const Features* in, Start start) const {
    linear_from(
        id, in, [&](What, int j, int r) { return Begun{{start(j, r)}}; },
        [&](What, int j, int r, bool there, float low, float high) { to_stream(j, r, there, low, high); });
  }

  /// Cosines and sines at the rows' positions in stack `which`: those of the multiple of ANGLES below, reduced in f64, turned on by the rest.
  __device__ __forceinline__ void turn(const DecodeStack& stack, int which) const {
    const int head_dim = stack.head_dim, half = head_dim / 2;
    const float* const low = a().exact + stack.angles;
    // By the last warps, which have fewer tiles.
    for (int r = n_warps() - 1 - warp(); r < n_rows(); r += n_warps()) {
      const int64_t pos = rows()[r].at[which].pos;
      const int rest = int(pos & (ANGLES - 1));
      for (int f = lane(); f < half; f += WARP) {
        float* const base = bases() + (which * ROWS + r) * m().angle_width + f;
        const float cos_b = low[rest * head_dim + f], sin_b = low[rest * head_dim + half + f];
        // Each thread keeps its own.
        if (block().fresh || rest == 0) {
          double sine, cosine;
          sincospi(double(pos - rest) * a().doubles[stack.frequencies + f], &sine, &cosine);
          base[0] = float(cosine);
          base[half] = float(sine);
        }
        const float cos_a = base[0], sin_a = base[half];
        float* const out = angles() + r * m().angle_width + f;
        out[0] = turned_low(cos_a, sin_a, cos_b, sin_b);
        out[half] = turned_high(cos_a, sin_a, cos_b, sin_b);
      }
    }
  }

  /// A row's cache of the block of a stack whose caches begin at `cache`: those of all streams lie together, so that a fine tier's
  /// are few pages.
  __device__ W* cached(const DecodeStack& stack, int64_t cache, int r) const {
    return static_cast<W*>(a().caches) + cache * a().capacity + int64_t(rows()[r].stream) * stack.block_cache;
  }

  /// Attention of this block's heads in stack `which`, a warp for a head of a row: queries and keys of `wide` normalised and rotated, keys and
  /// values into the caches, softmax over what is there; `attended` in all copies. A head has at most 128 values.
  __device__ __forceinline__ void attend(const DecodeStack& stack, int which, int64_t cache) const {
    // 16 bytes on their way at a time; a lane's pairs of features.
    constexpr int V = VEC<W>, LOADS = 8, PAIRS = 2;
    const int head_dim = stack.head_dim, half = head_dim / 2, window = stack.window, vectors = stack.vectors, padded = vectors * V;
    const int sharers = stack.sharers, shared_by = WARP / sharers, sharer = lane() * stack.over_vectors / 1024, mine = lane() - sharer * vectors;
    const int size = Room::size(), heads = size == 1 ? stack.n_heads : (stack.n_heads - rank() + size - 1) / size;
    const int room = (m().angle_width + VEC<bf16> - 1) / VEC<bf16> * VEC<bf16>;
    float* const query = scratch() + warp() * 2 * room;
    W* const new_value = reinterpret_cast<W*>(query + room);
    const auto vector = [](const W* from) { return *reinterpret_cast<const float4*>(from); };
    for (int task = warp(); task < ROWS * heads; task += n_warps()) {
      const int r = task % ROWS, h = rank() + task / ROWS * size;
      if (r >= n_rows()) continue;
      const int slot = rows()[r].at[which].slot, filled = rows()[r].at[which].filled;
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
          if (const int f = head_dim + lane(); f < padded) query[f] = 0.f, new_value[f] = from_float<W>(0.f);
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
#pragma unroll 1
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
#pragma unroll 1
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
#pragma unroll 1
      for (int other = sharers / 2; other > 0; other /= 2)
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += __shfl_sync(ALL_LANES, sum[e], ((sharer ^ other) * vectors + mine) % WARP);
      // The sharers, who all have the sums now, write a pair in turn.
#pragma unroll 1
      for (int pair = sharer; pair < V / 2 && sharer < sharers; pair += sharers) {
        float low = sum[0], high = sum[1];
#pragma unroll
        for (int other = 1; other < V / 2; ++other)
          if (other == pair) low = sum[2 * other], high = sum[2 * other + 1];
        if (mine * V + 2 * pair < head_dim)
          spread(attended(), (h * head_dim + mine * V) / 2 + pair, r, split<PIECES<W>>(low * inverse, high * inverse));
      }
      // What the warp keeps was read (no emulated schedule shows it: lanes met in shuffles since, which order no memory).
      __syncwarp();  // unseen
    }
  }

  /// A tile's outputs j and j + 1 of a map of the stack's blocks, or of the tier's that leads into it. Queries, keys and values go into
  /// `wide`, to the block that has the head. Of gates and values, outputs j and j + 1 are gate and value of unit j / 2; four lanes on are the
  /// next unit's; silu(gate) * value into `inputs`.
  __device__ __forceinline__ void keep(What what, const DecodeStack& stack, int j, int r, bool there, float low, float high) const {
    if (what == BEGUN || what == ADDED) {
      to_stream(j, r, there, low, high);
    } else if (what == GATES) {
      const float unit = silu(low) * high, next = __shfl_sync(ALL_LANES, unit, (lane() + 4) % WARP);
      if (there && lane() / 4 % 2 == 0) spread(inputs(), j / 4, r, split<PIECES<W>>(unit, next));
    } else if (there) {
      float* const to = (what == HEADS ? wide() : x()) + j * ROWS + r;
      float* const at = what == HEADS && size() > 1 ? peer(to, j % stack.dim / stack.head_dim % size()) : to;
      at[0] = low;
      at[ROWS] = high;
    }
  }
};

/// A warp's way through the tiles of a stack's step: which comes next, with the first of its weights on their way.
template <class W, int ROWS>
struct Work {
  int map, tile;
  Loaded loaded;

  /// Begins a step whose maps are those from `first` on.
  __device__ __forceinline__ void begin(const Room<W, ROWS>& room, int first) {
    map = first;
    tile = warp();
    find(room);
    ask(room);
  }
  /// To the next tile, whose weights are not asked for yet.
  __device__ __forceinline__ void go_on(const Room<W, ROWS>& room) {
    tile += n_warps();
    find(room);
  }
  /// Asks for the tile's weights.
  __device__ __forceinline__ void ask(const Room<W, ROWS>& room) {
    const DecodeMap& at = room.maps()[map];
    if (at.k != NO_MAP)
      room.load_tile(loaded, at, tile);
    else
      loaded = {};
  }
  /// The tile is one of a later map if this one has none left.
  __device__ __forceinline__ void find(const Room<W, ROWS>& room) {
    const DecodeMap* at = &room.maps()[map];
    while (tile >= at->count && at->k != NO_MAP) {
      ++map, ++at;
      tile = warp() - at->before;
      if (tile < 0) tile += n_warps();
    }
  }
};

/// The number of the map that leads into a stack; one that adds to what it makes is the next. Those of the blocks begin with 0.
constexpr int INTO = -2;

/// The residual stream through all blocks of a stack at the rows' positions; `which` counts the stacks, `work` has begun it. `start(j, r)` is
/// what the map before begins with, `done(what, j, r, y_j, y_j+1)` gets outputs that do not stay in the stack, `beside()` is other work for the
/// warps that have no head. No barrier comes after the map after.
///
/// What a sample waits for is one thing after the other: so all maps are one loop, in which each warp asks for the weights of its next tile as
/// soon as it has multiplied with those of this one.
template <class W, int ROWS, class Start, class Beside, class Done>
__device__ __forceinline__ void forward(const Room<W, ROWS>& room, Work<W, ROWS>& work, const DecodeStack& stack, int which, Start start,
                                        Beside beside, Done done) {
  constexpr int OF_A_BLOCK = 4;
  const int after = OF_A_BLOCK * stack.n_layers;
#pragma unroll 1
  for (int k = which < room.m().n_tiers ? INTO : 0; k <= after; ++k) {
    const bool leads_to_attention = k >= 0 && k < after && k % OF_A_BLOCK == 0;
#pragma unroll 1
    while (room.maps()[work.map].k == k) {
      const DecodeMap map = room.maps()[work.map];
      room.compute(
          map, work.tile, work.loaded,
          [&] {
            work.go_on(room);
            // What lies beyond attention is asked for after it: its registers are taken.
            if (!leads_to_attention || room.maps()[work.map].k == k) work.ask(room);
          },
          [&](What what, int j, int r) {
            if (what == ADDED) return Begun{{{room.x()[j * ROWS + r], room.x()[(j + 1) * ROWS + r]}}};
            return what == BEGUN || what == BEGINNING ? start(j, r) : Begun{};
          },
          [&](What what, int j, int r, bool there, float low, float high) {
            if (what < AFTER)
              room.keep(what, stack, j, r, there, low, high);
            else if (there)
              done(what, j, r, low, high);
          });
    }
    if (k == 0) room.turn(stack, which);
    // To the beginning each lane adds itself.
    if (k == INTO || k == after) continue;
    GROUP_BARRIER(room.size());  // publishes heads (in their block, with the angles), gated values, the residual stream
    if (!leads_to_attention) continue;
    room.attend(stack, which, stack.cache + int64_t(k / OF_A_BLOCK) * stack.block_cache);
    work.ask(room);
    if (k == 0) beside();
    GROUP_BARRIER(room.size());  // publishes what was attended to
  }
}

}  // namespace decode
