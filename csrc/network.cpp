// Canonical CSR -> the layers of a blob. The only place that checks what the kernels trust.
#include "network.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>

namespace lt4rec {
namespace {

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

// Where each feature of a layer's input or output stands: position[feature].
using Positions = std::vector<int32_t>;

Positions in_place(int64_t features) {
  Positions positions(static_cast<size_t>(features));
  std::iota(positions.begin(), positions.end(), 0);
  return positions;
}

// Descending by `kept`, stable, so that one matrix has one blob.
Positions by_kept_weights(const std::vector<int64_t>& kept) {
  Positions order = in_place(int64_t(kept.size())), positions(kept.size());
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return kept[size_t(a)] > kept[size_t(b)]; });
  for (size_t i = 0; i < order.size(); ++i) positions[size_t(order[i])] = int32_t(i);
  return positions;
}

Positions inverse(const Positions& positions) {
  Positions order(positions.size());
  for (size_t i = 0; i < order.size(); ++i) order[size_t(positions[i])] = int32_t(i);
  return order;
}

// Collects one row in any order of columns and appends it in ascending order: a bit for each column, since sorting
// would take most of the time there is.
class RowBuilder {
 public:
  explicit RowBuilder(int64_t columns) : value_(size_t(columns)), has_(size_t(columns + 63) / 64) {}

  void set(int32_t column, float value) {
    value_[size_t(column)] = value;
    has_[size_t(column) / 64] |= uint64_t{1} << (column % 64);
  }
  void append_to(Matrix& matrix) {
    for (size_t word = 0; word < has_.size(); ++word) {
      for (; has_[word]; has_[word] &= has_[word] - 1) {
        const size_t column = word * 64 + size_t(__builtin_ctzll(has_[word]));
        matrix.column.push_back(int32_t(column));
        matrix.value.push_back(value_[column]);
      }
    }
    matrix.end_row();
  }

 private:
  std::vector<float> value_;
  std::vector<uint64_t> has_;
};

Layer without_weights(const CanonicalLayer& from, const Positions& rows) {
  Layer layer;
  layer.in_features = from.in_features;
  layer.out_features = from.out_features;
  layer.activation = uint32_t(from.activation);
  layer.is_head = uint32_t(from.is_head);
  layer.input_scale = from.input_scale;
  layer.zero_point = int32_t(from.input_zero_point);
  if (const float* bias = Csr(from).bias)
    for (int32_t row : inverse(rows)) layer.bias.push_back(bias[row]);
  return layer;
}

Layer linear(const CanonicalLayer& from, const Positions& columns, const Positions& rows) {
  const Csr csr(from);
  Layer layer = without_weights(from, rows);
  layer.weight.columns = from.in_features;
  RowBuilder builder(from.in_features);
  for (int32_t row : inverse(rows)) {
    for (int32_t i = csr.crow_indices[row]; i < csr.crow_indices[row + 1]; ++i)
      builder.set(columns[size_t(csr.col_indices[i])], csr.values[i]);
    builder.append_to(layer.weight);
  }
  return layer;
}

std::vector<int64_t> kept_weights(const CanonicalLayer& layer) {
  const Csr csr(layer);
  std::vector<int64_t> kept;
  for (int64_t row = 0; row < layer.out_features; ++row)
    kept.push_back(csr.crow_indices[row + 1] - csr.crow_indices[row]);
  return kept;
}

// The largest absolute weight of each row, over all of `layers`, whose rows are as many.
std::vector<float> largest_weights(const std::vector<const CanonicalLayer*>& layers) {
  std::vector<float> largest(size_t(layers[0]->out_features));
  for (const CanonicalLayer* layer : layers) {
    const Csr csr(*layer);
    for (size_t row = 0; row < largest.size(); ++row)
      for (int32_t i = csr.crow_indices[row]; i < csr.crow_indices[row + 1]; ++i)
        largest[row] = std::max(largest[row], std::fabs(csr.values[i]));
  }
  return largest;
}

std::vector<float> in_order(const std::vector<float>& values, const Positions& positions) {
  std::vector<float> ordered;
  for (int32_t row : inverse(positions)) ordered.push_back(values[size_t(row)]);
  return ordered;
}

