// The CPU engine: the contract of every kernel, and the prepacked layout byte by byte.
//
// Plain C. No torch, no Python, no state: a prepacked network is one relocatable blob of bytes, and a call reads the
// blob and x, writes out, and remembers nothing.
#ifndef LT4REC_SPARSE_ENGINE_H
#define LT4REC_SPARSE_ENGINE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Tiles: activations as the kernels see them.
//
// A tile holds `lanes` rows of the batch (8, 16, 32 or 64), transposed: one tile row per feature, one lane per row of
// the batch, so that one vector multiply-add serves a whole register of candidates. Features stand in blocks of
// BLOCK_FEATURES, and in front of every block stands one row of zeros:
//
//     tile row:   0      1          2         ...  128          129    130          ...
//     holds:      zeros  feature 0  feature 1 ...  feature 127  zeros  feature 128  ...
//
// Padding of the weights points at the row of zeros. Were it to point at a feature, 0 * Inf would make a NaN out of
// an activation that the layer's row does not own.
//
// 128 features of 64 lanes are 33 KB: a block of the widest tile stays in a 48 KB L1, and nearly so in one of 32 KB.
enum { BLOCK_FEATURES = 128 };

static inline int64_t block_count(int64_t features) { return (features + BLOCK_FEATURES - 1) / BLOCK_FEATURES; }
static inline int64_t block_features(int64_t features, int64_t first) {
  return features - first < (int64_t)BLOCK_FEATURES ? features - first : (int64_t)BLOCK_FEATURES;
}
static inline int64_t tile_row(int64_t feature) { return feature + feature / BLOCK_FEATURES + 1; }
static inline int64_t tile_rows(int64_t features) { return features + block_count(features); }

// Floats from one tile row to the next. Tiles of 8 lanes keep the rows of 16, because the scaled offset below can
// double twice but not halve.
static inline int64_t lane_stride(int lanes) { return lanes < 16 ? 16 : lanes; }

// The prepacked blob.
//
// BlobHeader | LayerRecord[layers], task by task | the sections of each layer. Every section starts at a multiple of
// BLOB_ALIGNMENT bytes from the blob's start, where the records say; the blob's size is a multiple of it too, so that
// a blob may end right at the end of a page. Little-endian and private to this build: what goes to disk is the
// canonical CSR. The only writer is lt4rec_prepack_f32; calls check the header and trust the rest.
//
// One blob serves every lane count and every ISA, with the same sums in the same order: each output starts from its
// bias and adds its kept weights by ascending column, with one fused multiply-add each. Hence results are equal to
// the bit for every lane count, batch size, thread count and ISA.
enum { BLOB_VERSION = 1, BLOB_ALIGNMENT = 64 };
#define BLOB_MAGIC 0x53523354u /* "T3RS" */

typedef struct {
  uint32_t magic;
  uint32_t version;
  uint64_t bytes;         // of the whole blob
  uint64_t nnz;           // kept weights
  uint64_t stored;        // kept weights and padding
  uint32_t in_features;   // of every task's first layer
  uint32_t outputs;       // sum of out_features over the tasks' last layers
  uint32_t tasks;
  uint32_t layers;        // over all tasks
  uint32_t hidden_rows;   // tile rows of the widest layer's output: the scratch memory that a call needs
  uint32_t reserved[3];
} BlobHeader;

enum { ACTIVATION_NONE = 0, ACTIVATION_RELU = 1, ACTIVATION_SIGMOID = 2 };

typedef struct {
  uint32_t in_features;
  uint32_t out_features;
  uint32_t activation;
  uint32_t is_head;       // 1: the last layer of its task; its result goes to out, the next layer reads x again
  uint64_t block_slices;  // byte offset of uint32_t[block_count(in_features)]: how many slices each block has
  uint64_t slices;        // byte offset of Slice[]: block after block
  uint64_t steps;         // byte offset of Step[]: slice after slice, without gaps
  uint64_t bias;          // byte offset of float[SLICE_ROWS * block_slices[0]]: in the order of the first block's slices
} LayerRecord;

