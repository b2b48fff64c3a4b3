// The loops over blocks of 16 outputs and 4 inputs that the vector ISAs share; included as slices.h is.
//
// `Blocks` gives: Activation, Sum (sixteen of them), Value (of y), Operand, kSteps (of a block), kStepBytes (of its
// weights), kStepInputs, kRows (whose sums fill the registers), load_sum, store_sum, load (a step's weights), add (their
// products with one row's activations).

// Adds the blocks of kGroups groups, in turn while all have some, for kRows rows: as many sums under way.
template <class Blocks, int kRows, int kGroups>
__attribute__((always_inline)) inline void add_blocks(const uint32_t* group_blocks, const uint32_t* quads,
                                                      const uint8_t* weights, const typename Blocks::Value* bias,
                                                      const typename Blocks::Activation* x, int64_t x_stride,
                                                      typename Blocks::Value* y, int64_t y_stride) {
  typename Blocks::Sum sum[kGroups][kRows];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[g][r] = Blocks::load_sum(bias + g * GROUP);
  const auto add = [&](int g, uint32_t block) __attribute__((always_inline)) {
    const typename Blocks::Activation* quad = x + QUAD * int64_t{quads[block]};
    const uint8_t* of_block = weights + int64_t{block} * Blocks::kSteps * Blocks::kStepBytes;
#pragma GCC unroll 4
    for (int step = 0; step < Blocks::kSteps; ++step) {
      const typename Blocks::Operand operand = Blocks::load(of_block + step * Blocks::kStepBytes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
        sum[g][r] = Blocks::add(sum[g][r], quad + r * x_stride + step * Blocks::kStepInputs, operand);
    }
  };
  uint32_t common = UINT32_MAX;
  for (int g = 0; g < kGroups; ++g) {
    const uint32_t count = group_blocks[g + 1] - group_blocks[g];
    if (count < common) common = count;
  }
  for (uint32_t i = 0; i < common; ++i) {
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) add(g, group_blocks[g] + i);
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    for (uint32_t block = group_blocks[g] + common; block < group_blocks[g + 1]; ++block) add(g, block);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) Blocks::store_sum(y + r * y_stride + g * GROUP, sum[g][r]);
  }
}

// A single row takes kGroups groups in turn: one alone would wait for each of its sums.
template <class Blocks, int kRows, int kGroups>
void add_layer(const uint8_t* blob, const LayerRecord* layer, const typename Blocks::Value* bias,
               const typename Blocks::Activation* x, int64_t x_stride, typename Blocks::Value* y, int64_t y_stride) {
  const auto* group_blocks = reinterpret_cast<const uint32_t*>(blob + layer->group_blocks);
  const auto* quads = reinterpret_cast<const uint32_t*>(blob + layer->block_quads);
  const uint8_t* weights = blob + layer->block_weights;
  const int64_t groups = padded(layer->out_features) / GROUP;
  int64_t group = 0;
  for (; group + kGroups <= groups; group += kGroups)
    add_blocks<Blocks, kRows, kGroups>(group_blocks + group, quads, weights, bias + group * GROUP, x, x_stride,
                                       y + group * GROUP, y_stride);
  for (; group < groups; ++group)
    add_blocks<Blocks, kRows, 1>(group_blocks + group, quads, weights, bias + group * GROUP, x, x_stride,
                                 y + group * GROUP, y_stride);
}

// Rows outside, weights inside: the weights come from the second cache again for each few rows, and keep up.
template <class Blocks>
void run_blocks(const uint8_t* blob, const LayerRecord* layer, uint64_t bias_section,
                const typename Blocks::Activation* x, int64_t x_stride, int64_t rows, typename Blocks::Value* y,
                int64_t y_stride) {
  const auto* bias = reinterpret_cast<const typename Blocks::Value*>(blob + bias_section);
  while (rows > 0) {
    const int64_t some = rows < Blocks::kRows ? rows : int64_t{Blocks::kRows};
    switch (some) {
      case 1: add_layer<Blocks, 1, 2>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 2: add_layer<Blocks, 2, 1>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 3: add_layer<Blocks, 3, 1>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 4: add_layer<Blocks, 4, 1>(blob, layer, bias, x, x_stride, y, y_stride); break;
      case 5: add_layer<Blocks, 5, 1>(blob, layer, bias, x, x_stride, y, y_stride); break;
      default: add_layer<Blocks, Blocks::kRows, 1>(blob, layer, bias, x, x_stride, y, y_stride); break;
    }
    x += some * x_stride;
    y += some * y_stride;
    rows -= some;
  }
}
