// Arranged layers -> the blob of engine.h: slices, tables, and where they stand.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>

#include "network.h"

namespace {

#include "bf16.h"
#include "pack_blocks.h"

using lt4rec::Layer;
using lt4rec::Matrix;

template <class T>
std::vector<T> padded_copy(const std::vector<T>& values, int64_t features) {
  std::vector<T> copy(values);
  copy.resize(size_t(padded(features)));
  return copy;
}

// --- Slices -------------------------------------------------------------------------------------------------------

template <class Step>
struct PackedSlices {
  std::vector<uint32_t> block_slices;
  std::vector<Slice> slices;
  std::vector<Step> steps;
  std::vector<float> bias;
};

constexpr int64_t kept_per_step(const StepF32*) { return 1; }
constexpr int64_t kept_per_step(const StepBf16*) { return 2; }

// -0 times the row of zeros is -0, and to add that changes nothing, not even the sign of a zero.
constexpr StepF32 padding(const StepF32*) { return {0, {-0.0f, -0.0f, -0.0f, -0.0f}}; }
constexpr StepBf16 padding(const StepBf16*) {
  return {{0, 0}, {{0x8000, 0x8000}, {0x8000, 0x8000}, {0x8000, 0x8000}, {0x8000, 0x8000}}};
}

// The `index`-th kept weight of row r of a slice within one block.
void place(std::vector<StepF32>::iterator steps, int64_t index, int r, uint64_t offset, float value) {
  steps[index].offsets |= offset << (16 * r);
  steps[index].weight[r] = value;
}
void place(std::vector<StepBf16>::iterator steps, int64_t index, int r, uint64_t offset, float value) {
  StepBf16& step = steps[index / 2];
  const int64_t half = 1 - index % 2;  // the first of two stands in the high half
  step.offsets[half] |= offset << (16 * r);
  step.weight[r][half] = bf16_of(value);
}

template <class Step>
PackedSlices<Step> pack_slices(const Layer& layer) {
  const Matrix& weight = layer.weight;
  const int64_t rows = weight.rows(), blocks = block_count(weight.columns);
  constexpr int64_t kKept = kept_per_step(static_cast<const Step*>(nullptr));
  PackedSlices<Step> packed;
  packed.steps.reserve(size_t(weight.nnz()) / (SLICE_ROWS * kKept) * 5 / 4);  // with some padding
  std::vector<int64_t> begin(weight.starts.begin(), weight.starts.end() - 1);  // of each row in the block at hand
  std::vector<int64_t> end(begin);
  // Whole slices; rows past the last have nothing to add.
  std::vector<int64_t> order(size_t((rows + SLICE_ROWS - 1) / SLICE_ROWS * SLICE_ROWS));
  const auto kept = [&](int64_t row) { return row < rows ? end[size_t(row)] - begin[size_t(row)] : 0; };

  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t past_block = (block + 1) * BLOCK_FEATURES;
    for (int64_t row = 0; row < rows; ++row) {
      int64_t& i = end[size_t(row)];
      while (i < weight.starts[size_t(row) + 1] && weight.column[size_t(i)] < past_block) ++i;
    }
    // Descending, so that a slice's first row is its longest; stable, so that one matrix has one blob.
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return kept(a) > kept(b); });

    uint32_t slices = 0;
    for (size_t first = 0; first < order.size(); first += SLICE_ROWS) {
      Slice slice{};
      slice.steps = uint32_t((kept(order[first]) + kKept - 1) / kKept);
      if (slice.steps == 0 && block != 0 && block != blocks - 1) break;
      const size_t first_step = packed.steps.size();
      packed.steps.resize(first_step + slice.steps, padding(static_cast<const Step*>(nullptr)));
      for (int r = 0; r < SLICE_ROWS; ++r) {
        const int64_t row = order[first + size_t(r)];
        if (block == 0) packed.bias.push_back(row < int64_t(layer.bias.size()) ? layer.bias[size_t(row)] : 0);
        if (row >= rows) continue;
        slice.row[r] = uint32_t(tile_row(row));
        for (int64_t j = 0; j < kept(row); ++j) {
          const auto i = size_t(begin[size_t(row)] + j);
          const auto offset = uint64_t(64 * (weight.column[i] % BLOCK_FEATURES + 1));
          place(packed.steps.begin() + int64_t(first_step), j, r, offset, weight.value[i]);
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

// --- Tables -------------------------------------------------------------------------------------------------------

template <class Weight>
struct PackedTable {
  std::vector<uint32_t> bundle_steps;
  std::vector<uint32_t> windows;
  std::vector<uint8_t> indices;
  std::vector<Weight> weights;

  // Room for the steps of so many weights, `per_step` to a step, and some padding.
  void expect(int64_t nnz, int64_t per_step) {
    const auto steps = size_t(nnz / per_step * 5 / 4 + 16);
    windows.reserve(steps);
    indices.reserve(steps * size_t(per_step));
    weights.reserve(steps * size_t(per_step));
  }
};

// What a precision's tables look like: places for each feature in a step, the window, and what its start is a
// multiple of. Positions are counted as windows count: with gaps, without the second copies of int8.
struct TableF32 {
  using Weight = float;
  static constexpr int kPlaces = 1, kWindow = WINDOW_F32, kAlignment = 16;
  static constexpr float kPadding = -0.0f;
  static float weight(float value) { return value; }
  static int64_t position(int64_t feature) { return line_position(feature, GAP_F32); }
  static int64_t zero_after(int64_t position) { return (GAP_F32 + 1 - position % (GAP_F32 + 1)) % (GAP_F32 + 1); }
  static int64_t line_offset(int64_t window) { return window; }
};
struct TableBf16 {
  using Weight = uint16_t;
  static constexpr int kPlaces = 2, kWindow = WINDOW_BF16, kAlignment = 32;
  static constexpr uint16_t kPadding = 0x8000;  // -0
  static uint16_t weight(float value) { return bf16_of(value); }
  static int64_t position(int64_t feature) { return line_position(feature, GAP_BF16); }
  static int64_t zero_after(int64_t position) { return (GAP_BF16 + 1 - position % (GAP_BF16 + 1)) % (GAP_BF16 + 1); }
  static int64_t line_offset(int64_t window) { return window; }
};
struct TableS8 {
  using Weight = int8_t;
  static constexpr int kPlaces = 4, kWindow = WINDOW_S8, kAlignment = HALF_S8;
  static constexpr int8_t kPadding = 0;
  static int8_t weight(float value) { return int8_t(value); }
  static int64_t position(int64_t feature) { return feature; }
  static int64_t zero_after(int64_t) { return 0; }
  static int64_t line_offset(int64_t window) { return window / HALF_S8 * WINDOW_S8; }
};

// One group's steps, before they take turns with the other groups of their bundle.
template <class Table>
PackedTable<typename Table::Weight> pack_group(const Matrix& weight, int64_t first_row) {
  constexpr int kPlaces = Table::kPlaces;
  PackedTable<typename Table::Weight> packed;
  constexpr int64_t kNone = INT64_MAX;
  size_t at[GROUP], end[GROUP], nnz = 0;
  int64_t next[GROUP];  // the position of the weight at[r]
  const auto position = [&](int64_t r) { return at[r] < end[r] ? Table::position(weight.column[at[r]]) : kNone; };
  for (int64_t r = 0; r < GROUP; ++r) {
    const bool is_row = first_row + r < weight.rows();
    at[r] = is_row ? size_t(weight.starts[size_t(first_row + r)]) : 0;
    end[r] = is_row ? size_t(weight.starts[size_t(first_row + r) + 1]) : 0;
    next[r] = position(r);
    nnz += end[r] - at[r];
  }
  packed.expect(int64_t(nnz), GROUP * kPlaces);
  for (;;) {
    int64_t window = *std::min_element(next, next + GROUP);
    if (window == kNone) return packed;
    window -= window % Table::kAlignment;
    const int64_t zero = Table::zero_after(window);
    packed.windows.push_back(uint32_t(Table::line_offset(window)));
    packed.indices.resize(packed.indices.size() + GROUP * kPlaces, uint8_t(zero));
    packed.weights.resize(packed.weights.size() + GROUP * kPlaces, Table::kPadding);
    uint8_t* indices = &packed.indices[packed.indices.size() - GROUP * kPlaces];
    auto* weights = &packed.weights[packed.weights.size() - GROUP * kPlaces];
    for (int r = 0; r < GROUP; ++r) {
      for (int place = kPlaces - 1; place >= 0; --place) {  // the last place holds the first weight
        const int64_t index = next[r] - window;
        if (index >= Table::kWindow) break;
        indices[r * kPlaces + place] = uint8_t(index);
        weights[r * kPlaces + place] = Table::weight(weight.value[at[r]]);
        ++at[r];
        next[r] = position(r);
      }
    }
  }
}

template <class Table>
PackedTable<typename Table::Weight> pack_table(const Matrix& matrix) {
  constexpr size_t kValues = GROUP * Table::kPlaces;
  PackedTable<typename Table::Weight> packed;
  packed.expect(matrix.nnz(), kValues);
  const int64_t groups = padded(matrix.rows()) / GROUP;
  for (int64_t first = 0; first < groups;) {
    const int64_t bundle = groups - first < BUNDLE ? 1 : BUNDLE;
    std::vector<PackedTable<typename Table::Weight>> parts;
    size_t steps = 0;
    for (int64_t group = first; group < first + bundle; ++group) {
      parts.push_back(pack_group<Table>(matrix, group * GROUP));
      steps = std::max(steps, parts.back().windows.size());
    }
    packed.bundle_steps.push_back(uint32_t(steps));
    for (size_t step = 0; step < steps; ++step) {
      for (const auto& part : parts) {
        if (step < part.windows.size()) {
          packed.windows.push_back(part.windows[step]);
          const uint8_t* index = &part.indices[step * kValues];
          const auto* weight = &part.weights[step * kValues];
          packed.indices.insert(packed.indices.end(), index, index + kValues);
          packed.weights.insert(packed.weights.end(), weight, weight + kValues);
        } else {  // a line begins with a zero
          packed.windows.push_back(0);
          packed.indices.resize(packed.indices.size() + kValues);
          packed.weights.resize(packed.weights.size() + kValues, Table::kPadding);
        }
      }
    }
    first += bundle;
  }
  return packed;
}

// --- int8 ---------------------------------------------------------------------------------------------------------

// Rows of weights quantised to -127 to 127 by each row's step. The parts of a shared layer have the same steps, because
// the sums of two parts are added as integers.
void quantize_rows(Matrix& weight, const std::vector<float>& steps) {
  for (int64_t row = 0; row < weight.rows(); ++row) {
    const float step = steps[size_t(row) % steps.size()];
    for (int64_t i = weight.starts[size_t(row)]; i < weight.starts[size_t(row) + 1]; ++i) {
      float& value = weight.value[size_t(i)];
      value = step > 0 ? std::nearbyint(value / step) : 0;
      value = std::max(-127.0f, std::min(127.0f, value));
    }
  }
}

// The largest sum of a row's absolute weights; of a shared layer's features over all parts, each `features` long.
uint64_t largest_row(const Matrix& weight, size_t features) {
  std::vector<uint64_t> sums(features);
  for (int64_t row = 0; row < weight.rows(); ++row)
    for (int64_t i = weight.starts[size_t(row)]; i < weight.starts[size_t(row) + 1]; ++i)
      sums[size_t(row) % features] += uint64_t(std::fabs(weight.value[size_t(i)]));
  return sums.empty() ? 0 : *std::max_element(sums.begin(), sums.end());
}

// The sum of each row's weights.
std::vector<int32_t> sums_of(const Layer& layer) {
  std::vector<int32_t> sums;
  for (int64_t row = 0; row < layer.weight.rows(); ++row) {
    int32_t sum = 0;
    for (int64_t i = layer.weight.starts[size_t(row)]; i < layer.weight.starts[size_t(row) + 1]; ++i)
      sum += int32_t(layer.weight.value[size_t(i)]);
    sums.push_back(sum);
  }
  return sums;
}

std::vector<int32_t> sums_of(const PackedBlocks<int8_t>& packed, const Layer& layer) {
  const size_t groups = size_t(layer.blocks.groups()), panels = size_t(panel_count(layer.in_features, true));
  std::vector<int32_t> sums(groups * GROUP);
  for (size_t i = 0; i < groups * panels; ++i) {
    const size_t at = i + i / groups;  // a panel has one begin more
    int32_t* of_group = &sums[packed.groups[i] * GROUP];
    for (size_t w = size_t{packed.begins[at]} * GROUP * QUAD; w < size_t{packed.begins[at + 1]} * GROUP * QUAD; ++w)
      of_group[w / QUAD % GROUP] += packed.weights[w];
  }
  return sums;
}

std::vector<int32_t> times(const std::vector<int32_t>& sums, int32_t factor) {
  std::vector<int32_t> products(sums);
  for (int32_t& product : products) product *= factor;
  return products;
}

// --- The blob -----------------------------------------------------------------------------------------------------

// Appends section after section, each at its alignment, in memory that becomes the blob.
class BlobWriter {
 public:
  explicit BlobWriter(uint64_t expected_bytes) { reserve(expected_bytes); }
  template <class T>
  uint64_t append(const std::vector<T>& section) {
    const uint64_t at = bytes_, size = section.size() * sizeof(T);
    const uint64_t end = at + (size + BLOB_ALIGNMENT - 1) / BLOB_ALIGNMENT * BLOB_ALIGNMENT;
    if (end > capacity_) reserve(2 * end);
    if (size) std::memcpy(&blob_[at], section.data(), size);
    std::memset(&blob_[at] + size, 0, end - at - size);  // equal networks, equal blobs
    bytes_ = end;
    return at;
  }
  uint64_t bytes() const { return bytes_; }
  uint8_t* data() { return blob_.get(); }
  uint8_t* take() { return blob_.release(); }

 private:
  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };

  void reserve(uint64_t capacity) {
    capacity_ = (capacity + BLOB_ALIGNMENT - 1) / BLOB_ALIGNMENT * BLOB_ALIGNMENT;
    std::unique_ptr<uint8_t[], Free> larger(static_cast<uint8_t*>(std::aligned_alloc(BLOB_ALIGNMENT, capacity_)));
    if (!larger) throw std::bad_alloc();
    if (bytes_) std::memcpy(larger.get(), blob_.get(), bytes_);
    blob_ = std::move(larger);
  }

  std::unique_ptr<uint8_t[], Free> blob_;
  uint64_t bytes_ = 0, capacity_ = 0;
};

template <class Step>
void append_slices(const Layer& layer, BlobWriter& writer, LayerRecord& record, BlobHeader& header) {
  const PackedSlices<Step> packed = pack_slices<Step>(layer);
  const uint64_t before = writer.bytes();
  record.block_slices = writer.append(packed.block_slices);
  record.slices = writer.append(packed.slices);
  record.steps = writer.append(packed.steps);
  record.slice_bias = writer.append(packed.bias);
  header.slice_bytes += writer.bytes() - before;
  const auto kept = uint64_t(kept_per_step(static_cast<const Step*>(nullptr)));
  header.slice_multiply_adds += packed.steps.size() * SLICE_ROWS * kept;
}

template <class Table>
void append_table(const Layer& layer, BlobWriter& writer, LayerRecord& record, BlobHeader& header) {
  const auto packed = pack_table<Table>(layer.weight);
  const uint64_t before = writer.bytes();
  record.bundle_steps = writer.append(packed.bundle_steps);
  record.windows = writer.append(packed.windows);
  record.indices = writer.append(packed.indices);
  record.weights = writer.append(packed.weights);
  header.table_bytes += writer.bytes() - before;
  header.table_multiply_adds += packed.weights.size();
}

template <class Weight>
void append_blocks(const PackedBlocks<Weight>& packed, BlobWriter& writer, LayerRecord& record, BlobHeader& header) {
  const uint64_t before = writer.bytes();
  record.block_groups = writer.append(packed.groups);
  record.group_blocks = writer.append(packed.begins);
  record.block_quads = writer.append(packed.quads);
  record.block_weights = writer.append(packed.weights);
  header.block_bytes += writer.bytes() - before;
  header.block_multiply_adds += packed.weights.size();
}

template <class Blocks>
void append_blocks(const Layer& layer, BlobWriter& writer, LayerRecord& record, BlobHeader& header) {
  append_blocks(pack_blocks<Blocks>(layer, {}), writer, record, header);
}

// What one step of a quantised weight is worth in each row: 127 of them are its largest weight, or sum of neighbours.
std::vector<float> steps_of(const Layer& layer, bool has_blocks) {
  std::vector<float> steps;
  for (float most : layer.largest) steps.push_back(most / (has_blocks ? 63.5f : 127));  // half a sum, half of 127
  return steps;
}

// What these layers take on an ISA, a layout for a number of rows, or for any number where it is -1.
int64_t chosen_layouts(const Isa* isa, const BlobHeader& header, int64_t batch) {
  int64_t layouts = 0;
  const int64_t from[] = {1, FEW_ROWS + 1, isa->slices_from_f32, isa->slices_from_bf16, isa->slices_from_s8, NEVER};
  for (int64_t rows : from)
    switch (lt4rec_path(isa, &header, batch < 0 ? std::min<int64_t>(rows, NEVER - 1) : batch)) {
      case PATH_TABLES: layouts |= LAYOUT_TABLES; break;
      case PATH_SLICES: layouts |= LAYOUT_SLICES; break;
      case PATH_FILLED: layouts |= LAYOUT_FILLED; break;
    }
  return layouts;
}

float unrounded(float value) { return value; }
float rounded_to_bf16(float value) { return float_of(uint32_t{bf16_of(value)} << 16); }

BlobWriter write_blob(std::vector<Layer> layers, int64_t precision, int64_t layouts, const Isa* isa, int64_t batch,
                      uint64_t nnz) {
  BlobHeader header{};
  header.magic = BLOB_MAGIC;
  header.version = BLOB_VERSION;
  header.precision = uint32_t(precision);
  header.in_features = uint32_t(layers[0].in_features);
  header.layers = uint32_t(layers.size());
  header.nnz = nnz;
  for (const Layer& layer : layers) header.multiply_adds += uint64_t(layer.multiply_adds);
  const bool has_blocks = layouts & LAYOUT_BLOCKS;
  std::vector<std::vector<float>> scales(layers.size());  // S8: what a step of a product is worth in each row
  for (size_t i = 0; i < layers.size(); ++i) {
    Layer& layer = layers[i];
    if (precision != PRECISION_S8) {
      if (has_blocks) continue;
      lt4rec::count_filled(layer);
      header.filled_multiply_adds += uint64_t(layer.filled);
    } else if (layer.kind != LAYER_COMBINED) {
      scales[i] = steps_of(layer, has_blocks);
      if (has_blocks) continue;
      quantize_rows(layer.weight, scales[i]);
      header.largest_sum = std::max(header.largest_sum, 255 * largest_row(layer.weight, scales[i].size()));
    }
  }
  if (layouts == 0) layouts = chosen_layouts(isa, header, batch);
  if (precision == PRECISION_S8 && !has_blocks) {
    const bool has_slices = layouts & LAYOUT_SLICES && header.largest_sum <= LARGEST_EXACT_FLOAT;
    layouts = has_slices ? layouts & (LAYOUT_TABLES | LAYOUT_SLICES) : int64_t{LAYOUT_TABLES};
  }
  header.layouts = uint32_t(layouts);
  std::vector<LayerRecord> records;
  std::vector<float> shared_scale;  // of a part's features

  BlobWriter writer(16 * nnz + 4096);  // at least about what follows
  // The place of the header and the records, whose contents are known last.
  writer.append(std::vector<uint8_t>(sizeof(BlobHeader) + layers.size() * sizeof(LayerRecord)));
  for (size_t i = 0; i < layers.size(); ++i) {
    Layer& layer = layers[i];
    LayerRecord record{};
    record.kind = layer.kind;
    record.in_features = uint32_t(layer.in_features);
    record.out_features = uint32_t(layer.out_features);
    record.activation = layer.activation;
    record.slope = layer.slope;
    if (!layer.slopes.empty()) record.slopes = writer.append(layer.slopes);
    record.is_head = layer.is_head;
    record.part_count = uint32_t(layer.parts.size());
    if (!layer.parts.empty()) record.parts = writer.append(layer.parts);
    record.part_features = layer.part_features;
    record.zero_point = layer.zero_point;
    record.takes_bias = layer.takes_bias;
    if (layer.takes_bias) {
      record.bias_column = header.bias_features;
      header.bias_features += record.out_features;
      if (!layer.bias_order.empty()) record.bias_order = writer.append(layer.bias_order);
    }
    if (layer.input_scale > 0) record.inverse_scale = float(1 / layer.input_scale);
    // Denormals count as zero; a row that adds nothing to its bias would keep one.
    if (precision == PRECISION_BF16)
      for (float& bias : layer.bias)
        if (std::fabs(bias) < 0x1p-126f) bias = 0;
    record.bias = writer.append(padded_copy(layer.bias, layer.out_features));

    if (precision == PRECISION_S8) {
      std::vector<float> scale = shared_scale;
      if (layer.kind != LAYER_COMBINED) {
        scale = scales[i];
        std::vector<int32_t> sums;
        if (has_blocks) {
          const PackedBlocks<int8_t> packed = pack_blocks<BlocksS8>(layer, scale);
          sums = sums_of(packed, layer);
          append_blocks(packed, writer, record, header);
        } else {
          sums = sums_of(layer);
          if (layouts & LAYOUT_TABLES) append_table<TableS8>(layer, writer, record, header);
          if (layouts & LAYOUT_SLICES) {
            const std::vector<int32_t> starts = times(sums, -layer.zero_point);
            layer.bias.assign(starts.begin(), starts.end());
            append_slices<StepF32>(layer, writer, record, header);
          }
        }
        record.start = writer.append(padded_copy(times(sums, -layer.zero_point), layer.out_features));
        record.signed_start = writer.append(padded_copy(times(sums, 128 - layer.zero_point), layer.out_features));
        for (float& step : scale) step = float(double(step) * layer.input_scale);
      }
      if (layer.kind == LAYER_SHARED) shared_scale = scale;
      if (layer.kind != LAYER_SHARED) record.scale = writer.append(padded_copy(scale, int64_t(scale.size())));
    } else if (layer.kind != LAYER_COMBINED && has_blocks) {
      if (precision == PRECISION_BF16)
        append_blocks<BlocksBf16>(layer, writer, record, header);
      else
        append_blocks<BlocksF32>(layer, writer, record, header);
    } else if (layer.kind != LAYER_COMBINED) {
      const bool is_bf16 = precision == PRECISION_BF16;
      if (layouts & LAYOUT_SLICES)
        (is_bf16 ? append_slices<StepBf16> : append_slices<StepF32>)(layer, writer, record, header);
      if (layouts & LAYOUT_TABLES)
        (is_bf16 ? append_table<TableBf16> : append_table<TableF32>)(layer, writer, record, header);
      if (layouts & LAYOUT_FILLED) {
        lt4rec::fill_blocks(layer, is_bf16 ? rounded_to_bf16 : unrounded);
        append_blocks<BlocksF32>(layer, writer, record, header);
      }
    }
    records.push_back(record);

    uint32_t& widest = layer.kind == LAYER_SHARED ? header.shared_features : header.hidden_features;
    widest = std::max(widest, uint32_t(padded(layer.out_features)));
    if (record.is_head) header.outputs += record.out_features, ++header.tasks;
  }
  header.bytes = writer.bytes();

  std::memcpy(writer.data(), &header, sizeof(header));
  std::memcpy(writer.data() + sizeof(header), records.data(), records.size() * sizeof(LayerRecord));
  return writer;
}

}  // namespace

extern "C" int64_t lt4rec_prepack(const CanonicalLayer* layers, int64_t count, int64_t precision, int64_t layouts,
                                  const Isa* isa, int64_t batch, uint8_t** blob, char* message) {
  *blob = nullptr;
  try {
    uint64_t nnz = 0;
    for (int64_t i = 0; layouts == 0 && i < count; ++i)
      if (layers[i].is_blocks) layouts = LAYOUT_BLOCKS;
    for (int64_t i = 0; i < count; ++i) {
      if (!lt4rec::is_canonical(layers[i], i, precision, layouts, message)) return -1;
      const bool reads_x = i == 0 || layers[i - 1].is_head;
      if (!lt4rec::takes_bias_alike(layers[i], i, reads_x && layers[0].takes_bias, message)) return -1;
      if (precision == PRECISION_S8 && reads_x && !lt4rec::counts_alike(layers[i], i, layers[0], message)) return -1;
      nnz += uint64_t(lt4rec::kept_weights(layers[i]));
    }
    std::vector<Layer> arranged = layouts & LAYOUT_BLOCKS ? lt4rec::arrange_blocks(layers, count, precision)
                                                          : lt4rec::arrange(layers, count, precision);
    BlobWriter written = write_blob(std::move(arranged), precision, layouts, isa, batch, nnz);
    *blob = written.take();
    return int64_t(written.bytes());
  } catch (const std::bad_alloc&) {
    return -2;
  }
}

extern "C" void lt4rec_free(uint8_t* blob) { std::free(blob); }