// What the tasks' first layers have in common: for each row, the columns and values that all of them keep.
Matrix common_weights(const std::vector<const CanonicalLayer*>& tasks) {
  Matrix common;
  common.columns = tasks[0]->in_features;
  std::vector<Csr> csrs;
  for (const CanonicalLayer* task : tasks) csrs.emplace_back(*task);
  std::vector<int32_t> at(tasks.size());
  for (int64_t row = 0; row < tasks[0]->out_features; ++row) {
    for (size_t t = 0; t < tasks.size(); ++t) at[t] = csrs[t].crow_indices[row];
    for (int32_t i = csrs[0].crow_indices[row]; i < csrs[0].crow_indices[row + 1]; ++i) {
      bool in_all = true;
      for (size_t t = 1; t < tasks.size(); ++t) {
        const int32_t end = csrs[t].crow_indices[row + 1];
        while (at[t] < end && csrs[t].col_indices[at[t]] < csrs[0].col_indices[i]) ++at[t];
        in_all = in_all && at[t] < end && csrs[t].col_indices[at[t]] == csrs[0].col_indices[i] &&
                 std::memcmp(&csrs[t].values[at[t]], &csrs[0].values[i], sizeof(float)) == 0;
      }
      if (!in_all) continue;
      common.column.push_back(csrs[0].col_indices[i]);
      common.value.push_back(csrs[0].values[i]);
    }
    common.end_row();
  }
  return common;
}

// Appends one part of a shared layer: `common`, or with it what the task keeps beside it; whole groups.
void append_part(const Matrix& common, const CanonicalLayer* task, const Positions& rows, int64_t part_features,
                 Matrix& weight) {
  for (int32_t row : inverse(rows)) {
    int64_t c = common.starts[size_t(row)];
    const int64_t end = common.starts[size_t(row) + 1];
    if (!task) {
      weight.column.insert(weight.column.end(), common.column.begin() + c, common.column.begin() + end);
      weight.value.insert(weight.value.end(), common.value.begin() + c, common.value.begin() + end);
    } else {
      const Csr csr(*task);
      for (int32_t i = csr.crow_indices[row]; i < csr.crow_indices[row + 1]; ++i) {
        if (c < end && common.column[size_t(c)] == csr.col_indices[i]) {
          ++c;
          continue;
        }
        weight.column.push_back(csr.col_indices[i]);
        weight.value.push_back(csr.values[i]);
      }
    }
    weight.end_row();
  }
  for (auto row = int64_t(rows.size()); row < part_features; ++row) weight.end_row();
}

// The shared first layer of all tasks, or a layer of kind LINEAR where sharing does not pay. Writes where the tasks'
// features stand.
Layer shared_layer(const std::vector<const CanonicalLayer*>& tasks, Positions& positions) {
  const CanonicalLayer& first = *tasks[0];
  const auto count = int64_t(tasks.size());
  for (const CanonicalLayer* task : tasks)
    if (task->out_features != first.out_features) return {};
  const int64_t part_features = padded(first.out_features);
  if (count < 2 || (count + 1) * part_features > MAX_OUT_FEATURES) return {};
  const Matrix common = common_weights(tasks);
  // Each task's sum of two parts costs as much as some eight products of a row.
  if (common.nnz() * (count - 1) < 8 * count * first.out_features) return {};

  bool has_head = false;
  std::vector<int64_t> kept(size_t(first.out_features));
  for (const CanonicalLayer* task : tasks) {
    has_head = has_head || task->is_head;
    const std::vector<int64_t> of_task = kept_weights(*task);
    for (size_t row = 0; row < kept.size(); ++row) kept[row] += of_task[row];
  }
  positions = has_head ? in_place(first.out_features) : by_kept_weights(kept);

  Layer layer;
  layer.kind = LAYER_SHARED;
  layer.in_features = layer.weight.columns = first.in_features;
  layer.out_features = (count + 1) * part_features;
  layer.part_features = uint32_t(part_features);
  layer.input_scale = first.input_scale;
  layer.zero_point = int32_t(first.input_zero_point);
  layer.largest = in_order(largest_weights(tasks), positions);
  layer.largest.resize(size_t(part_features));
  append_part(common, nullptr, positions, part_features, layer.weight);
  for (const CanonicalLayer* task : tasks) append_part(common, task, positions, part_features, layer.weight);
  return layer;
}

}  // namespace

