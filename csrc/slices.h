// The loops over slices (sliced ELLPACK) that the vector ISAs share. An ISA file includes this in its own anonymous
// namespace and behind its target pragma: the code takes that file's instruction set and no copy of it is visible to
// another.
//
// `Vector` gives: Type, kWidth (floats), load, store (aligned), broadcast, fma, relu, broadcast_pair (of bfloat16), and
// the high and the low half of a pair. `Four` gives the same of four floats, unaligned, and gather, of four distances.

// Where the tile row of a slice's row begins.
template <int kStride, class T>
inline T* row_of(T* y, const Slice& slice, int row) {
  return y + int64_t{slice.row[row]} * kStride;
}

struct SlicesF32 {
  using Step = StepF32;
  using Activation = float;

  // One kept weight of row r: sum[v] += weight * x.
  template <class Vector, int kVectors, int kStride>
  __attribute__((always_inline)) static void add(const Step& step, int r, const float* x_block,
                                                 typename Vector::Type* sum) {
    const uint64_t distance = step_offset(step.offsets, r) * (kStride / 16);
    const auto* x_row = reinterpret_cast<const float*>(reinterpret_cast<const char*>(x_block) + distance);
    const typename Vector::Type weight = Vector::broadcast(step.weight + r);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sum[v] = Vector::fma(weight, Vector::load(x_row + v * Vector::kWidth), sum[v]);
  }
};

// bfloat16 weights and activations that were widened when the tile was written.
struct SlicesWidenedBf16 {
  using Step = StepBf16;
  using Activation = float;

  // Two kept weights of row r, the high half first, as the bfloat16 instruction of x86 adds them.
  template <class Vector, int kVectors, int kStride>
  __attribute__((always_inline)) static void add(const Step& step, int r, const float* x_block,
                                                 typename Vector::Type* sum) {
    const auto pair = Vector::broadcast_pair(step.weight[r]);
    const typename Vector::Type weights[2] = {Vector::low(pair), Vector::high(pair)};
#pragma GCC unroll 2
    for (int half = 1; half >= 0; --half) {
      const uint64_t distance = step_offset(step.offsets[half], r) * (kStride / 16);
      const auto* x_row = reinterpret_cast<const float*>(reinterpret_cast<const char*>(x_block) + distance);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        sum[v] = Vector::fma(weights[half], Vector::load(x_row + v * Vector::kWidth), sum[v]);
    }
  }
};

// Adds one slice's kept weights within one block, kRows rows at a time: kRows * kVectors accumulators and one weight
// must fit the register file. Eight accumulators hide the latency of the multiply-add; narrow tiles have only four.
template <class Slices, class Vector, int kVectors, int kRows>
__attribute__((always_inline)) inline void add_slice(const Slice& slice, const typename Slices::Step* steps,
                                                     const float* bias, const typename Slices::Activation* x_block,
                                                     float* y, bool has_relu) {
  constexpr int kLanes = Vector::kWidth * kVectors;
  constexpr int kStride = kLanes < 16 ? 16 : kLanes;  // lane_stride(kLanes)
  // The arrays below live in registers only if their loops vanish, hence the unrolling pragmas.
#pragma GCC unroll 4
  for (int first = 0; first < SLICE_ROWS; first += kRows) {
    typename Vector::Type sum[kRows][kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float* y_row = row_of<kStride>(y, slice, first + r);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = bias ? Vector::broadcast(bias + first + r) : Vector::load(y_row + v * Vector::kWidth);
    }
    for (const typename Slices::Step* step = steps; step < steps + slice.steps; ++step) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        Slices::template add<Vector, kVectors, kStride>(*step, first + r, x_block, sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float* y_row = row_of<kStride>(y, slice, first + r);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v)
        Vector::store(y_row + v * Vector::kWidth, has_relu ? Vector::relu(sum[r][v]) : sum[r][v]);
    }
  }
}

template <class Slices, class Vector, int kVectors, int kRows>
void add_slices(const uint8_t* blob, const LayerRecord* layer, const typename Slices::Activation* x, float* y) {
  constexpr int kLanes = Vector::kWidth * kVectors;
  constexpr int kStride = kLanes < 16 ? 16 : kLanes;  // lane_stride(kLanes)
  const int64_t blocks = block_count(layer->in_features);
  const auto* block_slices = reinterpret_cast<const uint32_t*>(blob + layer->block_slices);
  const auto* slice = reinterpret_cast<const Slice*>(blob + layer->slices);
  const auto* step = reinterpret_cast<const typename Slices::Step*>(blob + layer->steps);
  const auto* bias = reinterpret_cast<const float*>(blob + layer->slice_bias);

  for (int64_t row = 0; row < tile_rows(layer->out_features); row += BLOCK_FEATURES + 1)
    for (int lane = 0; lane < kLanes; ++lane) y[row * kStride + lane] = 0;

  for (int64_t block = 0; block < blocks; ++block) {
    const typename Slices::Activation* x_block = x + block * (BLOCK_FEATURES + 1) * kStride;
    const bool has_relu = layer->activation == ACTIVATION_RELU && block == blocks - 1;
    for (uint32_t s = 0; s < block_slices[block]; ++s) {
      add_slice<Slices, Vector, kVectors, kRows>(*slice, step, block == 0 ? bias + s * SLICE_ROWS : nullptr, x_block, y,
                                                 has_relu);
      step += slice->steps;
      ++slice;
    }
  }
}

