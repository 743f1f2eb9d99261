// Argument structs of the kernels, mirrored field by field in src/cuda/launch; sizes are asserted on both sides.
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
static_assert(sizeof(AttentionArgs) == 104, "AttentionArgs differs from src/cuda/launch");

/// Autocorrelation of the samples before each block: r [batch, n_blocks, order + 1] of samples [batch, len].
struct PastAutocorrelationArgs {
  const float* samples;
  const double* window;  // [window_len], the latest sample's last
  double* r;
  double white_relative;  // of the power, added to it
  double white_absolute;  // added to the power
  int32_t len;
  int32_t window_len;
  int32_t hop;          // samples of a block
  int32_t first_block;  // block b of the output follows sample (first_block + b) * hop; before sample 0 there is silence
  int32_t n_blocks;
  int32_t order;
};
static_assert(sizeof(PastAutocorrelationArgs) == 64, "PastAutocorrelationArgs differs from src/cuda/launch");

/// Autocorrelation of the spectrum that each plan frame describes: r [n_frames, order + 1] of bands [n_frames, n_bands].
struct PlannedAutocorrelationArgs {
  const float* bands;
  const int32_t* neighbours;  // [n_bins, 2]: the bands below and above a bin
  const double* weights;      // [n_bins]: of the band above
  const double* lag_window;   // [order + 1]
  double* r;
  double white_relative;
  double white_absolute;
  int32_t n_bands;
  int32_t n_bins;
  int32_t order;  // below n_bins
  int32_t reserved;
};
static_assert(sizeof(PlannedAutocorrelationArgs) == 72, "PlannedAutocorrelationArgs differs from src/cuda/launch");

/// Levinson-Durbin recursion: r [n, order + 1] -> coefficients [n, order], the latest sample's first; log_scale [n].
struct LevinsonArgs {
  const double* r;
  float* coefficients;
  float* log_scale;  // ln of the mean |residual|
  int32_t n;
  int32_t order;
};
static_assert(sizeof(LevinsonArgs) == 32, "LevinsonArgs differs from src/cuda/launch");

/// Forecasts [batch, len - first_block * hop] of the samples [batch, len] from first_block * hop on, each from those before it.
struct PredictArgs {
  const float* samples;
  const float* coefficients;  // [batch, n_blocks, order]
  float* forecasts;
  int32_t len;
  int32_t hop;
  int32_t first_block;
  int32_t n_blocks;
  int32_t order;
  int32_t reserved;
};
static_assert(sizeof(PredictArgs) == 48, "PredictArgs differs from src/cuda/launch");

/// RMSNorm of x [rows, dim]; y, d_y, d_x likewise.
struct RmsNormArgs {
  const void* x;
  const float* gain;   // [dim], or null for none
  void* y;
  float* inverse_rms;  // [rows]: written by forward, read by backward
  const void* d_y;
  void* d_x;
  float* d_gain_parts;  // [n_parts, dim]: sums over rows_per_part rows each
  int32_t rows;
  int32_t dim;
  int32_t rows_per_part;
  int32_t reserved;
};
static_assert(sizeof(RmsNormArgs) == 72, "RmsNormArgs differs from src/cuda/launch");

/// Sums of the columns of parts [rows, dim].
struct ColumnSumsArgs {
  const float* parts;
  float* sums;  // [dim]
  int32_t rows;
  int32_t dim;
};
static_assert(sizeof(ColumnSumsArgs) == 24, "ColumnSumsArgs differs from src/cuda/launch");

/// silu(gate) * value of up [rows, gate and value of `hidden` each]; y, d_y [rows, hidden]; d_up as up.
struct SwigluArgs {
  const void* up;
  void* y;
  const void* d_y;
  void* d_up;
  int32_t rows;
  int32_t hidden;
};
static_assert(sizeof(SwigluArgs) == 40, "SwigluArgs differs from src/cuda/launch");

/// -ln softmax(logits)[target]; logits, d_logits [rows, classes].
struct CrossEntropyArgs {
  const void* logits;
  const uint32_t* targets;  // [rows]
  float* nll;               // [rows]: NaN where the target is no class
  float* lse;               // [rows]: written by forward, read by backward
  const float* d_nll;       // [rows]
  void* d_logits;
  int32_t rows;
  int32_t classes;
};
static_assert(sizeof(CrossEntropyArgs) == 56, "CrossEntropyArgs differs from src/cuda/launch");

/// -ln of a mixture of logistics' mass in a bin; head, d_head [n, 3, components]: log weights, offsets, log scales.
struct MixtureNllArgs {
  const float* head;
  const float* forecasts;  // [n, 2]: of the first and the second half of the components
  const float* units;      // [n, 2]: of offsets and scales
  const float* low;        // [n]: edges of the bin
  const float* high;       // [n]
  float* nll;              // [n]
  const float* d_nll;      // [n]
  float* d_head;
  int32_t n;
  int32_t components;
};
static_assert(sizeof(MixtureNllArgs) == 72, "MixtureNllArgs differs from src/cuda/launch");
