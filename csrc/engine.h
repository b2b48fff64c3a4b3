// The CPU engine: the contract of every kernel, and the prepacked layout byte by byte.
//
// Plain C. No torch, no Python, no state: a prepacked network is one relocatable blob of bytes, and a call reads the
// blob and x, writes out, and remembers nothing.
//
// Four paths through a network, each with a layout of its own:
//
//   tables  few rows of the batch at a time (a vector holds 16 output features of one row): for small batches, and
//           for int8 at every size where the processor has the instructions. The activations of a step are looked up in
//           registers.
//   slices  sliced ELLPACK, 64 rows of the batch at a time, transposed (a vector holds one feature of 16 rows): for
//           large batches.
//   blocks  for networks whose weights are kept in blocks of 16 x 4, or all of them: any number of rows, as they come.
//   filled  the same for single weights that stand close: what is pruned in a block is filled in. For float32 and
//           bfloat16.
//
// In float32 and bfloat16 tables, slices and filled blocks add the same products in the same order, and blocks in one
// of their own, so that a row's result is equal to the bit at every batch size, thread count and ISA, but for the sign
// of a zero. In int8 sums are integers, and exact.
#ifndef LT4REC_SPARSE_ENGINE_H
#define LT4REC_SPARSE_ENGINE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// How a network computes.
//   F32  float32 throughout.
//   BF16 weights and the activations that enter a layer are rounded to bfloat16 (to nearest even), products are added
//        in float32. Denormals count as zero, in and out, as x86's bfloat16 instructions have it. (A sum at most
//        2^-151 below the least normal number is that number on x86, which rounds first, and zero on ARM.)
//   S8   weights are signed 8-bit with a scale for each output feature; the activations that enter a layer are
//        unsigned 8-bit with one scale and one zero point, both calibrated. Sums are exact 32-bit integers.
enum { PRECISION_F32 = 0, PRECISION_BF16 = 1, PRECISION_S8 = 2 };

// --- Slices -------------------------------------------------------------------------------------------------------
//
// A tile holds `lanes` rows of the batch (1, 8, 16, 32 or 64), transposed: one tile row per feature, one lane per row
// of the batch, so that one vector multiply-add serves a whole register of candidates. (Of a single row, one serves the
// four rows of a slice.) Features stand in blocks of BLOCK_FEATURES, and in front of every block stands one row of
// zeros:
//
//     tile row:   0      1          2         ...  128          129    130          ...
//     holds:      zeros  feature 0  feature 1 ...  feature 127  zeros  feature 128  ...
//
// Padding of the weights points at the row of zeros. Were it to point at a feature, 0 * Inf would make a NaN out of
// an activation that the layer's row does not own.
//
// In int8 slices are those of float32, of quantised values: where no sum passes 2^24 all of them are exact, and multiply
// as fast as float32 where 8-bit integers would be slower.
//
// 128 features of 64 float32 lanes are 33 KB: a block of the widest tile stays in a 48 KB L1, and nearly so in one of
// 32 KB.
enum { BLOCK_FEATURES = 128 };

static inline int64_t block_count(int64_t features) { return (features + BLOCK_FEATURES - 1) / BLOCK_FEATURES; }
static inline int64_t block_features(int64_t features, int64_t first) {
  return features - first < (int64_t)BLOCK_FEATURES ? features - first : (int64_t)BLOCK_FEATURES;
}
static inline int64_t tile_row(int64_t feature) { return feature + feature / BLOCK_FEATURES + 1; }
static inline int64_t tile_rows(int64_t features) { return features + block_count(features); }

// Values from one tile row to the next. Tiles of 8 lanes keep the rows of 16, because the scaled offset below can
// double twice but not halve; a single row's offsets are cut out of the word by a sixteenth.
static inline int64_t lane_stride(int lanes) { return lanes == 1 ? 1 : lanes < 16 ? 16 : lanes; }

