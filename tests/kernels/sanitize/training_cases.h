// Training steps of random patterns, in memory of exactly the size that training.h names, against plain loops.
#ifndef LT4REC_SPARSE_TESTS_TRAINING_CASES_H
#define LT4REC_SPARSE_TESTS_TRAINING_CASES_H

#include <vector>

#include "networks.h"
#include "training.h"

namespace training_cases {

using Floats = std::vector<float>;
using Words = std::vector<uint32_t>;

inline Floats whole_numbers(Random& random, int64_t count) {
  Floats values;
  for (int64_t i = 0; i < count; ++i) values.push_back(float(below(random, 3) - 1));
  return values;
}

// A layer and all that it names.
struct Layer {
  int64_t in, out, high, wide;
  std::vector<std::vector<bool>> kept;  // of rows and columns
  Words row_begins, columns, column_begins, column_places, column_rows;
  Floats values, bias, value_gradient, bias_gradient;
  TrainingLayer described{};

  Layer(Random& random, int64_t in_features, int64_t out_features, bool is_blocks, int64_t of_four)
      : in(in_features), out(out_features), high(is_blocks ? GROUP : 1), wide(is_blocks ? QUAD : 1) {
    const int64_t rows = (out + high - 1) / high, wide_columns = (in + wide - 1) / wide;
    kept.assign(size_t(rows), std::vector<bool>(size_t(wide_columns)));
    for (auto& row : kept)
      for (size_t c = 0; c < row.size(); ++c) row[c] = below(random, 4) < of_four;
    const int64_t tile = is_blocks ? std::max(rows, wide_columns) : 64;
    std::vector<Words> place{size_t(rows), Words(size_t(wide_columns))};
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < wide_columns; ++c)
        if (kept[size_t(r)][size_t(c)]) {
          place[size_t(r)][size_t(c)] = uint32_t(columns.size());
          columns.push_back(uint32_t(c));
        }
    for (int64_t c = 0; c < wide_columns; ++c)
      for (int64_t r = 0; r < rows; ++r)
        if (kept[size_t(r)][size_t(c)]) {
          column_places.push_back(place[size_t(r)][size_t(c)]);
          column_rows.push_back(uint32_t(r));
        }
    row_begins = tiles(rows, wide_columns, tile, [&](int64_t r, int64_t c) { return kept[size_t(r)][size_t(c)]; });
    column_begins = tiles(wide_columns, rows, tile, [&](int64_t c, int64_t r) { return kept[size_t(r)][size_t(c)]; });
    const auto count = int64_t(columns.size());
    values = whole_numbers(random, count * high * wide);
    for (int64_t i = 0; i < count * high * wide; ++i)  // what hangs over an edge is zero
      if (!is_inside(i)) values[size_t(i)] = 0;
    bias = whole_numbers(random, out);
    value_gradient.assign(values.size(), NAN);
    bias_gradient.assign(bias.size(), NAN);
    const auto address = [](const auto& of) { return int64_t(reinterpret_cast<intptr_t>(of.data())); };
    described = {in,
                 out,
                 is_blocks,
                 1,
                 count,
                 int64_t(column_begins.size()) / wide_columns - 1,
                 int64_t(row_begins.size()) / rows - 1,
                 address(row_begins),
                 address(columns),
                 address(column_begins),
                 address(column_places),
                 address(column_rows),
                 address(values),
                 address(bias),
                 address(value_gradient),
                 address(bias_gradient)};
  }

  // The output and the input of the i-th value.
  std::pair<int64_t, int64_t> where(int64_t i) const {
    const int64_t block = i / (high * wide);
    int64_t row = 0, seen = 0;
    for (;; ++row) {
      int64_t in_row = 0;
      for (bool one : kept[size_t(row)]) in_row += one;
      if (block < seen + in_row) break;
      seen += in_row;
    }
    return {row * high + i % (high * wide) / wide, int64_t{columns[size_t(block)]} * wide + i % wide};
  }
  bool is_inside(int64_t i) const {
    const auto [o, k] = where(i);
    return o < out && k < in;
  }

  template <class Kept>
  static Words tiles(int64_t lines, int64_t others, int64_t tile, const Kept& is_kept) {
    const int64_t count = (others + tile - 1) / tile;
    Words begins(size_t((count + 1) * lines));
    uint32_t place = 0;
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t t = 0; t <= count; ++t) {
        begins[size_t(t * lines + line)] = place;
        for (int64_t o = t * tile; t < count && o < std::min(others, (t + 1) * tile); ++o) place += is_kept(line, o);
      }
    return begins;
  }
};

