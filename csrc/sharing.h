// What several tasks keep of one weight: views of its bit planes, and the parts of it that are multiplied once.
#ifndef LT4REC_SPARSE_SHARING_H
#define LT4REC_SPARSE_SHARING_H

#include <cstddef>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "engine.h"

namespace lt4rec {

using std::size_t;

// The same layer, counted as its planes are: a layer in blocks has a row for each group and a column for each quad.
CanonicalLayer grid_of(const CanonicalLayer& layer);

// One task's view of a compressed weight, whose layer must outlive it: the kept weights of a row are the set bits of
// its plane, and their values stand among those of the union's set bits. Columns are looked at by words of 64.
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
    each_of_union(row, [&](int64_t column, int64_t at) { to[column] = values_[at]; });
  }

  // Calls visit(column, where its value stands) for what the union keeps of the row, columns ascending.
  template <class Visit>
  void each_of_union(int64_t row, Visit visit) const {
    int64_t at = starts_[size_t(row)];
    for (int64_t word = 0; word < words(); ++word)
      for (uint64_t bits = union_word(row, word); bits; bits &= bits - 1)
        visit(64 * word + __builtin_ctzll(bits), at++);
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

// One weight, and not the first rows or planes of another.
bool shares_weight(const CanonicalLayer& a, const CanonicalLayer& b);

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

Owners owners_of(const std::vector<View>& tasks, int64_t out_features);

// The parts of a shared layer: sets of tasks, the shared ones first, then each task's own. What the tasks of set s keep
// goes to the parts `cover[s]`, which are disjoint and have those tasks as their union.
struct Parts {
  std::vector<uint64_t> sets;
  std::vector<std::vector<uint32_t>> cover;
  size_t shared = 0;

  std::vector<uint32_t> of_task(size_t task) const {
    std::vector<uint32_t> found;
    for (size_t part = 0; part < sets.size(); ++part)
      if (sets[part] >> task & 1) found.push_back(uint32_t(part));
    return found;
  }
};

// `counts` of `owners` are multiply-adds.
Parts choose_parts(const Owners& owners, size_t tasks, int64_t out_features);

}  // namespace lt4rec
#endif