// Four output rows that add their kept weights within one block together. A block's rows are sorted by how many they
// have, so that the four are nearly equal; the shorter ones are padded. The first and the last block name every row,
// for the bias and the activation; the others leave out slices without a kept weight.
// Where there is no multiple of four, the missing rows have no bias, only padding, and tile row 0: they write zeros
// onto the row of zeros.
enum { SLICE_ROWS = 4 };

typedef struct {
  uint32_t steps;
  uint32_t row[SLICE_ROWS];  // tile rows of the output
} Slice;

// F32: the next kept weight of each row of a slice: 24 bytes, 6 for each weight.
// Row r's offset stands in bits 16r to 16r + 15: one load fetches four of them, for load slots are what runs out.
// An offset is 64 * (tile row within the block): the distance in bytes at 16 lanes of float32. At 32 and 64 lanes the
// distance is offset * 2 and offset * 4, which x86 scales while it adds the address: one layout for all lane counts.
// Padding is offset 0 (the row of zeros) and weight -0: a product of -0 changes no sum, not even the sign of a zero.
typedef struct {
  uint64_t offsets;
  float weight[SLICE_ROWS];
} StepF32;

// BF16: the next two kept weights of each row: 32 bytes, 4 for each weight. The second of the two stands first, in
// the low half, because the instruction adds the product of the high halves before that of the low ones. An offset
// is the distance in bytes at 32 lanes of bfloat16.
typedef struct {
  uint64_t offsets[2];              // [0] of the low halves
  uint16_t weight[SLICE_ROWS][2];
} StepBf16;

static inline uint64_t step_offset(uint64_t offsets, int row) { return offsets >> (16 * row) & 0xffff; }

// --- Tables -------------------------------------------------------------------------------------------------------
//
// Sixteen output features make a group: they are the lanes of a vector. A step of a group reads one window of
// neighbouring activations (32 float32, 64 bfloat16, 64 bytes: what one permutation of registers can look up), and
// adds up to P kept weights of each feature that lie within it (P = 1, 2, 4 for F32, BF16, S8: 16, 32, 64
// multiply-adds per vector). Each feature takes its kept weights by ascending column; a window starts at the first one
// still missing in the group, or a little before. Features that are ahead of the others wait, and their places in the
// step are padded.
//
// Four groups stand together in a bundle, step by step in turn, so that a single row of the batch has four sums under
// way; the groups after the last whole bundle stand alone. Features of a hidden layer are ordered by how many kept
// weights they have (see ordering below), so the groups of a bundle are nearly equally long.
//
// The activations of one row of the batch stand in one line with a zero in front of every GAP features (16 in
// F32, 32 in BF16), for the padding to point at, as above: every window holds one. A line goes on for a whole window
// after the last activation. Windows begin at multiples of 16 and 32, where a cache line does: a load across two of
// them costs two, and that outweighs a quarter more padding.
// In S8 padding needs no zeros, for 0 * 255 is 0. There a line holds all windows one after the other, each beginning
// 32 activations after the one before: every activation appears twice, and every window has a cache line of its own.
// (Windows of any start need a tenth fewer steps, and took a fifth longer.)
enum { GROUP = 16, BUNDLE = 4 };
enum { WINDOW_F32 = 32, WINDOW_BF16 = 64, WINDOW_S8 = 64 };
enum { GAP_F32 = 16, GAP_BF16 = 32, HALF_S8 = 32 };
enum { MAX_ROWS = 16 };  // of the batch in one call of a table kernel

static inline int64_t line_position(int64_t feature, int64_t gap) { return feature + feature / gap + 1; }
static inline int64_t padded(int64_t features) { return (features + GROUP - 1) / GROUP * GROUP; }

