// The definition of the kernels, for reading and for machines without a file of their own. Every other ISA returns
// the same bits.
#include <cmath>

#include "engine.h"

namespace {

void layer_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  const int64_t stride = lane_stride(lanes), blocks = block_count(layer->in_features);
  const auto* block_slices = reinterpret_cast<const uint32_t*>(blob + layer->block_slices);
  const auto* slice = reinterpret_cast<const Slice*>(blob + layer->slices);
  const auto* step = reinterpret_cast<const Step*>(blob + layer->steps);
  const auto* bias = reinterpret_cast<const float*>(blob + layer->bias);

  for (int64_t row = 0; row < tile_rows(layer->out_features); row += BLOCK_FEATURES + 1)
    for (int lane = 0; lane < lanes; ++lane) y[row * stride + lane] = 0;

  for (int64_t block = 0; block < blocks; ++block) {
    const float* x_block = x + block * (BLOCK_FEATURES + 1) * stride;
    const bool has_relu = layer->activation == ACTIVATION_RELU && block == blocks - 1;
    for (uint32_t s = 0; s < block_slices[block]; ++s, step += slice->steps, ++slice) {
      for (int r = 0; r < SLICE_ROWS; ++r) {
        float* y_row = y + slice->row[r] * stride;
        for (int lane = 0; lane < lanes; ++lane) {
          float sum = block == 0 ? bias[s * SLICE_ROWS + r] : y_row[lane];
          for (int j = 0; j < slice->steps; ++j)
            sum = std::fma(step[j].weight[r], x_block[step_offset(step + j, r) / 64 * stride + lane], sum);
          // In this order NaN passes, as through torch.relu.
          y_row[lane] = has_relu && 0 > sum ? 0 : sum;
        }
      }
    }
  }
}

void transpose_f32(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                   int64_t to_stride) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace

extern "C" const Isa lt4rec_isa_scalar = {"scalar", layer_f32, transpose_f32};