// --- A single row: the four rows of a slice are the lanes ----------------------------------------------------------

// Four tile rows of one lane, at the distances of a word of offsets.
inline const float* one_lane_at(const float* x_block, uint64_t offsets, int r) {
  return x_block + (offsets >> (16 * r + 6) & 0x3ff);
}

template <class Four>
__attribute__((always_inline)) inline typename Four::Type gather(const float* x_block, uint64_t offsets) {
  return Four::gather(one_lane_at(x_block, offsets, 0), one_lane_at(x_block, offsets, 1),
                      one_lane_at(x_block, offsets, 2), one_lane_at(x_block, offsets, 3));
}

template <class Four>
__attribute__((always_inline)) inline typename Four::Type add_step(const StepF32& step, const float* x_block,
                                                                   typename Four::Type sum) {
  return Four::fma(Four::load(step.weight), gather<Four>(x_block, step.offsets), sum);
}
template <class Four>
__attribute__((always_inline)) inline typename Four::Type add_step(const StepBf16& step, const float* x_block,
                                                                   typename Four::Type sum) {
  const auto pairs = Four::load_pairs(step.weight[0]);
  sum = Four::fma(Four::high(pairs), gather<Four>(x_block, step.offsets[1]), sum);
  return Four::fma(Four::low(pairs), gather<Four>(x_block, step.offsets[0]), sum);
}

// kSlices neighbouring slices of a block in turn, for one alone would wait for each of its sums; the first has the most
// steps. Returns the steps behind.
template <class Step, class Four, int kSlices>
__attribute__((always_inline)) inline const Step* add_together(const Slice* slices, const Step* steps,
                                                               const float* bias, const float* x_block, float* y,
                                                               bool has_relu) {
  const Step* at[kSlices + 1] = {steps};
  typename Four::Type sum[kSlices];
#pragma GCC unroll 4
  for (int s = 0; s < kSlices; ++s) {
    const uint32_t* row = slices[s].row;
    sum[s] = bias ? Four::load(bias + s * SLICE_ROWS) : Four::gather(y + row[0], y + row[1], y + row[2], y + row[3]);
    at[s + 1] = at[s] + slices[s].steps;
  }
  const uint32_t common = slices[kSlices - 1].steps;
  for (uint32_t i = 0; i < common; ++i) {
#pragma GCC unroll 4
    for (int s = 0; s < kSlices; ++s) sum[s] = add_step<Four>(at[s][i], x_block, sum[s]);
  }
#pragma GCC unroll 4
  for (int s = 0; s < kSlices; ++s) {
    for (const Step* step = at[s] + common; step < at[s + 1]; ++step) sum[s] = add_step<Four>(*step, x_block, sum[s]);
    if (has_relu) sum[s] = Four::relu(sum[s]);
    float sums[SLICE_ROWS];
    Four::store(sums, sum[s]);
#pragma GCC unroll 4
    for (int r = 0; r < SLICE_ROWS; ++r) y[slices[s].row[r]] = sums[r];
  }
  return at[kSlices];
}

template <class Step, class Four>
void add_slices_of_one(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y) {
  const int64_t blocks = block_count(layer->in_features);
  const auto* block_slices = reinterpret_cast<const uint32_t*>(blob + layer->block_slices);
  const auto* slice = reinterpret_cast<const Slice*>(blob + layer->slices);
  const auto* step = reinterpret_cast<const Step*>(blob + layer->steps);
  const auto* bias = reinterpret_cast<const float*>(blob + layer->slice_bias);
  for (int64_t row = 0; row < tile_rows(layer->out_features); row += BLOCK_FEATURES + 1) y[row] = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const float* x_block = x + block * (BLOCK_FEATURES + 1);
    const bool has_relu = layer->activation == ACTIVATION_RELU && block == blocks - 1;
    const Slice* end = slice + block_slices[block];
    for (int64_t s = 0; slice < end; ++s) {
      const float* of_slice = block == 0 ? bias + 2 * s * SLICE_ROWS : nullptr;
      const bool is_pair = end - slice > 1;
      step = is_pair ? add_together<Step, Four, 2>(slice, step, of_slice, x_block, y, has_relu)
                     : add_together<Step, Four, 1>(slice, step, of_slice, x_block, y, has_relu);
      slice += is_pair ? 2 : 1;
    }
  }
}
