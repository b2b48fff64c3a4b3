// Canonical CSR -> the prepacked blob of engine.h. The only place that checks what the kernels trust.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <numeric>
#include <vector>

#include "engine.h"

namespace {

// The sections of one layer, before they get their place in the blob.
struct PackedLayer {
  std::vector<uint32_t> block_slices;
  std::vector<Slice> slices;
  std::vector<Step> steps;
  std::vector<float> bias;
};

struct Csr {
  const int32_t* crow_indices;
  const int32_t* col_indices;
  const float* values;
  const float* bias;

  explicit Csr(const CanonicalLayer& layer)
      : crow_indices(reinterpret_cast<const int32_t*>(layer.crow_indices)),
        col_indices(reinterpret_cast<const int32_t*>(layer.col_indices)),
        values(reinterpret_cast<const float*>(layer.values)),
        bias(reinterpret_cast<const float*>(layer.bias)) {}
};

// Writes the reason and returns false where a kernel would read or write out of place.
bool is_canonical(const CanonicalLayer& layer, int64_t index, char* message) {
  const auto refuse = [&](const char* what, int64_t at, int64_t got, const char* wanted, int64_t bound) {
    std::snprintf(message, MESSAGE_BYTES, "layer %lld: %s[%lld]: got %lld, wanted %s %lld", (long long)index, what,
                  (long long)at, (long long)got, wanted, (long long)bound);
    return false;
  };
  const Csr csr(layer);
  if (layer.out_features > MAX_OUT_FEATURES) {
    std::snprintf(message, MESSAGE_BYTES, "layer %lld: out_features: got %lld, wanted at most %d", (long long)index,
                  (long long)layer.out_features, MAX_OUT_FEATURES);
    return false;
  }
  const int64_t rows = layer.out_features;
  if (csr.crow_indices[0] != 0) return refuse("crow_indices", 0, csr.crow_indices[0], "exactly", 0);
  if (csr.crow_indices[rows] != layer.nnz) return refuse("crow_indices", rows, csr.crow_indices[rows], "nnz", layer.nnz);
  // All row starts before any column: a start out of range would send the column check astray.
  for (int64_t row = 0; row < rows; ++row)
    if (csr.crow_indices[row + 1] < csr.crow_indices[row])
      return refuse("crow_indices", row + 1, csr.crow_indices[row + 1], "at least", csr.crow_indices[row]);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t least = 0;
    for (int64_t i = csr.crow_indices[row]; i < csr.crow_indices[row + 1]; ++i) {
      const int64_t column = csr.col_indices[i];
      if (column >= layer.in_features) return refuse("col_indices", i, column, "less than in_features", layer.in_features);
      if (column < least) return refuse("col_indices", i, column, "ascending within its row, at least", least);
      least = column + 1;
    }
  }
  return true;
}

PackedLayer pack(const CanonicalLayer& layer) {
  const Csr csr(layer);
  const int64_t rows = layer.out_features, blocks = block_count(layer.in_features);
  PackedLayer packed;
  std::vector<int32_t> begin(csr.crow_indices, csr.crow_indices + rows);  // of each row in the block at hand
  std::vector<int32_t> end(begin);
  // Whole slices; rows past the last have nothing to add.
  std::vector<int64_t> order(size_t((rows + SLICE_ROWS - 1) / SLICE_ROWS * SLICE_ROWS));
  const auto kept = [&](int64_t row) { return row < rows ? end[size_t(row)] - begin[size_t(row)] : 0; };

  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t past_block = (block + 1) * BLOCK_FEATURES;
    for (int64_t row = 0; row < rows; ++row) {
      int32_t& i = end[size_t(row)];
      while (i < csr.crow_indices[row + 1] && csr.col_indices[i] < past_block) ++i;
    }
    // Descending, so that a slice's first row is its longest; stable, so that one matrix has one blob.
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return kept(a) > kept(b); });

    uint32_t slices = 0;
    for (size_t first = 0; first < order.size(); first += SLICE_ROWS) {
      Slice slice{};
      slice.steps = uint16_t(kept(order[first]));
      if (slice.steps == 0 && block != 0 && block != blocks - 1) break;
      const size_t first_step = packed.steps.size();
      packed.steps.resize(first_step + slice.steps, Step{});  // zeros are padding
      for (int r = 0; r < SLICE_ROWS; ++r) {
        const int64_t row = order[first + size_t(r)];
        if (block == 0) packed.bias.push_back(row < rows && csr.bias ? csr.bias[row] : 0);
        if (row >= rows) continue;
        slice.row[r] = uint16_t(tile_row(row));
        for (int32_t j = 0; j < kept(row); ++j) {
          const int32_t i = begin[size_t(row)] + j;
          Step& step = packed.steps[first_step + size_t(j)];
          step.offsets |= uint64_t(64 * (csr.col_indices[i] % BLOCK_FEATURES + 1)) << (16 * r);
          step.weight[r] = csr.values[i];
        }
      }
      packed.slices.push_back(slice);
      ++slices;
    }
    packed.block_slices.push_back(slices);
    begin = end;
  }
  return packed;
}

