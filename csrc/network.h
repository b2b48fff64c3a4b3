// A network between its canonical layers and its blob: checked, ordered, and with the tasks' first layers shared.
#ifndef LT4REC_SPARSE_NETWORK_H
#define LT4REC_SPARSE_NETWORK_H

#include <cstddef>
#include <vector>

#include "engine.h"

namespace lt4rec {

using std::size_t;

class View;

// CSR; columns ascend within a row.
struct Matrix {
  int64_t columns = 0;
  std::vector<int64_t> starts{0};  // of each row, and the end of the last
  std::vector<int32_t> column;
  std::vector<float> value;

  int64_t rows() const { return int64_t(starts.size()) - 1; }
  int64_t nnz() const { return int64_t(column.size()); }
  void expect(int64_t more) {
    column.reserve(column.capacity() + size_t(more));
    value.reserve(value.capacity() + size_t(more));
  }
  void end_row() { starts.push_back(nnz()); }
  // Appends another matrix's rows, and empty ones up to `count`.
  void append(const Matrix& other, int64_t count) {
    const int64_t before = nnz();
    column.insert(column.end(), other.column.begin(), other.column.end());
    value.insert(value.end(), other.value.begin(), other.value.end());
    for (int64_t row = 1; row <= count; ++row)
      starts.push_back(before + other.starts[size_t(row < other.rows() ? row : other.rows())]);
  }
};

// The same of blocks: CSR by groups and quads. Each block's weights stand where `value` points, 16 outputs x 4 inputs.
struct BlockMatrix {
  std::vector<int64_t> starts{0};
  std::vector<int32_t> quad;
  std::vector<const float*> value;

  int64_t groups() const { return int64_t(starts.size()) - 1; }
  void push(int64_t of_quad, const float* values) {
    quad.push_back(int32_t(of_quad));
    value.push_back(values);
  }
  void end_group() { starts.push_back(int64_t(quad.size())); }
};

struct Layer {
  uint32_t kind = LAYER_LINEAR;
  Matrix weight;            // none in COMBINED
  BlockMatrix blocks;       // for LAYOUT_BLOCKS and LAYOUT_FILLED, in its place
  std::vector<float> cut;   // blocks that were cut out of a weight
  int64_t multiply_adds = 0;
  int64_t filled = 0;       // weights of the blocks that `fill_blocks` makes
  std::vector<float> bias;  // out_features, or none
  int64_t in_features = 0, out_features = 0;
  uint32_t activation = ACTIVATION_NONE, is_head = 0, takes_bias = 0;
  std::vector<uint32_t> bias_order;  // of what it takes, by output; none: in place
  float slope = 0;
  std::vector<float> slopes;  // slope_rows x out_features, or none
  std::vector<uint32_t> parts;  // COMBINED
  uint32_t part_features = 0;   // as in LayerRecord
  // S8: of each row the largest weight, or in blocks half of the largest sum of two neighbours (no overflow), by
  // absolute value. Repeats from part to part.
  std::vector<float> largest;
  double input_scale = 0;
  int32_t zero_point = 0;
};

// Writes the reason and returns false where a kernel would read or write out of place.
bool is_canonical(const CanonicalLayer& layer, int64_t index, int64_t precision, int64_t layouts, char* message);

// The same of whether a layer takes its bias from the call: each that reads x does, or none.
bool takes_bias_alike(const CanonicalLayer& layer, int64_t index, bool is_wanted, char* message);

// The same where two layers that read x, which is quantised once, have different quantisation parameters.
bool counts_alike(const CanonicalLayer& layer, int64_t index, const CanonicalLayer& first, char* message);

// How many weights the layer's task keeps.
int64_t kept_weights(const CanonicalLayer& layer);

// The same of a layer in blocks, without what is beyond the edges, where all values must be 0.
int64_t kept_in_blocks(const CanonicalLayer& layer);
bool has_zeros_beyond_edges(const CanonicalLayer& layer, const View& grid);

// Counts `layer.filled`.
void count_filled(Layer& layer);

// Blocks in place of a layer's weights, after they were counted: all that hold one, filled as engine.h has it. `round` is
// what the precision makes of a weight.
void fill_blocks(Layer& layer, float (*round)(float));

// Layers in the order of the blob's records (see Ordering and Sharing in engine.h).
std::vector<Layer> arrange(const CanonicalLayer* layers, int64_t count, int64_t precision);
std::vector<Layer> arrange_blocks(const CanonicalLayer* layers, int64_t count, int64_t precision);

// A layer without its weights, features in their places.
Layer without_weights(const CanonicalLayer& from);

}  // namespace lt4rec
#endif
