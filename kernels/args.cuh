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
  int32_t joined;  // 1: o and d_o lie [batch, len, n_heads, head_dim], not [batch, n_heads, len, head_dim]
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

/// The plan's analysis over the bins of a transform of n = 2 * (n_bins - 1) values, n / 2 without prime factors above 3 (PlanGrid of
/// src/cuda/launch). Places: [n_bins, 2] the bands below and above each bin; and if the plan is to be sharpened [n_bands + 1, 2] each
/// row's (band's) first bin and where its weights begin; [n_bins, 2] the first band that sees a bin, and the one after the last.
/// Numbers: [n_bins] the weight of the band above; [n_bins] 1 / the sum of a column's weights (if sharpened); [n, 2] exp(-2 pi i j / n);
/// the rows' weights, one row after the other, and of the window's energy what lies on a frame's own samples (if sharpened).

/// Autocorrelation of the spectrum that each plan frame describes: r [batch, n_blocks, order + 1] of bands [batch, n_blocks + 1, n_bands],
/// of which an excerpt's first is the frame before.
struct PlannedAutocorrelationArgs {
  const float* bands;
  const int32_t* places;     // of a PlanGrid
  const double* numbers;     // likewise
  const double* lag_window;  // [order + 1]
  double* r;
  float* lines;  // [batch, n_blocks, n_bins]: how many lines were taken out, and of each its bin and the power taken; null: none is
  double white_relative;
  double white_absolute;
  int32_t n_blocks;
  int32_t n_bands;
  int32_t n_bins;
  int32_t order;          // below n_bins
  int32_t deconvolution;  // steps; 0: the bands alone
  int32_t reserved;
};
static_assert(sizeof(PlannedAutocorrelationArgs) == 88, "PlannedAutocorrelationArgs differs from src/cuda/launch");

/// The tones that lines go on as, in their block and, if they went on, in the next: now, later [batch, n_blocks, hop].
struct TonesArgs {
  const float* samples;   // [batch, len]
  const float* lines;     // as above
  const int32_t* places;  // of a PlanGrid
  const double* numbers;  // likewise
  const double* window;   // [window_len]: the plan's
  const double* lobe;     // as in DecodeModel
  float* now;
  float* later;
  int32_t len;
  int32_t hop;
  int32_t first_block;  // block b follows sample (first_block + b) * hop; before sample 0 there is silence
  int32_t n_blocks;
  int32_t n_bands;
  int32_t n_bins;
  int32_t window_len;
  int32_t reserved;
};
static_assert(sizeof(TonesArgs) == 96, "TonesArgs differs from src/cuda/launch");

/// The tones of all samples, 0 before the first block, and what they leave over: samples, tones, left [batch, len].
struct LeftArgs {
  const float* samples;
  const float* now;
  const float* later;
  float* tones;
  float* left;
  int32_t len;
  int32_t hop;
  int32_t first_block;
  int32_t n_blocks;
};
static_assert(sizeof(LeftArgs) == 56, "LeftArgs differs from src/cuda/launch");

/// Levinson-Durbin recursion: r [batch * n_blocks, order + 1] -> coefficients [batch * n_blocks, order], the latest sample's first; log_scale
/// [batch * n_blocks].
struct LevinsonArgs {
  const double* r;
  const float* samples;  // [batch, len]: what is louder than r[0] before a block is damped; null: nothing is
  float* coefficients;
  float* log_scale;  // ln of the mean |residual|
  int32_t n;         // batch * n_blocks
  int32_t order;
  int32_t len;
  int32_t hop;
  int32_t first_block;  // block b follows sample (first_block + b) * hop; before sample 0 there is silence
  int32_t n_blocks;
};
static_assert(sizeof(LevinsonArgs) == 56, "LevinsonArgs differs from src/cuda/launch");

/// Forecasts [batch, len - first_block * hop] of the samples [batch, len] from first_block * hop on, each from those before it.
struct PredictArgs {
  const float* samples;
  const float* coefficients;  // [batch, n_blocks, order]
  const float* tones;         // [batch, len]: added to what is predicted; or null
  float* forecasts;
  int32_t len;
  int32_t hop;
  int32_t first_block;
  int32_t n_blocks;
  int32_t order;
  int32_t reserved;
};
static_assert(sizeof(PredictArgs) == 56, "PredictArgs differs from src/cuda/launch");

