// Compressed weights, as files and formats.py hold them -> the layers of a blob. The only place that checks what the
// kernels trust.
#include "network.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <unordered_map>
#include <utility>

namespace lt4rec {
namespace {

// One task's view of a compressed weight: the kept weights of a row are the set bits of its plane, and their values
// stand among those of the union's set bits. Columns are looked at by words of 64.
class View {
 public:
  explicit View(const CanonicalLayer& layer)
      : layer_(layer), values_(reinterpret_cast<const float*>(layer.values)),
        planes_(reinterpret_cast<const uint8_t*>(layer.planes)), bytes_((layer.in_features + 7) / 8) {
    if (planes_) {
      const int64_t plane = layer.out_features * bytes_;
      union_.assign(planes_, planes_ + plane);
      for (int64_t task = 1; task < layer.tasks; ++task)
        for (int64_t i = 0; i < plane; ++i) union_[size_t(i)] |= planes_[task * plane + i];
    }
    for (int64_t row = 0; row < layer.out_features; ++row) {
      starts_.push_back(nnz_of_union_);
      nnz_of_union_ += planes_ ? count_bits(&union_[size_t(row * bytes_)]) : layer.in_features;
    }
  }

  int64_t nnz_of_union() const { return nnz_of_union_; }
  int64_t words() const { return (bytes_ + 7) / 8; }
  uint64_t own_word(int64_t row, int64_t word) const { return load(plane(row), word); }
  uint64_t union_word(int64_t row, int64_t word) const { return load(&union_[size_t(row * bytes_)], word); }

  // Writes the row's weights to their columns. What the union does not keep is left as it is.
  void expand(int64_t row, float* to) const {
    const float* value = values_ + starts_[size_t(row)];
    for (int64_t word = 0; word < words(); ++word)
      for (uint64_t bits = union_word(row, word); bits; bits &= bits - 1) to[64 * word + __builtin_ctzll(bits)] = *value++;
  }

  // Calls visit(column, value) for each weight of the row that the layer's task keeps, columns ascending.
  template <class Visit>
  void each_kept(int64_t row, Visit visit) const {
    const float* value = values_ + starts_[size_t(row)];
    if (!planes_) {
      for (int64_t column = 0; column < layer_.in_features; ++column) visit(int32_t(column), value[column]);
      return;
    }
    std::vector<float> expanded(size_t(layer_.in_features));
    expand(row, expanded.data());
    for (int64_t word = 0; word < words(); ++word)
      for (uint64_t bits = own_word(row, word); bits; bits &= bits - 1) {
        const int64_t column = 64 * word + __builtin_ctzll(bits);
        visit(int32_t(column), expanded[size_t(column)]);
      }
  }

  std::vector<int64_t> kept_weights() const {
    std::vector<int64_t> kept;
    for (int64_t row = 0; row < layer_.out_features; ++row)
      kept.push_back(planes_ ? count_bits(plane(row)) : layer_.in_features);
    return kept;
  }

 private:
  const uint8_t* plane(int64_t row) const { return planes_ + (layer_.task * layer_.out_features + row) * bytes_; }

  uint64_t load(const uint8_t* row, int64_t word) const {
    uint64_t bits = 0;
    if (8 * word + 8 <= bytes_)
      std::memcpy(&bits, row + 8 * word, 8);
    else
      std::memcpy(&bits, row + 8 * word, size_t(bytes_ - 8 * word));
    return bits;
  }

  int64_t count_bits(const uint8_t* row) const {
    int64_t count = 0;
    for (int64_t word = 0; word < words(); ++word) count += __builtin_popcountll(load(row, word));
    return count;
  }

