// Causal sliding-window attention with grouped queries, forward and backward, f32 and bf16, arithmetic in f32.
//
//   score[i][j] = scale * q[i] . k[j]  for j in i - window + 1 ..= i, p = softmax over j, o[i] = sum p[i][j] v[j]
//
// Forward keeps lse[i] = ln sum exp(score[i][j]), from which backward makes p again:
//
//   delta[i] = d_o[i] . o[i], ds[i][j] = scale * p[i][j] * (d_o[i] . v[j] - delta[i])
//   dq[i] = sum ds[i][j] k[j],  dk[j] = sum ds[i][j] q[i],  dv[j] = sum p[i][j] d_o[i]
//
// (Dao, FlashAttention-2, 2023.) Each result is summed by one block in one order: no atomics, the same bits every time.
// Layouts in args.cuh. Geometry, for all three kernels: blocks of 128 threads over (tile of 32 rows, head, batch); the rows are
// queries, for dk and dv keys (and the head one of n_kv_heads). Dynamic shared memory: see src/cuda/launch.
// Oracle: `attention` in tests/kernels/attention.rs.
#include "common.cuh"

namespace attention_window {

constexpr int TILE = 32;      // rows of a tile, of queries as of keys
constexpr int THREADS = 128;  // 8 rows by 16 columns
constexpr int COLUMNS = 16;
constexpr int PADDED = TILE + 4;  // row of a tile of probabilities

// ---- helpers -------------------------------------------------------------------------------------------------------

/// Rows are padded by 4, so that 8 rows at one column lie in different banks, and stay 16-byte aligned.
template <int D>
constexpr int STRIDE = D + 4;

/// Thread (y, x) works on rows y, y + 8, y + 16, y + 24 and columns x, x + 16, ... of every product.
struct Place {
  int y, x;
  __device__ Place() : y(threadIdx.x / COLUMNS), x(threadIdx.x % COLUMNS) {}
  __device__ int row(int i) const { return y + 8 * i; }
  __device__ int column(int j) const { return x + COLUMNS * j; }
};

struct alignas(8) FourBf16 {
  bf16 x, y, z, w;
};
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float4 load4(const bf16* p) {
  const FourBf16 four = *reinterpret_cast<const FourBf16*>(p);
  return {to_float(four.x), to_float(four.y), to_float(four.z), to_float(four.w)};
}

/// Where the outputs of a head begin, and how far its rows are apart.
struct Outputs {
  size_t begin;
  int stride;
  __device__ Outputs(const AttentionArgs& a, int d, int batch, int head)
      : begin(a.joined ? (size_t(batch) * a.len * a.n_heads + head) * d : (size_t(batch) * a.n_heads + head) * a.len * d),
        stride(a.joined ? a.n_heads * d : d) {}
};

/// Rows first .. first + TILE of a matrix [len, D], whose rows are `stride` apart, into shared memory; 0 beyond its end.
template <class T, int D>
__device__ void load_tile(float* tile, const T* matrix, int first, int len, int stride = D) {
  for (int i = threadIdx.x; i < TILE * D / 4; i += THREADS) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    float4 four = {0.f, 0.f, 0.f, 0.f};
    if (first + row < len) four = load4(matrix + size_t(first + row) * stride + column);
    *reinterpret_cast<float4*>(tile + row * STRIDE<D> + column) = four;
  }
}