// --- Blocks -------------------------------------------------------------------------------------------------------
//
// Weights kept or pruned in blocks of 16 consecutive outputs (a group) and 4 consecutive inputs (a quad). A vector
// holds a group's outputs of one row of the batch; activations stand row by row, as they come: no gathers, no
// permutations, no transposes, from one row to thousands. A block costs what a tile of a dense product costs: 64
// multiply-adds for 256, 128 or 64 bytes of weights and one index.
//
// What hangs over an edge is padded with weights of 0 and activations of 0. Features keep their order. Inputs are cut
// into panels, so that what a few rows of the batch hold of one stays in the first cache. Within a panel the groups
// stand in descending order of their blocks: neighbours, whose sums are added in turn, are nearly equally long.
//
// Sums begin with the bias and take the blocks by ascending quad. Within one, F32 adds its inputs in ascending order;
// BF16 adds input 1 before 0 and 3 before 2, as x86's instruction adds a pair. S8 is exact in any order: a row's scale
// is such that of every pair of neighbouring weights |w0| + |w1| is at most 128, and 255 times that fits 16 signed
// bits.
//
// Filled blocks are those of float32, in both precisions: every block that holds a kept weight, in the order of
// features that tables and slices have. Where a weight is pruned stands FILLER, -0, whose products change no sum but for
// the sign of a zero. No kept weight is -0 there: a row whose sums are not all numbers is added again without the
// fillers, for 0 * Inf makes a NaN out of an activation that meets no weight.
enum { QUAD = 4, PANEL_QUADS = 128, PANEL_QUADS_S8 = 512 };  // 2,048 bytes of a row
#define FILLER (-0.0f)

static inline int64_t quad_count(int64_t features) { return (features + QUAD - 1) / QUAD; }
static inline int64_t panel_quads(int is_s8) { return is_s8 ? PANEL_QUADS_S8 : PANEL_QUADS; }
static inline int64_t panel_count(int64_t features, int is_s8) {
  return (quad_count(features) + panel_quads(is_s8) - 1) / panel_quads(is_s8);
}

// --- The blob -----------------------------------------------------------------------------------------------------
//
// BlobHeader | LayerRecord[layers], task by task | the sections of each layer. Every section starts at a multiple of
// BLOB_ALIGNMENT bytes from the blob's start, where the records say; the blob's size is a multiple of it too, so that
// a blob may end right at the end of a page. Little-endian and private to this build: what goes to disk are the
// canonical layers. The only writer is lt4rec_prepack; calls check the header and trust the rest.
//
// Ordering, for tables and slices: the features of a hidden layer stand in descending order of their kept weights, and
// the next layer's columns are renumbered to match. Inputs and heads keep their order.
//
// Sharing: what several tasks keep of a first layer is multiplied once. A SHARED layer has parts of `part_features`
// features each: first one for each set of tasks for which that pays, then each task's own. A COMBINED layer of a task
// has no weights: it adds the task's parts in their order.
//
// Given bias: the biases of the layers that read x may come with each call, in place of what the blob holds: what
// another network makes of the inputs that a whole batch has in common. They are added when a layer's products are, and
// count as part of the sum.
enum { BLOB_VERSION = 10, BLOB_ALIGNMENT = 64 };
#define BLOB_MAGIC 0x53523354u /* "T3RS" */

typedef struct {
  uint32_t magic;
  uint32_t version;
  uint64_t bytes;          // of the whole blob
  uint64_t slice_bytes;    // of these, in sections that only the slices read
  uint64_t table_bytes;    // of these, in sections that only the tables read
  uint64_t block_bytes;    // of these, in sections that only blocks read, filled or not
  uint64_t nnz;            // kept weights, those that tasks share counted once for each
  uint64_t multiply_adds;       // a row's multiply-adds: kept weights, shared ones once, without padding
  uint64_t slice_multiply_adds; // the same with padding, as the slices form them
  uint64_t table_multiply_adds;
  uint64_t block_multiply_adds;
  uint64_t filled_multiply_adds;  // what filled blocks form or would form; 0 where a network cannot have them
  uint64_t largest_sum;           // S8, single weights: no sum of products of codes passes this
  uint32_t precision;
  uint32_t in_features;    // of every task's first layer
  uint32_t outputs;        // sum of out_features over the tasks' last layers
  uint32_t tasks;
  uint32_t layers;         // records
  uint32_t hidden_features;  // of the widest layer's output, shared layers apart; a multiple of GROUP
  uint32_t shared_features;  // of the shared layer's output; 0 for none
  uint32_t layouts;        // those that the blob holds
  uint32_t bias_features;  // of the biases that come with a call: those of each task's first layer, tasks in order; or 0
  uint32_t unused;
} BlobHeader;

