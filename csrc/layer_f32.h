// The loops that the vector ISAs share. An ISA file includes this inside its own anonymous namespace and behind its
// target pragma: the code takes that file's instruction set and no copy of it is visible to another.
//
// `Vector` gives: Type, kWidth (floats), load, store (aligned), broadcast, fma, relu.

// Adds one slice's kept weights within one block, kRows rows at a time: kRows * kVectors accumulators and one weight
// must fit the register file. Eight accumulators hide the latency of the multiply-add; narrow tiles have only four.
template <class Vector, int kVectors, int kRows>
__attribute__((always_inline)) inline void add_slice(const Slice& slice, const Step* steps, const float* bias,
                                                     const float* x_block, float* y, bool has_relu) {
  constexpr int kLanes = Vector::kWidth * kVectors;
  constexpr int kStride = kLanes < 16 ? 16 : kLanes;  // lane_stride(kLanes)
  // The arrays below live in registers only if their loops vanish, hence the unrolling pragmas.
#pragma GCC unroll 4
  for (int first = 0; first < SLICE_ROWS; first += kRows) {
    typename Vector::Type sum[kRows][kVectors];
    float* y_row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      y_row[r] = y + slice.row[first + r] * kStride;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = bias ? Vector::broadcast(bias + first + r) : Vector::load(y_row[r] + v * Vector::kWidth);
    }
    for (const Step* step = steps; step < steps + slice.steps; ++step) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const uint64_t distance = step_offset(step, first + r) * (kStride / 16);
        const auto* x_row = reinterpret_cast<const float*>(reinterpret_cast<const char*>(x_block) + distance);
        const typename Vector::Type weight = Vector::broadcast(step->weight + first + r);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
          sum[r][v] = Vector::fma(weight, Vector::load(x_row + v * Vector::kWidth), sum[r][v]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        Vector::store(y_row[r] + v * Vector::kWidth, has_relu ? Vector::relu(sum[r][v]) : sum[r][v]);
    }
  }
}

template <class Vector, int kVectors, int kRows>
void add_layer(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y) {
  constexpr int kLanes = Vector::kWidth * kVectors;
  constexpr int kStride = kLanes < 16 ? 16 : kLanes;  // lane_stride(kLanes)
  const int64_t blocks = block_count(layer->in_features);
  const auto* block_slices = reinterpret_cast<const uint32_t*>(blob + layer->block_slices);
  const auto* slice = reinterpret_cast<const Slice*>(blob + layer->slices);
  const auto* step = reinterpret_cast<const Step*>(blob + layer->steps);
  const auto* bias = reinterpret_cast<const float*>(blob + layer->bias);

  for (int64_t row = 0; row < tile_rows(layer->out_features); row += BLOCK_FEATURES + 1)
    for (int lane = 0; lane < kLanes; ++lane) y[row * kStride + lane] = 0;

  for (int64_t block = 0; block < blocks; ++block) {
    const float* x_block = x + block * (BLOCK_FEATURES + 1) * kStride;
    const bool has_relu = layer->activation == ACTIVATION_RELU && block == blocks - 1;
    for (uint32_t s = 0; s < block_slices[block]; ++s) {
      add_slice<Vector, kVectors, kRows>(*slice, step, block == 0 ? bias + s * SLICE_ROWS : nullptr, x_block, y,
                                         has_relu);
      step += slice->steps;
      ++slice;
    }
  }
}