// Four output rows that add their kept weights within one block together. A block's rows are sorted by how many they
// have, so that the four are nearly equal; the shorter ones are padded. The first and the last block name every row,
// for the bias and the activation; the others leave out slices without a kept weight.
// Where out_features is no multiple of four, the missing rows have no bias, only padding, and tile row 0: they write
// zeros onto the row of zeros.
// A slice names its rows in 16 bits: the last feature of MAX_OUT_FEATURES stands in tile row 65535.
enum { SLICE_ROWS = 4, MAX_OUT_FEATURES = 65027 };

typedef struct {
  uint16_t steps;
  uint16_t row[SLICE_ROWS];  // tile rows of the output
} Slice;

// The next kept weight of each row of a slice: 24 bytes, 6 for each weight.
// Row r's offset stands in bits 16r to 16r + 15: one load fetches four of them, for load slots are what runs out.
// An offset is 64 * (tile row within the block): the distance in bytes at 16 lanes. At 32 and 64 lanes the distance is
// offset * 2 and offset * 4, which x86 scales while it adds the address, so that one layout serves all lane counts.
// Padding is offset 0 (the row of zeros) and weight 0.
typedef struct {
  uint64_t offsets;
  float weight[SLICE_ROWS];
} Step;

static inline uint64_t step_offset(const Step* step, int row) { return step->offsets >> (16 * row) & 0xffff; }

// One layer in canonical CSR. Addresses travel as integers, so that a caller without C can write this as nine int64.
typedef struct {
  int64_t crow_indices;  // int32_t[out_features + 1]
  int64_t col_indices;   // int32_t[nnz], strictly ascending within a row
  int64_t values;        // float[nnz]
  int64_t bias;          // float[out_features], or 0 for none
  int64_t in_features;   // at least 1
  int64_t out_features;  // at least 1; above MAX_OUT_FEATURES is refused
  int64_t nnz;
  int64_t activation;
  int64_t is_head;
} CanonicalLayer;

enum { MESSAGE_BYTES = 256 };

// Checks `layers` and returns the size of their blob in bytes; writes the blob too where `blob` is not null (8-byte
// aligned, `capacity` bytes). Returns -1 with the reason in `message` [MESSAGE_BYTES] where the layers are not
// canonical, -2 where memory or capacity does not suffice.
// Callers guarantee array lengths, positive sizes, and that layers chain: in_features equals the previous layer's
// out_features, or the network's after a head.
int64_t lt4rec_prepack_f32(const CanonicalLayer* layers, int64_t count, uint8_t* blob, int64_t capacity,
                           char* message);

// The part of the engine that is written once per instruction set. Kernels do not check; prepack does, once.
typedef struct {
  const char* name;

  // y = activation(x @ W^T + bias) for one tile, rows of zeros included; sigmoid is left to the caller.
  // x and y do not overlap, stand at 64-byte boundaries, and have lane_stride(lanes) floats a row.
  void (*layer_f32)(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes);

  // to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns; touches nothing else.
  void (*transpose_f32)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                        int64_t to_stride);
} Isa;

extern const Isa lt4rec_isa_scalar;
#if defined(__x86_64__)
extern const Isa lt4rec_isa_avx2;
extern const Isa lt4rec_isa_avx512;
#endif
// An ARM file defines lt4rec_isa_neon, and takes its line here and in isa.cpp.

// The ISAs of this build that this machine runs, slowest first, ended by null.
const Isa* const* lt4rec_supported_isas(void);

enum {
  STATUS_OK = 0,
  STATUS_BAD_BLOB = 1,   // wrong magic, version, size or alignment
  STATUS_BAD_SHAPE = 2,  // in_features or outputs are not the blob's
  STATUS_NO_MEMORY = 3,
};

// STATUS_OK, or STATUS_BAD_BLOB.
int lt4rec_check_blob(const uint8_t* blob, int64_t bytes);

// out[b, :] = the heads of all tasks for x[b, :], tasks in order. x is [batch, in_features], out [batch, outputs],
// both row-major with any row stride (in floats); out overlaps neither x nor the blob. `threads` >= 1 is an upper
// bound. out is undefined where the status is not STATUS_OK.
int lt4rec_sparse_mlp_f32(const Isa* isa, const uint8_t* blob, int64_t bytes, const float* x, int64_t batch,
                          int64_t in_features, int64_t x_stride, float* out, int64_t outputs, int64_t out_stride,
                          int64_t threads);

#ifdef __cplusplus
}
#endif
#endif