// A network is prepacked for the paths that it will take: a layout for each. Blocks stand alone.
enum { LAYOUT_TABLES = 1, LAYOUT_SLICES = 2, LAYOUT_BLOCKS = 4, LAYOUT_FILLED = 8 };

// Kernels compute the first two; paths apply the others to what a kernel leaves.
enum {
  ACTIVATION_NONE = 0,
  ACTIVATION_RELU = 1,
  ACTIVATION_SIGMOID = 2,
  ACTIVATION_TANH = 3,
  ACTIVATION_SILU = 4,
  ACTIVATION_GELU = 5,
  ACTIVATION_GELU_TANH = 6,
  ACTIVATION_HARDSWISH = 7,
  ACTIVATION_LEAKY_RELU = 8,
  ACTIVATION_ELU = 9,
  ACTIVATION_DICE = 10,  // v * (alpha + (1 - alpha) * sigmoid(scale * v + shift))
};

// Numbers per output among `slopes`: rows of out_features each. Of DICE scale, shift and alpha, which it always has; of
// LEAKY_RELU one row, in place of `slope`, or none.
static inline int64_t slope_rows(int64_t activation) {
  return activation == ACTIVATION_DICE ? 3 : activation == ACTIVATION_LEAKY_RELU ? 1 : 0;
}
enum { LAYER_LINEAR = 0, LAYER_SHARED = 1, LAYER_COMBINED = 2 };

typedef struct {
  uint32_t kind;
  uint32_t in_features;
  uint32_t out_features;   // SHARED: of all parts together
  uint32_t activation;     // SHARED: none
  uint32_t is_head;        // 1: the last layer of its task; its result goes to out, the next layer reads x again
  uint32_t part_count;     // COMBINED
  uint32_t part_features;  // SHARED and COMBINED; a multiple of GROUP
  float inverse_scale;     // S8, of the activations that enter: code = round(x * inverse_scale) + zero_point
  int32_t zero_point;      // S8: 0 to 255
  float slope;             // of LEAKY_RELU and ELU
  uint32_t takes_bias;     // 1: its bias comes with the call
  uint32_t bias_column;    // and begins here in a row of such biases
  uint64_t bias_order;     // uint32_t[out_features]: which of them each output adds; or 0: its own
  uint64_t bias;           // float[padded(out_features)]; zeros where there is none
  uint64_t parts;          // COMBINED: uint32_t[part_count], at least one
  // Slices (F32, BF16; none in COMBINED).
  uint64_t block_slices;   // uint32_t[block_count(in_features)]: how many slices each block has
  uint64_t slices;         // Slice[]: block after block
  uint64_t steps;          // StepF32[] or StepBf16[]: slice after slice, without gaps
  uint64_t slice_bias;     // float[SLICE_ROWS * block_slices[0]]: in the order of the first block's slices
  // Tables (none in COMBINED). One element for each step of each group, bundle after bundle.
  uint64_t bundle_steps;   // uint32_t[]: steps of each bundle
  uint64_t windows;        // uint32_t[]: where in the line the step's window begins
  uint64_t indices;        // uint8_t[][GROUP * P]: which activation of the window
  uint64_t weights;        // float[][16], bfloat16[][32] or int8_t[][64]
  // Blocks, filled ones too (none in COMBINED), panel by panel.
  uint64_t block_groups;   // uint32_t[panels][groups]: their order in the panel
  uint64_t group_blocks;   // uint32_t[panels][groups + 1]: where the blocks of each of these begin, and the last ends
  uint64_t block_quads;    // uint32_t[]: the first input of each block, over QUAD
  uint64_t block_weights;  // float[][4][16], bfloat16[][2][16][2] or int8_t[][16][4]
  // S8.
  uint64_t scale;          // float[padded(out_features)]: of the product; not in SHARED
  uint64_t start;          // int32_t[padded(out_features)]: -zero_point * the sum of the row's weights; not in COMBINED
  uint64_t signed_start;   // the same for codes that count from -128 on: (128 - zero_point) * that sum
  uint64_t slopes;         // float[slope_rows][out_features]; or 0
} LayerRecord;

