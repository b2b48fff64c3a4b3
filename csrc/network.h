// A network between its canonical layers and its blob: checked, ordered, and with the tasks' first layers shared.
#ifndef LT4REC_SPARSE_NETWORK_H
#define LT4REC_SPARSE_NETWORK_H

#include <cstddef>
#include <vector>

#include "engine.h"

namespace lt4rec {

using std::size_t;

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

struct Layer {
  uint32_t kind = LAYER_LINEAR;
  Matrix weight;            // none in COMBINED
  std::vector<float> bias;  // out_features, or none
  int64_t in_features = 0, out_features = 0;
  uint32_t activation = ACTIVATION_NONE, is_head = 0;
  std::vector<uint32_t> parts;  // COMBINED
  uint32_t part_features = 0;   // as in LayerRecord
  std::vector<float> largest;            // S8: of each row's weights, by absolute value; repeats from part to part
  double input_scale = 0;
  int32_t zero_point = 0;
};

// Writes the reason and returns false where a kernel would read or write out of place.
bool is_canonical(const CanonicalLayer& layer, int64_t index, int64_t precision, char* message);

// The same where two layers that read x, which is quantised once, have different quantisation parameters.
bool counts_alike(const CanonicalLayer& layer, int64_t index, const CanonicalLayer& first, char* message);

// How many weights the layer's task keeps.
int64_t kept_weights(const CanonicalLayer& layer);

// Layers in the order of the blob's records (see Ordering and Sharing in engine.h).
std::vector<Layer> arrange(const CanonicalLayer* layers, int64_t count, int64_t precision);

}  // namespace lt4rec
#endif