/// products[i][j] = a[row i] . b[column j]
template <int D>
__device__ void dot_rows(float (&products)[4][2], const float* a, const float* b, Place at) {
#pragma unroll
  for (int i = 0; i < 4; ++i) products[i][0] = products[i][1] = 0.f;
#pragma unroll 4
  for (int d = 0; d < D; d += 4) {
    float4 left[4], right[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = load4(a + at.row(i) * STRIDE<D> + d);
#pragma unroll
    for (int j = 0; j < 2; ++j) right[j] = load4(b + at.column(j) * STRIDE<D> + d);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        products[i][j] += left[i].x * right[j].x + left[i].y * right[j].y + left[i].z * right[j].z + left[i].w * right[j].w;
  }
}

/// sums[i][c] += sum over k of weights[row i][k] * matrix[k][column c]
template <int D>
__device__ void add_weighted(float (&sums)[4][D / COLUMNS], const float* weights, const float* matrix, Place at) {
#pragma unroll 2
  for (int k = 0; k < TILE; k += 4) {
    float4 weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) weight[i] = load4(weights + at.row(i) * PADDED + k);
#pragma unroll
    for (int c = 0; c < D / COLUMNS; ++c) {
      const float* column = matrix + k * STRIDE<D> + at.column(c);
      const float m[4] = {column[0], column[STRIDE<D>], column[2 * STRIDE<D>], column[3 * STRIDE<D>]};
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i][c] += weight[i].x * m[0] + weight[i].y * m[1] + weight[i].z * m[2] + weight[i].w * m[3];
    }
  }
}

template <class T, int D>
__device__ void store_rows(T* matrix, const float (&rows)[4][D / COLUMNS], int first, int len, Place at, int stride = D) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + at.row(i) >= len) continue;
    T* row = matrix + size_t(first + at.row(i)) * stride;
#pragma unroll
    for (int c = 0; c < D / COLUMNS; ++c) row[at.column(c)] = from_float<T>(rows[i][c]);
  }
}

/// The first key that any query from `query` on sees.
__device__ __forceinline__ int first_key(int query, const AttentionArgs& a) { return max(0, query - a.window + 1); }

__device__ __forceinline__ bool sees(int query, int key, const AttentionArgs& a) {
  return key <= query && key > query - a.window && query < a.len;
}

// ---- kernels -------------------------------------------------------------------------------------------------------

/// o and lse. Shared: q, k, v tiles, probabilities.
template <class T, int D>
__device__ void forward(const AttentionArgs& a) {
  SHARED_MEMORY(float, q);
  float* const k = q + TILE * STRIDE<D>;
  float* const v = k + TILE * STRIDE<D>;
  float* const weights = v + TILE * STRIDE<D>;
  const Place at;
  const int first_query = blockIdx.x * TILE;
  const size_t head = size_t(blockIdx.z) * a.n_heads + blockIdx.y;
  const size_t kv_head = size_t(blockIdx.z) * a.n_kv_heads + blockIdx.y / (a.n_heads / a.n_kv_heads);
  const size_t head_size = size_t(a.len) * D;

  float sums[4][D / COLUMNS] = {}, best[4], total[4];
  for (int i = 0; i < 4; ++i) {
    best[i] = -1e30f;  // below every score, and finite: best - best is 0
    total[i] = 0.f;
  }
  load_tile<T, D>(q, static_cast<const T*>(a.q) + head * head_size, first_query, a.len);
  const int end = min(a.len, first_query + TILE);
  for (int key = first_key(first_query, a); key < end; key += TILE) {
    load_tile<T, D>(k, static_cast<const T*>(a.k) + kv_head * head_size, key, a.len);
    load_tile<T, D>(v, static_cast<const T*>(a.v) + kv_head * head_size, key, a.len);
    __syncthreads();  // publishes the tiles
    float scores[4][2];
    dot_rows<D>(scores, q, k, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool seen[2];
      float highest = best[i];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        scores[i][j] *= a.scale;
        seen[j] = sees(first_query + at.row(i), key + at.column(j), a);
        if (seen[j]) highest = fmaxf(highest, scores[i][j]);
      }
      highest = lanes_max<COLUMNS>(highest);
      const float shrink = __expf(best[i] - highest);
      best[i] = highest;
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        scores[i][j] = seen[j] ? __expf(scores[i][j] - highest) : 0.f;
        sum += scores[i][j];
      }
      total[i] = total[i] * shrink + lanes_sum<COLUMNS>(sum);
#pragma unroll
      for (int j = 0; j < 2; ++j) weights[at.row(i) * PADDED + at.column(j)] = scores[i][j];
#pragma unroll
      for (int c = 0; c < D / COLUMNS; ++c) sums[i][c] *= shrink;
    }
    __syncwarp();  // publishes the weights: a row's 16 threads lie in one warp
    add_weighted<D>(sums, weights, v, at);
    __syncthreads();  // everyone has read the tiles
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = first_query + at.row(i);
    if (query < a.len && at.x == 0) a.lse[head * a.len + query] = best[i] + __logf(total[i]);