// Hands out the blob's sections in order; writes only where there is a blob to write to.
class BlobWriter {
 public:
  explicit BlobWriter(uint8_t* blob) : blob_(blob) {}

  template <class T>
  uint64_t append(const std::vector<T>& section) {
    const uint64_t at = bytes_;
    const size_t size = section.size() * sizeof(T);
    bytes_ += (size + BLOB_ALIGNMENT - 1) / BLOB_ALIGNMENT * BLOB_ALIGNMENT;
    if (blob_ && size) std::memcpy(blob_ + at, section.data(), size);
    return at;
  }
  uint64_t bytes() const { return bytes_; }

 private:
  uint8_t* blob_;
  uint64_t bytes_ = 0;
};

uint64_t write_blob(const CanonicalLayer* layers, const std::vector<PackedLayer>& packed, uint8_t* blob) {
  BlobHeader header{};
  header.magic = BLOB_MAGIC;
  header.version = BLOB_VERSION;
  header.in_features = uint32_t(layers[0].in_features);
  header.layers = uint32_t(packed.size());
  std::vector<uint8_t> front(sizeof(BlobHeader) + packed.size() * sizeof(LayerRecord));
  std::vector<LayerRecord> records;

  BlobWriter writer(blob);
  writer.append(front);  // its place; its contents are known last
  for (size_t i = 0; i < packed.size(); ++i) {
    LayerRecord record{};
    record.in_features = uint32_t(layers[i].in_features);
    record.out_features = uint32_t(layers[i].out_features);
    record.activation = uint32_t(layers[i].activation);
    record.is_head = uint32_t(layers[i].is_head);
    record.block_slices = writer.append(packed[i].block_slices);
    record.slices = writer.append(packed[i].slices);
    record.steps = writer.append(packed[i].steps);
    record.bias = writer.append(packed[i].bias);
    records.push_back(record);

    header.nnz += uint64_t(layers[i].nnz);
    header.stored += packed[i].steps.size() * SLICE_ROWS;
    header.hidden_rows = std::max(header.hidden_rows, uint32_t(tile_rows(record.out_features)));
    if (record.is_head) header.outputs += record.out_features, ++header.tasks;
  }
  header.bytes = writer.bytes();

  std::memcpy(front.data(), &header, sizeof(header));
  std::memcpy(front.data() + sizeof(header), records.data(), records.size() * sizeof(LayerRecord));
  BlobWriter(blob).append(front);
  return header.bytes;
}

}  // namespace

extern "C" int64_t lt4rec_prepack_f32(const CanonicalLayer* layers, int64_t count, uint8_t* blob, int64_t capacity,
                                      char* message) {
  try {
    std::vector<PackedLayer> packed;
    for (int64_t i = 0; i < count; ++i) {
      if (!is_canonical(layers[i], i, message)) return -1;
      packed.push_back(pack(layers[i]));
    }
    const auto bytes = int64_t(write_blob(layers, packed, nullptr));
    if (blob == nullptr) return bytes;
    if (bytes > capacity) return -2;
    std::memset(blob, 0, size_t(bytes));  // the gaps between sections too: equal networks, equal blobs
    return int64_t(write_blob(layers, packed, blob));
  } catch (const std::bad_alloc&) {
    return -2;
  }
}