// One step of a network of `widths`, whose sums are whole numbers that float holds.
inline void check_step(const Isa* isa, const std::vector<int64_t>& widths, int64_t batch, bool is_blocks,
                       int64_t of_four, int64_t threads) {
  Random random(uint64_t(batch * 8 + is_blocks * 4 + of_four));
  std::vector<Layer> layers;
  layers.reserve(widths.size());
  std::vector<TrainingLayer> described;
  for (size_t l = 0; l + 1 < widths.size(); ++l) {
    layers.emplace_back(random, widths[l], widths[l + 1], is_blocks, of_four);
    described.push_back(layers.back().described);
  }
  const auto count = int64_t(layers.size()), out = widths.back();
  const Floats x = whole_numbers(random, batch * widths[0]), dh = whole_numbers(random, batch * out);
  Floats panels(size_t(lt4rec_training_floats(described.data(), count, batch)), NAN);
  Floats h(size_t(batch * out), NAN), dx(x.size(), NAN);
  CHECK(lt4rec_training_forward(isa, described.data(), count, x.data(), widths[0], batch, threads, panels.data(),
                                h.data(), out) == STATUS_OK, "forward");
  CHECK(lt4rec_training_backward(isa, described.data(), count, panels.data(), dh.data(), out, batch, threads,
                                 dx.data(), widths[0]) == STATUS_OK, "backward");
  std::vector<Floats> hs{x};
  for (const Layer& layer : layers) {
    Floats y(size_t(batch * layer.out));
    for (int64_t row = 0; row < batch; ++row)
      for (int64_t o = 0; o < layer.out; ++o) y[size_t(row * layer.out + o)] = layer.bias[size_t(o)];
    for (int64_t i = 0; i < int64_t(layer.values.size()); ++i) {
      const auto [o, k] = layer.where(i);
      for (int64_t row = 0; o < layer.out && k < layer.in && row < batch; ++row)
        y[size_t(row * layer.out + o)] += layer.values[size_t(i)] * hs.back()[size_t(row * layer.in + k)];
    }
    for (float& value : y) value = value < 0 ? 0 : value;
    hs.push_back(y);
  }
  CHECK(hs.back() == h, "%s: h of %d rows", isa->name, int(batch));
  Floats dz = dh;
  for (size_t l = layers.size(); l-- > 0;) {
    const Layer& layer = layers[l];
    for (size_t i = 0; i < dz.size(); ++i)
      if (hs[l + 1][i] <= 0) dz[i] = 0;
    Floats before(size_t(batch * layer.in)), of_bias(layer.bias.size());
    for (int64_t row = 0; row < batch; ++row)
      for (int64_t o = 0; o < layer.out; ++o) of_bias[size_t(o)] += dz[size_t(row * layer.out + o)];
    for (int64_t i = 0; i < int64_t(layer.values.size()); ++i) {
      const auto [o, k] = layer.where(i);
      float wanted = 0;
      for (int64_t row = 0; o < layer.out && k < layer.in && row < batch; ++row) {
        wanted += dz[size_t(row * layer.out + o)] * hs[l][size_t(row * layer.in + k)];
        before[size_t(row * layer.in + k)] += layer.values[size_t(i)] * dz[size_t(row * layer.out + o)];
      }
      CHECK(layer.value_gradient[size_t(i)] == wanted, "%s: the gradient of a weight", isa->name);
    }
    CHECK(layer.bias_gradient == of_bias, "%s: the gradient of a bias", isa->name);
    dz = before;
  }
  CHECK(dz == dx, "%s: the gradient of x", isa->name);
}

inline int64_t run(int64_t threads, bool is_quick) {
  using Shapes = std::vector<std::vector<int64_t>>;
  int64_t steps = 0;
  for (const Isa* const* isa = lt4rec_supported_isas(); *isa; ++isa) {
    if (is_quick && isa[1] && isa != lt4rec_supported_isas()) continue;  // the slowest and the fastest
    for (const auto& widths : is_quick ? Shapes{{33, 17, 50, 3}} : Shapes{{7, 5}, {33, 17, 50, 3}, {70, 64, 16}})
      for (int64_t batch : is_quick ? std::vector<int64_t>{1, 65} : std::vector<int64_t>{1, 63, 64, 65, 200})
        for (int64_t of_four : {0, 1, 4})
          for (bool is_blocks : {false, true}) {
            check_step(*isa, widths, batch, is_blocks, of_four, threads);
            ++steps;
          }
  }
  return steps;
}

}  // namespace training_cases
#endif
