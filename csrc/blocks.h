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
    const typename Blocks::Activation* quad = x + 4 * int64_t{quads[block]};
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