// One task's layer in canonical form, which is that of formats.py and of artefacts. Tasks whose layers have the same
// `values` and `planes`, in one shape, share the weight. Addresses travel as integers, so that a caller without C can
// write this as int64s; the scale travels as the bits of a double.
typedef struct {
  int64_t is_blocks;     // 1: for LAYOUT_BLOCKS, kept in blocks: rows and columns of `planes` are groups and quads,
                         // `nnz` counts blocks, and `values` is float[nnz][16][4], 0 beyond the edges
  int64_t values;        // float[nnz]: what any task keeps, row by row, columns ascending
  int64_t planes;        // uint8_t[tasks][out_features][(in_features + 7) / 8]: column k is bit k % 8 of byte k / 8;
                         // padding is 0. Or 0 for a dense weight, all of whose values stand in `values`
  int64_t tasks;         // planes
  int64_t task;          // the plane that this layer reads
  int64_t bias;          // float[out_features], or 0 for none
  int64_t in_features;   // at least 1
  int64_t out_features;  // at least 1; above MAX_OUT_FEATURES is refused
  int64_t nnz;
  int64_t activation;
  int64_t is_head;
  double input_scale;    // S8: what one step of the quantised input is worth; above 0
  int64_t input_zero_point;
  double slope;          // of LEAKY_RELU and ELU
  int64_t slopes;        // float[slope_rows][out_features], or 0
  int64_t takes_bias;    // 1: its bias comes with each call, and `bias` is 0; all layers that read x, or none
} CanonicalLayer;

// Sums of int8 products must fit 32 bits; above 16 million features a tile would not fit most memories.
enum { MESSAGE_BYTES = 256, MAX_IN_FEATURES = 1 << 24, MAX_OUT_FEATURES = 1 << 24, MAX_IN_FEATURES_S8 = 32768 };

// Checks `layers` and returns the size of their blob in bytes, which the caller gives back through lt4rec_free.
// Returns -1 with the reason in `message` [MESSAGE_BYTES] where the layers are not canonical, -2 where memory does not
// suffice.
// Callers guarantee array lengths, positive sizes, and that layers chain: in_features equals the previous layer's
// out_features, or the network's after a head.
// `layouts` are those that the blob shall hold; of S8 it holds tables in the place of those that cannot be.
// LAYOUT_BLOCKS wants layers in blocks or dense ones, and no other layout beside it. 0 stands for what calls of `batch`
// rows take on `isa`, or of any number of rows where `batch` is -1.
struct Isa;
int64_t lt4rec_prepack(const CanonicalLayer* layers, int64_t count, int64_t precision, int64_t layouts,
                       const struct Isa* isa, int64_t batch, uint8_t** blob, char* message);
void lt4rec_free(uint8_t* blob);