  const CanonicalLayer& layer_;
  const float* values_;
  const uint8_t* planes_;
  std::vector<uint8_t> union_;  // of the planes; empty where the weight is dense
  int64_t bytes_, nnz_of_union_ = 0;
  std::vector<int64_t> starts_;  // of each row in the values
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

Layer without_weights(const CanonicalLayer& from, const Positions& rows) {
  Layer layer;
  layer.in_features = from.in_features;
  layer.out_features = from.out_features;
  layer.activation = uint32_t(from.activation);
  layer.is_head = uint32_t(from.is_head);
  layer.input_scale = from.input_scale;
  layer.zero_point = int32_t(from.input_zero_point);
  if (const auto* bias = reinterpret_cast<const float*>(from.bias))
    for (int32_t row : inverse(rows)) layer.bias.push_back(bias[row]);
  return layer;
}

Layer linear(const CanonicalLayer& from, const View& view, const Positions& columns, const Positions& rows) {
  Layer layer = without_weights(from, rows);
  layer.weight.columns = from.in_features;
  layer.weight.expect(kept_weights(from));
  RowBuilder builder(from.in_features);
  for (int32_t row : inverse(rows)) {
    view.each_kept(row, [&](int32_t column, float value) { builder.set(columns[size_t(column)], value); });
    builder.append_to(layer.weight);
  }
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

std::vector<float> in_order(const std::vector<float>& values, const Positions& positions) {
  std::vector<float> ordered;
  for (int32_t row : inverse(positions)) ordered.push_back(values[size_t(row)]);
  return ordered;
}

// One weight, and not the first rows or planes of another.
bool shares_weight(const CanonicalLayer& a, const CanonicalLayer& b) {
  return a.planes != 0 && a.planes == b.planes && a.values == b.values && a.tasks == b.tasks &&
         a.in_features == b.in_features && a.out_features == b.out_features;
}

// Which sets of tasks keep weights in common: `sets` has a bit for each of a set's tasks.
struct Owners {
  std::vector<uint64_t> sets;
  std::vector<int64_t> counts;  // of each set's weights
  std::unordered_map<uint64_t, uint32_t> number_of;
};

// Calls visit(word, columns, set) for each set of tasks in each word of the row: `columns` are those that exactly these
// tasks keep. A word holds few sets, so that this takes a fraction of the time of a look at each weight.
template <class Visit>
void each_set(const std::vector<View>& tasks, int64_t row, Visit visit) {
  std::vector<uint64_t> own(tasks.size());
  for (int64_t word = 0; word < tasks[0].words(); ++word) {
    uint64_t left = tasks[0].union_word(row, word);
    if (!left) continue;
    for (size_t t = 0; t < tasks.size(); ++t) own[t] = tasks[t].own_word(row, word);
    while (left) {
      const int first = __builtin_ctzll(left);
      uint64_t set = 0, columns = left;
      for (size_t t = 0; t < tasks.size(); ++t) {
        const uint64_t keeps = own[t] >> first & 1;
        set |= keeps << t;
        columns &= keeps ? own[t] : ~own[t];
      }
      visit(word, columns, set);
      left &= ~columns;
    }
  }
}

Owners owners_of(const std::vector<View>& tasks, int64_t out_features) {
  Owners owners;
  for (int64_t row = 0; row < out_features; ++row)
    each_set(tasks, row, [&](int64_t, uint64_t columns, uint64_t set) {
      const auto found = owners.number_of.try_emplace(set, uint32_t(owners.sets.size()));
      if (found.second) owners.sets.push_back(set), owners.counts.push_back(0);
      owners.counts[found.first->second] += __builtin_popcountll(columns);
    });
  return owners;
}

// The parts of a shared layer: sets of tasks, the shared ones first, then each task's own. What the tasks of set s keep
// goes to the parts `cover[s]`, which are disjoint and have those tasks as their union.
struct Parts {
  std::vector<uint64_t> sets;
  std::vector<std::vector<uint32_t>> cover;
  size_t shared = 0;
};

Parts choose_parts(const Owners& owners, size_t tasks, int64_t out_features) {
  constexpr int64_t kMostShared = 8;       // the sums of more parts cost what they save
  constexpr size_t kMostCandidates = 256;  // the search is quadratic in them
  const int64_t room = MAX_OUT_FEATURES / padded(out_features) - int64_t(tasks);
  Parts parts;
  parts.cover.resize(owners.sets.size());
  std::vector<uint64_t> left(owners.sets);  // of each set, the tasks that no part serves yet
  std::vector<std::pair<int64_t, uint64_t>> candidates;
  for (size_t s = 0; s < owners.sets.size(); ++s)
    if (owners.sets[s] & (owners.sets[s] - 1)) candidates.emplace_back(owners.counts[s], owners.sets[s]);
  std::sort(candidates.begin(), candidates.end(), std::greater<>());
  if (candidates.size() > kMostCandidates) candidates.resize(kMostCandidates);
  const auto take = [&](uint64_t part) {
    for (size_t s = 0; s < left.size(); ++s) {
      if (part & ~left[s]) continue;
      parts.cover[s].push_back(uint32_t(parts.sets.size()));
      left[s] &= ~part;
    }
    parts.sets.push_back(part);
  };
  while (int64_t(parts.sets.size()) < std::min(kMostShared, room)) {
    int64_t most = -1;
    uint64_t best = 0;
    for (const auto& candidate : candidates) {
      const uint64_t part = candidate.second;
      const int64_t of_part = __builtin_popcountll(part);
      // To add one part to a task's sum costs as much as some eight multiply-adds for each output feature.
      int64_t saved = -8 * of_part * out_features;
      for (size_t s = 0; s < left.size(); ++s)
        if (!(part & ~left[s])) saved += owners.counts[s] * (of_part - 1);
      if (saved > most) most = saved, best = part;
    }
    if (!best) break;
    take(best);
  }
  parts.shared = parts.sets.size();
  for (size_t task = 0; task < tasks; ++task) take(uint64_t{1} << task);
  return parts;
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
  for (size_t task = 0; task < tasks.size(); ++task) {
    std::vector<uint32_t> of_task;
    for (size_t part = 0; part < parts.sets.size(); ++part)
      if (parts.sets[part] >> task & 1) of_task.push_back(uint32_t(part));
    parts_of_task.push_back(std::move(of_task));
  }
  return layer;
}

}  // namespace

bool is_canonical(const CanonicalLayer& layer, int64_t index, int64_t precision, char* message) {
  const auto refuse = [&](const char* what, int64_t got, const char* wanted, int64_t bound) {
    std::snprintf(message, MESSAGE_BYTES, "layer %lld: %s: got %lld, wanted %s %lld", (long long)index, what,
                  (long long)got, wanted, (long long)bound);
    return false;
  };
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
    if (!is_finite("values", reinterpret_cast<const float*>(layer.values), layer.nnz)) return false;
    const auto* bias = reinterpret_cast<const float*>(layer.bias);
    if (bias && !is_finite("bias", bias, layer.out_features)) return false;
    if (layer.input_zero_point < 0 || layer.input_zero_point > 255)
      return refuse("input_zero_point", layer.input_zero_point, "0 to", 255);
  }
  if (layer.planes == 0) {
    const int64_t all = layer.in_features * layer.out_features;
    return layer.nnz == all || refuse("values", layer.nnz, "one for each weight of a dense layer,", all);
  }
  if (layer.task < 0 || layer.task >= layer.tasks) return refuse("task", layer.task, "0 or more, below", layer.tasks);
  if (const int64_t used = layer.in_features % 8) {
    const auto* planes = reinterpret_cast<const uint8_t*>(layer.planes);
    const int64_t bytes = (layer.in_features + 7) / 8;
    for (int64_t row = 0; row < layer.tasks * layer.out_features; ++row)
      if (const int padding = planes[row * bytes + bytes - 1] >> used)
        return refuse("padding of planes", padding, "exactly", 0);
  }
  const int64_t kept = View(layer).nnz_of_union();
  return kept == layer.nnz || refuse("planes", kept, "as many kept weights as there are values,", layer.nnz);
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
      Layer layer = without_weights(from, shared_positions);
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