/// RMSNorm of x [rows, dim]; y, d_y, d_x likewise.
struct RmsNormArgs {
  const float* x;
  const float* gain;   // [dim], or null for none
  void* y;
  float* inverse_rms;  // [rows]: written by forward, read by backward
  const void* d_y;
  float* d_x;
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

/// y = silu(z + bias); z, y, d_y, d_z [rows, dim].
struct SiluArgs {
  const float* z;
  const float* bias;  // [dim]
  float* y;
  const float* d_y;     // the rest: backward
  float* d_z;
  float* d_bias_parts;  // [parts, dim]: of d_z, sums over rows_per_part rows each
  int32_t rows;
  int32_t dim;
  int32_t rows_per_part;
  int32_t reserved;
};
static_assert(sizeof(SiluArgs) == 64, "SiluArgs differs from src/cuda/launch");

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

/// What attention reads of qkv [rows = batch * len, 3 * n_heads * head_dim], whose sequences begin at position 0: queries and keys,
/// RMS-normalised and rotated (RoPE), and values; q, k, v and their gradients [batch, n_heads, len, head_dim].
struct SplitHeadsArgs {
  const void* qkv;
  void* q;
  void* k;
  void* v;
  const void* d_q;  // the rest: backward
  const void* d_k;
  const void* d_v;
  void* d_qkv;
  const float* turns;  // [at least len, head_dim]: cosines, then sines, of positions
  int32_t rows;
  int32_t len;
  int32_t n_heads;
  int32_t head_dim;  // even, at most 128
};
static_assert(sizeof(SplitHeadsArgs) == 88, "SplitHeadsArgs differs from src/cuda/launch");

/// y = x and a row of each of the tables; x, y, d_y [rows, dim]; the tables one after the other, each [entries, dim].
struct GatherArgs {
  const float* x;
  const float* table;
  const uint32_t* codes;  // [rows, n_tables]: rows of `table`, the t-th among those of table t
  float* y;
  const float* d_y;       // the rest: backward
  float* d_table_parts;   // [n_parts, n_tables * entries, dim]: sums over rows_per_part rows each
  int32_t rows;
  int32_t dim;
  int32_t n_tables;
  int32_t entries;
  int32_t rows_per_part;
  int32_t reserved;
};
static_assert(sizeof(GatherArgs) == 72, "GatherArgs differs from src/cuda/launch");

/// y = x + z, n values each; y may be x or, where z is f32, z.
struct AddArgs {
  const float* x;
  const void* z;
  float* y;
  int64_t n;
};
static_assert(sizeof(AddArgs) == 32, "AddArgs differs from src/cuda/launch");

/// A step of AdamW on n weights; what the factors are, src/train/optimizer.rs says.
struct AdamwArgs {
  float* weights;
  const float* gradients;
  float* means;
  float* squares;
  float* averages;
  int32_t n;
  float gradient;
  float rate;
  float square;
  float decay;
  float average;
};
static_assert(sizeof(AdamwArgs) == 64, "AdamwArgs differs from src/cuda/launch");

// ---- generation ----------------------------------------------------------------------------------------------------

/// A linear map. Its weights come in tiles of 16 outputs, each in steps of 16 inputs, each in pieces (numbers in bf16 whose sum a weight
/// is), each the 16 bytes of each of 32 lanes: see `multiply` in decode_tile.cuh. What a tile has beyond n_out and n_in is 0.
struct DecodeLinear {
  int64_t weights;   // where they begin
  int64_t bias;      // in `exact`; -1 for none
  int32_t n_in;
  int32_t n_out;
  int32_t pieces;
  int32_t whole;     // 1: every block of a group computes all outputs; 0: each its share
  int32_t resident;  // where a block keeps its share in shared memory, in bytes; -1: it stays in device memory
  int32_t reserved;
};
static_assert(sizeof(DecodeLinear) == 40, "DecodeLinear differs from src/cuda/launch");

/// A map as a step of a stack has it, a block's share of its tiles. Those of a step lie one after the other; after them comes one whose k
/// is NO_MAP. Tile i of maps with the same k, counted on from map to map, is warp (i % warps)'s.
struct alignas(16) DecodeMap {
  int64_t weights;      // where those of the first tile begin, in bytes: in device memory or, if `resident`, in shared memory
  int32_t tile_bytes;
  uint16_t count;       // tiles
  uint16_t before;      // of those before it with the same k, modulo the warps
  int32_t bias;         // in `exact`; -1 for none
  uint16_t inputs;      // where they lie in shared memory, in units of 16 bytes
  uint16_t odd_inputs;  // likewise, of odd samples
  uint16_t n_in;
  uint16_t n_out;
  uint16_t output;  // the first
  int16_t k;        // the map's number in `forward`
  uint8_t what;     // What of decode_step.cuh
  uint8_t of;       // pieces that a weight is the sum of
  uint8_t normalized;  // the inputs are the residual stream, to be divided by their root mean square
  uint8_t resident;
  int32_t reserved[3];
};
static_assert(sizeof(DecodeMap) == 48, "DecodeMap differs from src/cuda/launch");
constexpr int NO_MAP = 0x7fff;

/// A stack of transformer blocks.
struct DecodeStack {
  int64_t cache;        // values of a stream's caches before its own: per block keys [n_heads, vectors, window, V], values
                        // [n_heads, window, vectors, V], where vectors of V values, 16 bytes, hold a head's, the last filled up with 0
  int32_t dim;
  int32_t n_layers;
  int32_t n_heads;
  int32_t window;
  int32_t linears;      // number of the first block's first map; each block has qkv, out, up, down. The outputs of up alternate:
                        // gate, value
  int32_t angles;       // in `exact`: cosines and sines of the positions 0..64, [64, head_dim]
  int32_t frequencies;  // in `doubles`: half turns per position, [head_dim / 2]
  int32_t block_cache;  // values of a stream's cache of a block
  int32_t head_dim;
  int32_t vectors;   // of 16 bytes that hold a head's values
  int32_t sharers;   // lanes that share the positions, when each has one of the vectors of the values; a power of two
  int32_t over_vectors;  // lane * over_vectors / 1024 is lane / vectors
};
static_assert(sizeof(DecodeStack) == 56, "DecodeStack differs from src/cuda/launch");

struct DecodeTier {
  DecodeStack stack;
  int32_t hop;
  int32_t seen;     // tokens before the step that it reads
  int32_t input;    // numbers of its maps
  int32_t plan_in;
  int32_t down;     // -1: none
  int32_t planned;  // in a frame: what the plan adds to its input, [dim]
  int32_t handed;   // in a stream's memory: what it hands to the sub-steps of the next tier, [sub-steps, dim of that]
  int32_t first_map;
};
static_assert(sizeof(DecodeTier) == 88, "DecodeTier differs from src/cuda/launch");

constexpr int MAX_TIERS = 4;

/// Sizes of a model and where its parts lie.
struct DecodeModel {
  DecodeStack plan;
  DecodeTier tiers[MAX_TIERS];
  int32_t n_tiers;
  int32_t n_linears;
  int32_t n_bands;
  int32_t n_bins;
  int32_t plan_hop;
  int32_t n_codebooks;
  int32_t n_entries;
  int32_t order;  // of the forecast from the past
  int32_t past_window;
  int32_t past_hop;
  int32_t plan_window_len;
  int32_t planned_order;
  int32_t deconvolution;  // steps; 0: the plan is not sharpened, and nothing is damped
  int32_t token_width;   // features of a token
  int32_t pcm;          // tokens are samples of 16 bits; else the bins of mu-law
  int32_t fine_residual;  // the forecast from the past leaves steps of 16 bits; else bins of mu-law
  int32_t n_components;  // both halves
  int32_t slices;
  float own_scale;
  // Numbers of maps.
  int32_t bands;
  int32_t heads;  // two per codebook
  int32_t plan_mlp;        // two
  int32_t planned_scales;  // two
  int32_t feature_in;
  int32_t head;
  int32_t shortcut;  // three
  // In `exact`.
  int32_t embeddings;        // [n_codebooks, n_entries, dim]
  int32_t given;             // [n_codebooks - 1, n_entries, dim]
  int32_t plan_gain;         // [dim]
  int32_t book_mean;         // [n_bands]
  int32_t book_ceiling;      // [n_bands]
  int32_t books;             // [n_codebooks, n_entries, n_bands]
  int32_t code_vectors;      // [N_CODES, token_width - 2]
  int32_t past_code_in;      // [N_CODES, dim of the last tier]
  int32_t residual_code_in;  // likewise
  int32_t centres;           // [N_CODES]: samples of mu-law's tokens
  int32_t edges;             // [N_CODES - 1]: between their bins
  // In `doubles`.
  int32_t window;        // [past_window]
  int32_t grid_numbers;  // of a PlanGrid
  int32_t lag_window;    // [planned_order + 1]
  int32_t plan_window;   // [plan_window_len], if there are tones
  int32_t lobe;          // that window's transform at -1/2 ..= 1/2 bins, [65, 2], and the mean square of a line whose bins have a
                         // power of 1 in sum
  // In a stream's memory; rings have a power of two of places, sample n lies in place n modulo that.
  int32_t samples;        // ring of what tokens decode to
  int32_t n_samples;
  int32_t heard;          // ring of samples before they were rounded
  int32_t n_heard;        // 0: there are no tones
  int32_t left;           // ring of what tones left over of these
  int32_t n_left;
  int32_t tones;          // of the frame that is played, [plan_hop]
  int32_t rest;           // how they would go on, likewise
  int32_t plan_frames;    // the last three, oldest first, [3, n_bands]
  int32_t hidden;         // of the plan transformer after the last frame
  int32_t drive;          // mean square of what was drawn
  int32_t memory_stride;  // floats of a stream's memory
  int32_t n_tokens;       // places of a stream's ring of tokens
  int32_t n_recent;       // places of the ring of samples in shared memory, at least `order`
  // In a frame: planned log scale, root mean square, power of a sample, and
  int32_t frame_coefficients;  // [planned_order]
  int32_t frame_lines;         // how many, and of each its bin and the power of its bins in sum that is a tone's
  int32_t frame_scales;        // [slices, n_components]
  int32_t frame_stride;
  int32_t angle_width;  // greatest head_dim
  int32_t refine;       // number of a map, or -1
  int64_t cache_stride;  // values of a stream's caches
};
static_assert(sizeof(DecodeModel) == 664, "DecodeModel differs from src/cuda/launch");

/// Regions of a block's shared memory, first these arguments and the model; everything from X on to RESIDENT is scratch where no activations are kept.
enum DecodeRegion {
  DECODE_HEADER, DECODE_MAPS, DECODE_ROWS, DECODE_SAMPLES, DECODE_LEFT, DECODE_TOKENS, DECODE_PAST, DECODE_PLANNED,
  DECODE_FEATURES, DECODE_HEAD, DECODE_FIRST, DECODE_SECOND, DECODE_TONES, DECODE_SCALES, DECODE_HIGH, DECODE_ANGLES, DECODE_TABLES,
  DECODE_X, DECODE_STREAM, DECODE_POWER, DECODE_WIDE, DECODE_ATTENDED, DECODE_SCRATCH, DECODE_RESIDENT, DECODE_REGIONS
};

/// Generation of `n_frames` plan frames of `streams` streams. State, from `counters` to `past`, has a place for each of `capacity` streams; everything after `who`
/// has one for each whose turn it is.
struct DecodeArgs {
  const DecodeModel* model;
  const DecodeLinear* linears;
  const DecodeMap* maps;      // [group_size, n_maps]: those of the plan's stack, then of the tiers'
  const bf16* weights;
  const float* exact;
  const double* doubles;
  const int32_t* places;      // of a PlanGrid
  int64_t* counters;          // [capacity, 4]: samples, plan frames, residual code, nothing
  int32_t* ring_tokens;       // [capacity, n_tokens]
  float* memory;              // [capacity, memory_stride]
  void* caches;               // as weights are, cache_stride values a stream: block after block, of each [capacity, block_cache]
  float* frames;              // [capacity, 2, frame_stride]
  float* past;                // [capacity, order]: coefficients of the forecast from the past
  uint32_t* flags;            // [sets of streams, 4], 0 at launch: samples played, coefficients made, frames made, nothing
  const int32_t* who;         // [streams]: whose turn it is, of the `capacity` streams that have a state; each once at most
  const float* plan_uniforms; // [streams, n_frames, n_codebooks]; null: plan_tokens are given
  const float* wave_uniforms; // [streams, n_frames, plan_hop, 2]; null: tokens are given
  int32_t* plan_tokens;       // [streams, n_frames, n_codebooks]
  float* bands;               // [streams, n_frames, n_bands]: written if there is a plan to be made, else given
  int32_t* tokens;            // [streams, n_frames, plan_hop]
  float* nll;                 // of tokens, likewise, or null
  float* plan_draws;          // [streams, n_frames, 2]: what the plan tokens cost, what they would on average; or null
  int32_t streams;
  int32_t n_frames;
  int32_t groups;      // of blocks; each plays every so manyth set of streams
  int32_t group_size;  // blocks that share the wave transformer's work, a cluster
  int32_t overlapped;  // 1: plan and forecast from the past have blocks of their own, in two clusters more
  int32_t make_plan;   // 1: the plan transformer runs
  int32_t make_wave;   // 1: the wave transformer runs
  int32_t top_k;
  float temperature;
  float top_p;
  float min_p;
  float grain;
  float past_weight;
  float offset;
  float level;  // added to the bands of a frame before it is played
  int32_t at[DECODE_REGIONS];  // where regions begin, in bytes
  int32_t n_maps;
  int32_t capacity;
  int32_t reserved;
};
static_assert(sizeof(DecodeArgs) == 344, "DecodeArgs differs from src/cuda/launch");