// --- The part of the engine that is written once per instruction set ----------------------------------------------
//
// Kernels do not check; prepack does, once. No two arguments overlap.
typedef struct Isa {
  const char* name;

  // y = activation(x @ W^T + bias) for one tile, rows of zeros included; all but ReLU is left to the caller.
  // x and y stand at 64-byte boundaries; x has lane_stride(lanes) values per row, y as many floats.
  // Of the two for bfloat16 an ISA has one, the other is null: the second reads bfloat16 values that were widened to
  // float. The first takes tiles of 32 and 64 lanes alone.
  void (*slices_f32)(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes);
  void (*slices_bf16)(const uint8_t* blob, const LayerRecord* layer, const uint16_t* x, float* y, int lanes);
  void (*slices_widened_bf16)(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes);

  // y[r, :] = x[r, :] @ W^T + bias for `rows` (at most MAX_ROWS) rows of the batch; no activation. y has
  // padded(out_features) values per row; S8 writes the exact sums, from `start`. Strides in elements.
  void (*table_f32)(const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride, int rows, float* y,
                    int64_t y_stride);
  void (*table_bf16)(const uint8_t* blob, const LayerRecord* layer, const uint16_t* x, int64_t x_stride, int rows,
                     float* y, int64_t y_stride);
  void (*table_s8)(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int rows,
                   int32_t* y, int64_t y_stride);

  // y[r, :] = x[r, :] @ W^T + bias for any number of rows, with ReLU where the layer has one and the sums are floats. x
  // has a multiple of QUAD values per row. Of the two for bfloat16 an ISA has one, as of those for slices.
  void (*blocks_f32)(const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride, int64_t rows,
                     float* y, int64_t y_stride);
  void (*blocks_bf16)(const uint8_t* blob, const LayerRecord* layer, const uint16_t* x, int64_t x_stride, int64_t rows,
                      float* y, int64_t y_stride);
  void (*blocks_widened_bf16)(const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride,
                              int64_t rows, float* y, int64_t y_stride);
  void (*blocks_s8)(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int64_t rows,
                    int32_t* y, int64_t y_stride);

  // to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns; touches nothing else.
  void (*transpose_f32)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                        int64_t to_stride);

  // Element by element, `count` of them; vectorised by the compiler from one source, elementwise.h.
  void (*widen_bf16)(const uint16_t* from, int64_t count, float* to);
  void (*round_bf16)(const float* from, int64_t count, uint16_t* to);  // denormals become zeros, NaN stays NaN
  void (*round_widened_bf16)(const float* from, int64_t count, float* to);
  // to = relu(a + b + bias), or without relu; `b` and `bias` may be null, and `to` of add_f32 may be `a`. A line gets
  // its zeros too.
  void (*add_f32)(const float* a, const float* b, const float* bias, int64_t count, int has_relu, float* to);
  void (*add_s32)(const int32_t* a, const int32_t* b, int64_t count, int32_t* to);  // `to` may be `a`
  void (*line_f32)(const float* a, const float* b, const float* bias, int64_t count, int has_relu, float* line);
  void (*line_bf16)(const float* a, const float* b, const float* bias, int64_t count, int has_relu, uint16_t* line);
  // to = (a + b) * scale + bias, as one fused multiply-add; `b` may be null.
  void (*dequantize_s32)(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                         float* to);
  // A line of quantised values: round(v * inverse_scale) + zero_point within 0 to 255. A NaN becomes 0; returns
  // whether there was one.
  int (*line_u8)(const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* line);
  // The same of relu((a + b) * scale + bias), or without relu.
  void (*requantize_s32)(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                         int has_relu, float inverse_scale, int32_t zero_point, uint8_t* line);

  // Codes as floats: of values, as above, and of the sums of one feature, each with a bias of its own.
  int (*codes_f32)(const float* from, int64_t count, float inverse_scale, int32_t zero_point, float* codes);
  void (*recode_f32)(const float* sums, int64_t count, float scale, const float* bias, int has_relu,
                     float inverse_scale, int32_t zero_point, float* codes);
  void (*dequantize_f32)(const float* sums, int64_t count, float scale, const float* bias, int has_relu, float* to);

  // The first two without a line's second copies.
  int (*codes_u8)(const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* codes);
  void (*recode_s32)(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                     int has_relu, float inverse_scale, int32_t zero_point, uint8_t* codes);

  // In place; one of ACTIVATION_SIGMOID to ACTIVATION_ELU.
  void (*activate)(uint32_t activation, float slope, float* values, int64_t count);
  void (*leaky_relu)(const float* slopes, float* values, int64_t count);  // a slope per value
  // DICE, in place. Scale, shift and alpha stand `stride` apart: for each value its own, or for `is_one` the first.
  void (*dice)(const float* constants, int64_t stride, int is_one, float* values, int64_t count);

  // Rows of embeddings: halves, and bytes with a scale.
  void (*widen_f16)(const uint16_t* from, int64_t count, float* to);
  void (*widen_s8)(const int8_t* from, int64_t count, float scale, float* to);
  // dots[i, j] = the sum over d, ascending, of vectors[i, d] * transposed[d, j], each added by a fused multiply-add to
  // what is there, from 0 on. `width` is a multiple of GROUP; strides in elements.
  void (*cross)(const float* vectors, int64_t rows, const float* transposed, int64_t stride, int64_t dim, int64_t width,
                float* dots, int64_t dots_stride);

  // As measured: from this many rows of the batch on, slices are faster than tables here; and where at least this share
  // of what filled blocks form is kept, these are faster: than slices, than tables for more than FEW_ROWS rows, and for
  // few rows, whose time is that of reading weights, from CACHED_BYTES or from more.
  int slices_from_f32, slices_from_bf16, slices_from_s8;
  float filled_from_many, filled_from_some, filled_from_few_cached, filled_from_few;
} Isa;

