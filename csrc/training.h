// Training through fixed masks: all three products of a layer skip what is pruned. Plain C, as engine.h is.
//
// Activations lie in panels of PANEL_ROWS rows of the batch: float[panels][width][PANEL_ROWS], where `width` is the
// features up to whole groups of 16. So a register holds one feature of as many rows, which each weight multiplies, and
// both the features of a layer and the gradients of the one before are found without a transposition:
//
//   forward   h[o] = relu(bias[o] + sum over kept i of w[o, i] x[i])
//   inputs    dx[i] = sum over kept o of w[o, i] dz[o], with dz = 0 where h is at most 0, else dh
//   weights   dw[o, i] = sum over rows of dz[o] x[i], at kept weights alone; db[o] = sum over rows of dz[o]
//
// Results are the same to the bit on every ISA and for every number of threads. The first two sums are chains of fused
// multiply-adds, ascending, which begin with the bias and with 0. Those over rows are formed panel by panel, each added
// to those before: of blocks by one chain; of single weights and biases by sixteen, of the rows r, r + 16, r + 32 and
// r + 48, which are then added by halves: the sums i and i + 8, of these i and i + 4, then i + 2, then i + 1.
#ifndef LT4REC_SPARSE_TRAINING_H
#define LT4REC_SPARSE_TRAINING_H

#include "engine.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PANEL_ROWS = 64 };

// The weights of one layer that one task keeps: blocks of GROUP outputs and QUAD inputs, or single ones, row by row,
// ascending. A row is a group of outputs, or one; a column a quad of inputs, or one. Single weights are taken in tiles
// of columns, whose rows of a panel stay in the first cache, and of rows where inputs are found; blocks are one tile.
// Addresses travel as integers.
typedef struct {
  int64_t in_features, out_features;
  int64_t is_blocks;
  int64_t has_relu;
  int64_t count;          // of blocks or weights
  int64_t row_tiles, column_tiles;
  int64_t row_begins;     // uint32_t[column_tiles + 1][rows]: where each row's weights of a tile begin, and at last end
  int64_t columns;        // uint32_t[count]: the column of each
  int64_t column_begins;  // uint32_t[row_tiles + 1][columns]: the same of the two below
  int64_t column_places;  // uint32_t[count]: where each of a column's blocks or weights stands row by row
  int64_t column_rows;    // uint32_t[count]: and its row
  int64_t values;         // float[count][GROUP][QUAD], or float[count]
  int64_t bias;           // float[out_features], or 0
  int64_t value_gradient; // written by `backward`, shaped as `values`
  int64_t bias_gradient;  // float[out_features], or 0
} TrainingLayer;

// What `forward` leaves for `backward`, in floats: the panels of x and of every layer's outputs.
int64_t lt4rec_training_floats(const TrainingLayer* layers, int64_t count, int64_t batch);

// h [batch, out_features of the last layer] of x [batch, in_features of the first]; STATUS_OK, or STATUS_NO_MEMORY.
int lt4rec_training_forward(const Isa* isa, const TrainingLayer* layers, int64_t count, const float* x,
                            int64_t x_stride, int64_t batch, int64_t threads, float* panels, float* h,
                            int64_t h_stride);

// The gradients of values and biases, and of x where `dx` is not null.
int lt4rec_training_backward(const Isa* isa, const TrainingLayer* layers, int64_t count, const float* panels,
                             const float* dh, int64_t dh_stride, int64_t batch, int64_t threads, float* dx,
                             int64_t dx_stride);

// One panel, or so many rows of weights, at a time. `bias` has whole groups.
typedef struct {
  void (*forward_blocks)(const TrainingLayer* layer, const float* bias, const float* x, float* h);
  void (*inputs_blocks)(const TrainingLayer* layer, const float* dz, float* dx);
  // Adds to gradient[count][QUAD][GROUP] and bias_gradient, whole groups, of rows [first, last).
  void (*weights_blocks)(const Isa* isa, const TrainingLayer* layer, int64_t first, int64_t last, const float* dz,
                         const float* x, float* gradient, float* bias_gradient);
  void (*forward_weights)(const TrainingLayer* layer, const float* bias, const float* x, float* h);
  // `values` are those of the layer column by column.
  void (*inputs_weights)(const TrainingLayer* layer, const float* values, const float* dz, float* dx);
  // Adds to gradient[count].
  void (*weights_weights)(const Isa* isa, const TrainingLayer* layer, int64_t first, int64_t last, const float* dz,
                          const float* x, float* gradient, float* bias_gradient);
  // dz = 0 where h is at most 0.
  void (*gate)(const float* h, int64_t count, float* dz);
  // Of a batch that are turned into a panel: where that reads parts of lines, few, since rows a power of two apart share
  // few places of the first cache.
  int64_t rows_at_once;
} TrainingKernels;

extern const TrainingKernels lt4rec_training_scalar;
#if defined(__x86_64__)
extern const TrainingKernels lt4rec_training_avx2;
extern const TrainingKernels lt4rec_training_avx512;
#endif

#ifdef __cplusplus
}
#endif
#endif
