// Compressed weights, as files and formats.py hold them -> the layers of a blob. The only place that checks what the
// kernels trust.
#include "network.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "sharing.h"

namespace lt4rec {
namespace {

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

// Appends a row: the columns whose bits are set in `has`, which this clears.
void append_columns(std::vector<uint64_t>& has, const std::vector<float>& values, Matrix& matrix) {
  for (size_t word = 0; word < has.size(); ++word) {
    for (; has[word]; has[word] &= has[word] - 1) {
      const size_t column = word * 64 + size_t(__builtin_ctzll(has[word]));
      matrix.column.push_back(int32_t(column));
      matrix.value.push_back(values[column]);
    }
  }
  matrix.end_row();
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
  void append_to(Matrix& matrix) { append_columns(has_, value_, matrix); }

 private:
  std::vector<float> value_;
  std::vector<uint64_t> has_;
};

std::vector<float> in_order(const std::vector<float>& values, const Positions& positions) {
  if (values.empty()) return {};
  std::vector<float> ordered;
  for (int32_t row : inverse(positions)) ordered.push_back(values[size_t(row)]);
  return ordered;
}

// The same of rows of slopes, one after the other.
std::vector<float> slopes_in_order(const std::vector<float>& slopes, const Positions& positions) {
  std::vector<float> ordered;
  for (auto row = slopes.begin(); row != slopes.end(); row += int64_t(positions.size())) {
    const std::vector<float> of_row = in_order({row, row + int64_t(positions.size())}, positions);
    ordered.insert(ordered.end(), of_row.begin(), of_row.end());
  }
  return ordered;
}

std::vector<uint32_t> order_of(const Positions& positions) {
  const Positions order = inverse(positions);
  return {order.begin(), order.end()};
}

Layer linear(const CanonicalLayer& from, const View& view, const Positions& columns, const Positions& rows) {
  Layer layer = without_weights(from);
  layer.bias = in_order(layer.bias, rows);
  layer.slopes = slopes_in_order(layer.slopes, rows);
  if (from.takes_bias) layer.bias_order = order_of(rows);
  layer.weight.columns = from.in_features;
  layer.weight.expect(kept_weights(from));
  RowBuilder builder(from.in_features);
  for (int32_t row : inverse(rows)) {
    view.each_kept(row, [&](int32_t column, float value) { builder.set(columns[size_t(column)], value); });
    builder.append_to(layer.weight);
  }
  layer.multiply_adds = layer.weight.nnz();
  return layer;
}

// The largest absolute weight of each row, over what the layer's own task keeps.
std::vector<float> largest_weights(const CanonicalLayer& layer, const View& view) {
  std::vector<float> largest(size_t(layer.out_features));
  for (int64_t row = 0; row < layer.out_features; ++row)
    view.each_kept(row, [&](int32_t, float value) {
      largest[size_t(row)] = std::max(largest[size_t(row)], std::fabs(value));
    });
  return largest;
}

// The shared first layer of all tasks, or a layer of kind LINEAR where sharing does not pay. Writes where the tasks'
// features stand, and which parts each task adds.
Layer shared_layer(const std::vector<const CanonicalLayer*>& tasks, const std::vector<View>& views,
                   Positions& positions, std::vector<std::vector<uint32_t>>& parts_of_task) {
  const CanonicalLayer& first = *tasks[0];
  if (tasks.size() < 2 || tasks.size() > 64) return {};
  bool has_head = false;
  std::vector<int64_t> kept(size_t(first.out_features));
  for (size_t t = 0; t < tasks.size(); ++t) {
    if (!shares_weight(*tasks[t], first)) return {};
    has_head = has_head || tasks[t]->is_head;
    const std::vector<int64_t> of_task = views[t].kept_weights();
    for (size_t row = 0; row < kept.size(); ++row) kept[row] += of_task[row];
  }
  const Owners owners = owners_of(views, first.out_features);
  const Parts parts = choose_parts(owners, tasks.size(), first.out_features);
  if (parts.shared == 0) return {};
  positions = has_head ? in_place(first.out_features) : by_kept_weights(kept);

  const int64_t part_features = padded(first.out_features);
  Layer layer;
  layer.kind = LAYER_SHARED;
  layer.in_features = layer.weight.columns = first.in_features;
  layer.out_features = int64_t(parts.sets.size()) * part_features;
  layer.part_features = uint32_t(part_features);
  layer.input_scale = first.input_scale;
  layer.zero_point = int32_t(first.input_zero_point);
  layer.largest.resize(size_t(part_features));
  std::vector<Matrix> matrices(parts.sets.size());
  for (size_t s = 0; s < owners.sets.size(); ++s)
    for (uint32_t part : parts.cover[s]) matrices[part].expect(owners.counts[s]);
  std::vector<float> values(size_t(first.in_features));
  std::vector<std::vector<uint64_t>> kept_by(parts.sets.size(), std::vector<uint64_t>(size_t(views[0].words())));
  size_t position = 0;
  for (int32_t row : inverse(positions)) {
    views[0].expand(row, values.data());
    each_set(views, row, [&](int64_t word, uint64_t columns, uint64_t set) {
      for (uint32_t part : parts.cover[owners.number_of.at(set)]) kept_by[part][size_t(word)] |= columns;
    });
    float& largest = layer.largest[position++];
    for (size_t part = 0; part < matrices.size(); ++part) {
      append_columns(kept_by[part], values, matrices[part]);
      for (auto i = size_t(matrices[part].starts.end()[-2]); i < matrices[part].value.size(); ++i)
        largest = std::max(largest, std::fabs(matrices[part].value[i]));
    }
  }
  for (const Matrix& matrix : matrices) layer.weight.append(matrix, part_features);
  layer.multiply_adds = layer.weight.nnz();
  for (size_t task = 0; task < tasks.size(); ++task) parts_of_task.push_back(parts.of_task(task));
  return layer;
}

}  // namespace

Layer without_weights(const CanonicalLayer& from) {
  Layer layer;
  layer.in_features = from.in_features;
  layer.out_features = from.out_features;
  layer.activation = uint32_t(from.activation);
  layer.slope = float(from.slope);
  layer.is_head = uint32_t(from.is_head);
  layer.takes_bias = uint32_t(from.takes_bias);
  layer.input_scale = from.input_scale;
  layer.zero_point = int32_t(from.input_zero_point);
  if (const auto* bias = reinterpret_cast<const float*>(from.bias)) layer.bias.assign(bias, bias + from.out_features);
  if (const auto* slopes = reinterpret_cast<const float*>(from.slopes))
    layer.slopes.assign(slopes, slopes + slope_rows(from.activation) * from.out_features);
  return layer;
}

bool is_canonical(const CanonicalLayer& layer, int64_t index, int64_t precision, int64_t layouts, char* message) {
  const auto refuse = [&](const char* what, int64_t got, const char* wanted, int64_t bound) {
    std::snprintf(message, MESSAGE_BYTES, "layer %lld: %s: got %lld, wanted %s %lld", (long long)index, what,
                  (long long)got, wanted, (long long)bound);
    return false;
  };
  const bool wants_blocks = layouts & LAYOUT_BLOCKS;
  if (layer.is_blocks != (wants_blocks && layer.planes != 0))
    return refuse("is_blocks", layer.is_blocks, "for these layouts", !layer.is_blocks);
  if (layer.out_features > MAX_OUT_FEATURES)
    return refuse("out_features", layer.out_features, "at most", MAX_OUT_FEATURES);
  if (layer.in_features > MAX_IN_FEATURES) return refuse("in_features", layer.in_features, "at most", MAX_IN_FEATURES);
  if (precision == PRECISION_S8) {
    if (layer.in_features > MAX_IN_FEATURES_S8)
      return refuse("in_features in int8", layer.in_features, "at most", MAX_IN_FEATURES_S8);
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
    const int64_t values = layer.nnz * (layer.is_blocks ? GROUP * QUAD : 1);
    if (!is_finite("values", reinterpret_cast<const float*>(layer.values), values)) return false;
    const auto* bias = reinterpret_cast<const float*>(layer.bias);
    if (bias && !is_finite("bias", bias, layer.out_features)) return false;
    if (layer.input_zero_point < 0 || layer.input_zero_point > 255)
      return refuse("input_zero_point", layer.input_zero_point, "0 to", 255);
  }
  if (layer.activation < ACTIVATION_NONE || layer.activation > ACTIVATION_DICE)
    return refuse("activation", layer.activation, "at most", ACTIVATION_DICE);
  if (layer.slopes ? slope_rows(layer.activation) == 0 : layer.activation == ACTIVATION_DICE)
    return refuse("slopes", layer.slopes != 0, "as many as there are for activation", layer.activation);
  if (layer.planes == 0) {
    const int64_t all = layer.in_features * layer.out_features;
    return layer.nnz == all || refuse("values", layer.nnz, "one for each weight of a dense layer,", all);
  }
  if (layer.task < 0 || layer.task >= layer.tasks) return refuse("task", layer.task, "0 or more, below", layer.tasks);
  const CanonicalLayer grid = grid_of(layer);
  if (const int64_t used = grid.in_features % 8) {
    const auto* planes = reinterpret_cast<const uint8_t*>(layer.planes);
    const int64_t bytes = (grid.in_features + 7) / 8;
    for (int64_t row = 0; row < grid.tasks * grid.out_features; ++row)
      if (const int padding = planes[row * bytes + bytes - 1] >> used)
        return refuse("padding of planes", padding, "exactly", 0);
  }
  const View view(grid);
  const int64_t kept = view.nnz_of_union();
  if (kept != layer.nnz) return refuse("planes", kept, "as many kept weights as there are values,", layer.nnz);
  return !layer.is_blocks || has_zeros_beyond_edges(layer, view) ||
         refuse("values beyond the edge", 1, "of these, exactly", 0);
}

bool takes_bias_alike(const CanonicalLayer& layer, int64_t index, bool is_wanted, char* message) {
  if (layer.takes_bias == is_wanted && !(layer.takes_bias && layer.bias)) return true;
  std::snprintf(message, MESSAGE_BYTES, "layer %lld: takes_bias: got %lld%s, wanted %d%s", (long long)index,
                (long long)layer.takes_bias, layer.bias ? " and a bias" : "", is_wanted,
                is_wanted ? " and none: all layers that read x take theirs from the call, or none" : "");
  return false;
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

int64_t kept_weights(const CanonicalLayer& layer) {
  if (layer.is_blocks) return kept_in_blocks(layer);
  const std::vector<int64_t> kept = View(layer).kept_weights();
  return std::accumulate(kept.begin(), kept.end(), int64_t{0});
}

std::vector<Layer> arrange(const CanonicalLayer* layers, int64_t count, int64_t precision) {
  std::vector<View> views(layers, layers + count);
  std::vector<const CanonicalLayer*> firsts;
  std::vector<View> first_views;
  for (int64_t i = 0; i < count; ++i) {
    if (i != 0 && !layers[i - 1].is_head) continue;
    firsts.push_back(&layers[i]);
    first_views.push_back(views[size_t(i)]);
  }

  std::vector<Layer> arranged;
  Positions shared_positions;
  std::vector<std::vector<uint32_t>> parts_of_task;
  Layer shared = shared_layer(firsts, first_views, shared_positions, parts_of_task);
  const bool is_shared = shared.kind == LAYER_SHARED;
  const uint32_t part_features = shared.part_features;
  if (is_shared) arranged.push_back(std::move(shared));

  Positions columns;
  size_t task = 0;
  for (int64_t i = 0; i < count; ++i) {
    const CanonicalLayer& from = layers[i];
    const View& view = views[size_t(i)];
    const bool is_first = i == 0 || layers[i - 1].is_head;
    if (is_first && is_shared) {
      Layer layer = without_weights(from);
      layer.bias = in_order(layer.bias, shared_positions);
      layer.slopes = slopes_in_order(layer.slopes, shared_positions);
      if (from.takes_bias) layer.bias_order = order_of(shared_positions);
      layer.kind = LAYER_COMBINED;
      layer.parts = parts_of_task[task++];
      layer.part_features = part_features;
      arranged.push_back(std::move(layer));
      columns = shared_positions;
      continue;
    }
    if (is_first) columns = in_place(from.in_features);
    Positions rows = from.is_head ? in_place(from.out_features) : by_kept_weights(view.kept_weights());
    arranged.push_back(linear(from, view, columns, rows));
    columns = std::move(rows);
    if (precision != PRECISION_S8) continue;
    std::vector<float> largest = largest_weights(from, view);
    // Whether multiply-adds are shared must not show in the result: tasks of one weight have their scales in common.
    for (size_t other = 0; is_first && other < firsts.size(); ++other) {
      if (!shares_weight(*firsts[other], from)) continue;
      const std::vector<float> of_other = largest_weights(*firsts[other], first_views[other]);
      for (size_t row = 0; row < largest.size(); ++row) largest[row] = std::max(largest[row], of_other[row]);
    }
    arranged.back().largest = in_order(largest, columns);
  }
  return arranged;
}

}  // namespace lt4rec
