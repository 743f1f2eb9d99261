// Argument structs of the kernels, mirrored field by field in src/cuda/launch.rs; sizes are asserted on both sides.
// Pointers come first, so that whoever passes a struct along (the emulator) can find them.
#pragma once
#include <cstdint>

/// Attention. Layouts: q, o, d_o, dq [batch, n_heads, len, head_dim]; k, v, dk, dv [batch, n_kv_heads, len, head_dim];
/// lse, delta [batch, n_heads, len].
struct AttentionArgs {
  const void* q;
  const void* k;
  const void* v;
  void* o;          // written by forward, read by backward
  float* lse;       // ln of the sum of exp(score): written by forward, read by backward
  const void* d_o;  // the rest: backward
  float* delta;     // sum over head_dim of d_o * o: written with dq, read with dk and dv
  void* dq;
  void* dk;
  void* dv;
  int32_t n_heads;
  int32_t n_kv_heads;  // divides n_heads: query head h reads key head h / (n_heads / n_kv_heads)
  int32_t len;
  int32_t window;  // query i sees keys i - window + 1 ..= i
  float scale;     // of the scores
  int32_t reserved;
};
static_assert(sizeof(AttentionArgs) == 104, "AttentionArgs differs from src/cuda/launch.rs");