#pragma unroll
    for (int c = 0; c < D / COLUMNS; ++c) sums[i][c] /= total[i];
  }
  const Outputs out(a, D, blockIdx.z, blockIdx.y);
  store_rows<T, D>(static_cast<T*>(a.o) + out.begin, sums, first_query, a.len, at, out.stride);
}

/// delta and dq. Shared: q, d_o, k, v tiles, ds, delta, lse.
template <class T, int D>
__device__ void backward_queries(const AttentionArgs& a) {
  SHARED_MEMORY(float, q);
  float* const d_o = q + TILE * STRIDE<D>;
  float* const k = d_o + TILE * STRIDE<D>;
  float* const v = k + TILE * STRIDE<D>;
  float* const ds = v + TILE * STRIDE<D>;
  float* const delta = ds + TILE * PADDED;
  float* const lse = delta + TILE;
  const Place at;
  const int first_query = blockIdx.x * TILE;
  const size_t head = size_t(blockIdx.z) * a.n_heads + blockIdx.y;
  const size_t kv_head = size_t(blockIdx.z) * a.n_kv_heads + blockIdx.y / (a.n_heads / a.n_kv_heads);
  const size_t head_size = size_t(a.len) * D;

  load_tile<T, D>(q, static_cast<const T*>(a.q) + head * head_size, first_query, a.len);
  const Outputs out(a, D, blockIdx.z, blockIdx.y);
  load_tile<T, D>(d_o, static_cast<const T*>(a.d_o) + out.begin, first_query, a.len, out.stride);
  {  // delta: four threads a row
    const int row = threadIdx.x / 4, query = first_query + row;
    float sum = 0.f;
    if (query < a.len) {
      const size_t offset = out.begin + size_t(query) * out.stride;
      const T* const left = static_cast<const T*>(a.d_o) + offset;
      const T* const right = static_cast<const T*>(a.o) + offset;
      for (int d = threadIdx.x % 4; d < D; d += 4) sum += to_float(left[d]) * to_float(right[d]);
    }
    sum = lanes_sum<4>(sum);
    if (threadIdx.x % 4 == 0) {
      delta[row] = sum;
      lse[row] = query < a.len ? a.lse[head * a.len + query] : 0.f;
      if (query < a.len) a.delta[head * a.len + query] = sum;
    }
  }

  float dq[4][D / COLUMNS] = {};
  const int end = min(a.len, first_query + TILE);
  for (int key = first_key(first_query, a); key < end; key += TILE) {
    load_tile<T, D>(k, static_cast<const T*>(a.k) + kv_head * head_size, key, a.len);
    load_tile<T, D>(v, static_cast<const T*>(a.v) + kv_head * head_size, key, a.len);
    __syncthreads();  // publishes the tiles, delta and lse
    float scores[4][2], dp[4][2];
    dot_rows<D>(scores, q, k, at);
    dot_rows<D>(dp, d_o, v, at);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = at.row(i), column = at.column(j);
        const bool seen = sees(first_query + row, key + column, a);
        const float p = seen ? __expf(scores[i][j] * a.scale - lse[row]) : 0.f;
        ds[row * PADDED + column] = a.scale * p * (dp[i][j] - delta[row]);
      }
    __syncwarp();  // publishes ds: a row's 16 threads lie in one warp
    add_weighted<D>(dq, ds, k, at);
    __syncthreads();  // everyone has read the tiles
  }
  store_rows<T, D>(static_cast<T*>(a.dq) + head * head_size, dq, first_query, a.len, at);
}