bool is_canonical(const CanonicalLayer& layer, int64_t index, int64_t precision, char* message) {
  const auto refuse = [&](const char* what, int64_t at, int64_t got, const char* wanted, int64_t bound) {
    std::snprintf(message, MESSAGE_BYTES, "layer %lld: %s[%lld]: got %lld, wanted %s %lld", (long long)index, what,
                  (long long)at, (long long)got, wanted, (long long)bound);
    return false;
  };
  const auto refuse_size = [&](const char* what, int64_t got, int64_t bound) {
    std::snprintf(message, MESSAGE_BYTES, "layer %lld: %s: got %lld, wanted at most %lld", (long long)index, what,
                  (long long)got, (long long)bound);
    return false;
  };
  const Csr csr(layer);
  if (layer.out_features > MAX_OUT_FEATURES) return refuse_size("out_features", layer.out_features, MAX_OUT_FEATURES);
  if (layer.in_features > MAX_IN_FEATURES) return refuse_size("in_features", layer.in_features, MAX_IN_FEATURES);
  if (precision == PRECISION_S8) {
    if (layer.in_features > MAX_IN_FEATURES_S8)
      return refuse_size("in_features in int8", layer.in_features, MAX_IN_FEATURES_S8);
    // Both become float32. Written so that a NaN is refused.
    if (!(layer.input_scale > 0 && std::isfinite(float(layer.input_scale)) &&
          std::isfinite(float(1 / layer.input_scale)))) {
      std::snprintf(message, MESSAGE_BYTES,
                    "layer %lld: input_scale: got %g, wanted above 0 and finite, as its inverse", (long long)index,
                    layer.input_scale);
      return false;
    }
    const auto is_finite = [&](const char* what, const float* values, int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        if (std::isfinite(values[i])) continue;
        std::snprintf(message, MESSAGE_BYTES, "layer %lld: %s[%lld]: got %g, wanted finite values in int8",
                      (long long)index, what, (long long)i, double(values[i]));
        return false;
      }
      return true;
    };
    if (!is_finite("values", csr.values, layer.nnz)) return false;
    if (csr.bias && !is_finite("bias", csr.bias, layer.out_features)) return false;
    if (layer.input_zero_point < 0 || layer.input_zero_point > 255)
      return refuse("input_zero_point", 0, layer.input_zero_point, "0 to", 255);
  }
  const int64_t rows = layer.out_features;
  if (csr.crow_indices[0] != 0) return refuse("crow_indices", 0, csr.crow_indices[0], "exactly", 0);
  if (csr.crow_indices[rows] != layer.nnz)
    return refuse("crow_indices", rows, csr.crow_indices[rows], "nnz", layer.nnz);
  // All row starts before any column: a start out of range would send the column check astray.
  for (int64_t row = 0; row < rows; ++row)
    if (csr.crow_indices[row + 1] < csr.crow_indices[row])
      return refuse("crow_indices", row + 1, csr.crow_indices[row + 1], "at least", csr.crow_indices[row]);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t least = 0;
    for (int64_t i = csr.crow_indices[row]; i < csr.crow_indices[row + 1]; ++i) {
      const int64_t column = csr.col_indices[i];
      if (column >= layer.in_features)
        return refuse("col_indices", i, column, "less than in_features", layer.in_features);
      if (column < least) return refuse("col_indices", i, column, "ascending within its row, at least", least);
      least = column + 1;
    }
  }
  return true;
}

bool counts_alike(const CanonicalLayer& layer, int64_t index, const CanonicalLayer& first, char* message) {
  if (layer.input_scale == first.input_scale && layer.input_zero_point == first.input_zero_point) return true;
  std::snprintf(message, MESSAGE_BYTES,
                "layer %lld: input_scale, input_zero_point: got %g, %lld, wanted %g, %lld, those of the first layer: "
                "all tasks read the same x",
                (long long)index, layer.input_scale, (long long)layer.input_zero_point, first.input_scale,
                (long long)first.input_zero_point);
  return false;
}

std::vector<Layer> arrange(const CanonicalLayer* layers, int64_t count) {
  std::vector<const CanonicalLayer*> firsts;
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || layers[i - 1].is_head) firsts.push_back(&layers[i]);

  std::vector<Layer> arranged;
  Positions shared_positions;
  Layer shared = shared_layer(firsts, shared_positions);
  const bool is_shared = shared.kind == LAYER_SHARED;
  const uint32_t part_features = shared.part_features;
  if (is_shared) arranged.push_back(std::move(shared));

  bool is_one_width = true;
  for (const CanonicalLayer* first : firsts)
    is_one_width = is_one_width && first->out_features == layers[0].out_features;

  Positions columns;
  uint32_t task = 0;
  for (int64_t i = 0; i < count; ++i) {
    const CanonicalLayer& from = layers[i];
    const bool is_first = i == 0 || layers[i - 1].is_head;
    if (is_first && is_shared) {
      Layer layer = without_weights(from, shared_positions);
      layer.kind = LAYER_COMBINED;
      layer.part = ++task;
      layer.part_features = part_features;
      arranged.push_back(std::move(layer));
      columns = shared_positions;
      continue;
    }
    if (is_first) columns = in_place(from.in_features);
    Positions rows = from.is_head ? in_place(from.out_features) : by_kept_weights(kept_weights(from));
    arranged.push_back(linear(from, columns, rows));
    // Whether products are shared must not show in the result.
    const bool is_alone = !is_first || !is_one_width;
    arranged.back().largest = in_order(largest_weights(is_alone ? std::vector{&from} : firsts), rows);
    columns = std::move(rows);
  }
  return arranged;
}

}  // namespace lt4rec