enum { FEW_ROWS = 4, CACHED_BYTES = 4 << 20, NEVER = 1 << 30, LARGEST_EXACT_FLOAT = 1 << 24 };

extern const Isa lt4rec_isa_scalar;
#if defined(__x86_64__)
extern const Isa lt4rec_isa_avx2;         // AVX2, FMA
const Isa* lt4rec_isa_avx2_vnni(void);    // and AVX-VNNI; to be called only there
extern const Isa lt4rec_isa_avx512;       // and AVX-512 F, VL, BW
extern const Isa lt4rec_isa_avx512_vnni;  // and VBMI, VNNI: Ice Lake, Zen 4
extern const Isa lt4rec_isa_avx512_bf16;  // and BF16: Sapphire Rapids, Zen 4
#endif
#if defined(__aarch64__)
extern const Isa lt4rec_isa_neon;
const Isa* lt4rec_isa_neon_dot(void);     // and dot products; to be called only there
#endif

// The ISAs of this build that this machine runs, slowest first, ended by null.
const Isa* const* lt4rec_supported_isas(void);

enum {
  STATUS_OK = 0,
  STATUS_BAD_BLOB = 1,   // wrong magic, version, size or alignment
  STATUS_BAD_SHAPE = 2,  // in_features, outputs or bias_features are not the blob's
  STATUS_NO_MEMORY = 3,
  STATUS_NO_LAYOUT = 4,  // the blob was not prepacked for the path
  STATUS_NOT_READ = 5,   // of the Python module alone: it leaves these arguments to its caller
};

// STATUS_OK, or STATUS_BAD_BLOB.
int lt4rec_check_blob(const uint8_t* blob, int64_t bytes);

// As many threads as there are processors at most; one in a forked child, which has none of its parent's.
int64_t lt4rec_usable_threads(int64_t threads);

// Which path a call takes. AUTO: the faster one for the batch size, or the one that the blob has; FASTEST: the faster
// one or none. What is in blocks has no other path.
enum { PATH_AUTO = 0, PATH_TABLES = 1, PATH_SLICES = 2, PATH_BLOCKS = 3, PATH_FILLED = 4, PATH_FASTEST = 5 };

// The path that is fastest for this many rows of a network with such a header, whatever layouts the blob holds.
int64_t lt4rec_path(const Isa* isa, const BlobHeader* header, int64_t batch);

typedef struct {
  const void* x;        // float[batch, in_features], or bfloat16
  int64_t is_bf16;      // whether x is bfloat16
  int64_t batch;
  int64_t in_features;
  int64_t x_stride;     // elements from one row to the next
  float* out;           // float[batch, outputs]; overlaps neither x nor the blob
  int64_t outputs;
  int64_t out_stride;
  int64_t threads;      // at least 1; an upper bound
  int64_t path;
  const float* bias;    // float[batch, bias_features] where layers take it, or null; overlaps neither out nor the blob
  int64_t bias_features;
  int64_t bias_stride;  // 0: the same row for the whole batch
} SparseMlpCall;

// out[b, :] = the heads of all tasks for x[b, :], tasks in order. out is undefined where the status is not STATUS_OK.
int lt4rec_sparse_mlp(const Isa* isa, const uint8_t* blob, int64_t bytes, const SparseMlpCall* call);

#ifdef __cplusplus
}
#endif
#endif