/// dk and dv, after backward_queries. Shared: k, v, q, d_o tiles, p and ds (rows are keys), delta, lse.
template <class T, int D>
__device__ void backward_keys(const AttentionArgs& a) {
  SHARED_MEMORY(float, k);
  float* const v = k + TILE * STRIDE<D>;
  float* const q = v + TILE * STRIDE<D>;
  float* const d_o = q + TILE * STRIDE<D>;
  float* const p = d_o + TILE * STRIDE<D>;
  float* const ds = p + TILE * PADDED;
  float* const delta = ds + TILE * PADDED;
  float* const lse = delta + TILE;
  const Place at;
  const int first = blockIdx.x * TILE, group = a.n_heads / a.n_kv_heads;
  const size_t kv_head = size_t(blockIdx.z) * a.n_kv_heads + blockIdx.y;
  const size_t head_size = size_t(a.len) * D;

  load_tile<T, D>(k, static_cast<const T*>(a.k) + kv_head * head_size, first, a.len);
  load_tile<T, D>(v, static_cast<const T*>(a.v) + kv_head * head_size, first, a.len);
  float dk[4][D / COLUMNS] = {}, dv[4][D / COLUMNS] = {};
  // The last of the tile's keys is seen by window - 1 queries after it.
  const int end = a.len - first - TILE < a.window ? a.len : first + TILE - 1 + a.window;
  for (int member = 0; member < group; ++member) {
    const size_t head = size_t(blockIdx.z) * a.n_heads + blockIdx.y * group + member;
    for (int query = first; query < end; query += TILE) {
      load_tile<T, D>(q, static_cast<const T*>(a.q) + head * head_size, query, a.len);
      const Outputs out(a, D, blockIdx.z, blockIdx.y * group + member);
      load_tile<T, D>(d_o, static_cast<const T*>(a.d_o) + out.begin, query, a.len, out.stride);
      if (threadIdx.x < TILE) {
        const int row = query + threadIdx.x;
        delta[threadIdx.x] = row < a.len ? a.delta[head * a.len + row] : 0.f;
        lse[threadIdx.x] = row < a.len ? a.lse[head * a.len + row] : 0.f;
      }
      __syncthreads();  // publishes the tiles, delta and lse
      float scores[4][2], dp[4][2];
      dot_rows<D>(scores, k, q, at);
      dot_rows<D>(dp, v, d_o, at);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = at.row(i), column = at.column(j);
          const bool seen = sees(query + column, first + row, a);
          const float weight = seen ? __expf(scores[i][j] * a.scale - lse[column]) : 0.f;
          p[row * PADDED + column] = weight;
          ds[row * PADDED + column] = a.scale * weight * (dp[i][j] - delta[column]);
        }
      __syncwarp();  // publishes p and ds: a row's 16 threads lie in one warp
      add_weighted<D>(dk, ds, q, at);
      add_weighted<D>(dv, p, d_o, at);
      __syncthreads();  // everyone has read the tiles
    }
  }
  store_rows<T, D>(static_cast<T*>(a.dk) + kv_head * head_size, dk, first, a.len, at);
  store_rows<T, D>(static_cast<T*>(a.dv) + kv_head * head_size, dv, first, a.len, at);
}

// ---- entry points --------------------------------------------------------------------------------------------------

#define ENTRIES(name, T, D)                                                                                      \
  KERNEL(attention_window_forward_##name##_##D, AttentionArgs, THREADS, forward<T, D>)                           \
  KERNEL(attention_window_backward_queries_##name##_##D, AttentionArgs, THREADS, backward_queries<T, D>)         \
  KERNEL(attention_window_backward_keys_##name##_##D, AttentionArgs, THREADS, backward_keys<T, D>)
#define BOTH_TYPES(D) ENTRIES(f32, float, D) ENTRIES(bf16, bf16, D)

BOTH_TYPES(32)
BOTH_TYPES(48)
BOTH_TYPES(64)
BOTH_TYPES(96)
BOTH_TYPES(128)

#undef BOTH_TYPES
#undef ENTRIES

}  // namespace attention_window
