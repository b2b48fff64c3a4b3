// The loops over blocks of 16 outputs and 4 inputs that the vector ISAs share; included as slices.h is.
//
// `Blocks` gives: Activation, Sum (sixteen of them), Value (of y), Operand, kBytes (of a block), kSteps (that it is
// taken in), kRows (of the batch at a time), kSums (as many as registers hold), load_sum, store_sum, kHasRelu and relu,
// input (the first of a step), load (a step's weights), add (their products with one row's activations).

// Where sums begin: with the bias, the same for every row, or with what earlier panels left in y.
template <class Value>
struct Start {
  const Value* values;
  int64_t stride;
};

// One panel of a layer.
struct Panel {
  const uint32_t* groups;
  const uint32_t* begins;
  const uint32_t* quads;
  const uint8_t* weights;
  bool has_relu;  // it is the last one, and its sums are done
};

// Adds the blocks of kGroups groups, the `at`-th of the panel and those after it, for kRows rows: as many sums are
// under way. All take turns while the last, which has the fewest, has blocks left.
template <class Blocks, int kRows, int kGroups>
__attribute__((always_inline)) inline void add_blocks(const Panel& panel, int64_t at,
                                                      const Start<typename Blocks::Value>& start,
                                                      const typename Blocks::Activation* x, int64_t x_stride,
                                                      typename Blocks::Value* y, int64_t y_stride) {
  typename Blocks::Sum sum[kGroups][kRows];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r)
      sum[g][r] = Blocks::load_sum(start.values + r * start.stride + int64_t{panel.groups[at + g]} * GROUP);
  // An address is one of few registers, plus a multiple of the stride that x86 adds by itself. A compiler that sees
  // through the sums keeps one per row and step, more than there are.
  constexpr int kNear = kRows > 12 ? 5 : 3;  // rows from one register; 5 need a register for 3 strides
  const auto add = [&](int g, uint32_t block) __attribute__((always_inline)) {
    int64_t stride = x_stride * int64_t{sizeof(typename Blocks::Activation)}, three = 3 * stride;
    asm("" : "+r"(stride), "+r"(three));
    const char* of_rows[(kRows + kNear - 1) / kNear];
    of_rows[0] = reinterpret_cast<const char*>(x + QUAD * int64_t{panel.quads[block]});
#pragma GCC unroll 8
    for (int i = 1; i < (kRows + kNear - 1) / kNear; ++i) {
      of_rows[i] = of_rows[i - 1] + kNear * stride;
      asm("" : "+r"(of_rows[i]));
    }
    const uint8_t* of_block = panel.weights + int64_t{block} * Blocks::kBytes;
#pragma GCC unroll 4
    for (int step = 0; step < Blocks::kSteps; ++step) {
      const typename Blocks::Operand operand = Blocks::load(of_block, step);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const char* row = of_rows[r / kNear] + (r % kNear == 3 ? three : r % kNear * stride);
        const auto* of_row = reinterpret_cast<const typename Blocks::Activation*>(row);
        sum[g][r] = Blocks::add(sum[g][r], of_row + Blocks::input(step), operand);
      }
    }
  };
  const uint32_t* begins = panel.begins + at;
  const uint32_t common = begins[kGroups] - begins[kGroups - 1];
  for (uint32_t i = 0; i < common; ++i) {
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) add(g, begins[g] + i);
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    for (uint32_t block = begins[g] + common; block < begins[g + 1]; ++block) add(g, block);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      if constexpr (Blocks::kHasRelu)
        if (panel.has_relu) sum[g][r] = Blocks::relu(sum[g][r]);
      Blocks::store_sum(y + r * y_stride + int64_t{panel.groups[at + g]} * GROUP, sum[g][r]);
    }
  }
}

// As many groups in turn as the registers have sums for: one sum alone would wait for each of its products.
template <class Blocks, int kRows, int kGroups>
void add_groups(const Panel& panel, int64_t at, int64_t end, const Start<typename Blocks::Value>& start,
                const typename Blocks::Activation* x, int64_t x_stride, typename Blocks::Value* y, int64_t y_stride) {
  for (; at + kGroups <= end; at += kGroups)
    add_blocks<Blocks, kRows, kGroups>(panel, at, start, x, x_stride, y, y_stride);
  if constexpr (kGroups > 1) add_groups<Blocks, kRows, kGroups / 2>(panel, at, end, start, x, x_stride, y, y_stride);
}

constexpr int groups_in_turn(int rows, int sums) {
  int groups = 1;
  while (groups < 8 && 2 * groups * rows <= sums) groups *= 2;
  return groups;
}

// Calls the kernel of `rows` rows, at most kRows.
template <class Blocks, int kRows = Blocks::kRows>
void add_rows(int64_t rows, const Panel& panel, int64_t at, int64_t end, const Start<typename Blocks::Value>& start,
              const typename Blocks::Activation* x, int64_t x_stride, typename Blocks::Value* y, int64_t y_stride) {
  if constexpr (kRows > 1)
    if (rows < kRows)
      return add_rows<Blocks, kRows - 1>(rows, panel, at, end, start, x, x_stride, y, y_stride);
  add_groups<Blocks, kRows, groups_in_turn(kRows, Blocks::kSums)>(panel, at, end, start, x, x_stride, y, y_stride);
}

// Panels outside, so that each one's activations stay in the first cache; then groups, as many as have their weights in
// the second one, for that many rows after the others.
template <class Blocks>
void run_blocks(const uint8_t* blob, const LayerRecord* layer, uint64_t bias_section,
                const typename Blocks::Activation* x, int64_t x_stride, int64_t rows, typename Blocks::Value* y,
                int64_t y_stride) {
  constexpr uint32_t kPiece = (128 << 10) / Blocks::kBytes;
  constexpr bool kIsS8 = sizeof(typename Blocks::Activation) == 1;
  const int64_t groups = padded(layer->out_features) / GROUP, panels = panel_count(layer->in_features, kIsS8);
  const int64_t tiles = (rows + Blocks::kRows - 1) / Blocks::kRows;
  for (int64_t p = 0; p < panels; ++p) {
    const Panel panel{reinterpret_cast<const uint32_t*>(blob + layer->block_groups) + p * groups,
                      reinterpret_cast<const uint32_t*>(blob + layer->group_blocks) + p * (groups + 1),
                      reinterpret_cast<const uint32_t*>(blob + layer->block_quads), blob + layer->block_weights,
                      layer->activation == ACTIVATION_RELU && p == panels - 1};
    for (int64_t first = 0, last; first < groups; first = last) {
      for (last = first + 1; last < groups && panel.begins[last + 1] - panel.begins[first] <= kPiece;) ++last;
      int64_t row = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t some = (rows - row + tiles - tile - 1) / (tiles - tile);  // alike: few rows cost more each
        typename Blocks::Value* to = y + row * y_stride;
        const auto* bias = reinterpret_cast<const typename Blocks::Value*>(blob + bias_section);
        const Start<typename Blocks::Value> start = p == 0 ? Start<typename Blocks::Value>{bias, 0}
                                                           : Start<typename Blocks::Value>{to, y_stride};
        add_rows<Blocks>(some, panel, first, last, start, x + row * x_stride, x_stride, to, y_stride);
        row += some;
      }
    }
  }
}
