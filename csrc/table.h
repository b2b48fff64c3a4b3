// The loops over tables that the vector ISAs share; included as slices.h is.
//
// `Table` gives: Activation, Sum (sixteen of them), Value (of y), Operands, kIndexBytes, kWeightBytes (of a step),
// kSums (that fill the registers), load_sum, store_sum, load (a step's operands), add (their products with the
// activations of one window).

// kGroups groups of one bundle for kRows rows of the batch: as many sums under way, and each step's operands are
// fetched once for all rows.
template <class Table, int kRows, int kGroups>
__attribute__((always_inline)) inline void add_groups(int64_t steps, int64_t bundle, const uint32_t* windows,
                                                      const uint8_t* indices, const uint8_t* weights,
                                                      const typename Table::Value* bias,
                                                      const typename Table::Activation* x, int64_t x_stride,
                                                      typename Table::Value* y, int64_t y_stride) {
  typename Table::Sum sum[kGroups][kRows];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[g][r] = Table::load_sum(bias + g * GROUP);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const int64_t at = step * bundle + g;
      const typename Table::Operands operands =
          Table::load(indices + at * Table::kIndexBytes, weights + at * Table::kWeightBytes);
      const typename Table::Activation* window = x + windows[at];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[g][r] = Table::add(sum[g][r], window + r * x_stride, operands);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) Table::store_sum(y + r * y_stride + g * GROUP, sum[g][r]);
}

// A bundle's four groups together while their sums fit the registers; more rows take the groups one by one.
template <class Table, int kRows>
void add_table(const uint8_t* blob, const LayerRecord* layer, const typename Table::Value* bias,
               const typename Table::Activation* x, int64_t x_stride, typename Table::Value* y, int64_t y_stride) {
  constexpr int kGroups = kRows * BUNDLE <= Table::kSums ? BUNDLE : 1;
  const auto* bundle_steps = reinterpret_cast<const uint32_t*>(blob + layer->bundle_steps);
  const auto* windows = reinterpret_cast<const uint32_t*>(blob + layer->windows);
  const uint8_t* indices = blob + layer->indices;
  const uint8_t* weights = blob + layer->weights;
  const int64_t groups = padded(layer->out_features) / GROUP;
  for (int64_t group = 0; group < groups; ++bundle_steps) {
    const int64_t bundle = groups - group < BUNDLE ? 1 : BUNDLE, steps = *bundle_steps;
    const int64_t feature = group * GROUP;
    if (bundle == BUNDLE) {
      for (int64_t g = 0; g < BUNDLE; g += kGroups)
        add_groups<Table, kRows, kGroups>(steps, bundle, windows + g, indices + g * Table::kIndexBytes,
                                          weights + g * Table::kWeightBytes, bias + feature + g * GROUP, x, x_stride,
                                          y + feature + g * GROUP, y_stride);
    } else {
      add_groups<Table, kRows, 1>(steps, bundle, windows, indices, weights, bias + feature, x, x_stride, y + feature,
                                  y_stride);
    }
    group += bundle;
    windows += steps * bundle;
    indices += steps * bundle * Table::kIndexBytes;
    weights += steps * bundle * Table::kWeightBytes;
  }
}

template <class Table>
void run_table(const uint8_t* blob, const LayerRecord* layer, uint64_t bias_section,
               const typename Table::Activation* x, int64_t x_stride, int rows, typename Table::Value* y,
               int64_t y_stride) {
  const auto* bias = reinterpret_cast<const typename Table::Value*>(blob + bias_section);
  while (rows > 0) {
    const int some = rows >= 16 ? 16 : rows >= 8 ? 8 : rows;
    switch (some) {
      case 1: add_table<Table, 1>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 2: add_table<Table, 2>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 3: add_table<Table, 3>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 4: add_table<Table, 4>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 5: add_table<Table, 5>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 6: add_table<Table, 6>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 7: add_table<Table, 7>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 8: add_table<Table, 8>(blob, layer, bias, x, x_stride, y, y_stride); break;
      default: add_table<Table, 16>(blob, layer, bias, x, x_stride, y, y_stride); break;
    }
    x += some * x_stride;
    y += some * y_stride;
    rows -= some;
  }
}
