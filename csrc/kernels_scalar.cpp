// The readable definition of every kernel: what the other ISAs compute, to the bit.
#include <cmath>

#include "engine.h"

namespace {

#include "elementwise.h"
#include "activations.h"
#include "quantize.h"

// Denormals count as zero, as in x86's bfloat16 instructions. (Where a processor can be told so, the caller has.)
float flushed(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
float fma_bf16(uint16_t weight, float x, float sum) {
  return flushed(std::fma(flushed(float_of(uint32_t{weight} << 16)), flushed(x), sum));
}
float fma_bf16(uint16_t weight, uint16_t x, float sum) { return fma_bf16(weight, float_of(uint32_t{x} << 16), sum); }

const float* tile_at(const float* x_block, uint64_t distance) {
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(x_block) + distance);
}

// One step of one row of a slice, for all lanes.
void add_step(const StepF32& step, int row, const float* x_block, int lanes, float* y_row) {
  const float* x_row = tile_at(x_block, step_offset(step.offsets, row) * uint64_t(lane_stride(lanes)) / 16);
  for (int lane = 0; lane < lanes; ++lane) y_row[lane] = std::fma(step.weight[row], x_row[lane], y_row[lane]);
}
void add_step(const StepBf16& step, int row, const float* x_block, int lanes, float* y_row) {
  for (int half = 1; half >= 0; --half) {
    const float* x_row = tile_at(x_block, step_offset(step.offsets[half], row) * uint64_t(lane_stride(lanes)) / 16);
    for (int lane = 0; lane < lanes; ++lane)
      y_row[lane] = fma_bf16(step.weight[row][half], x_row[lane], y_row[lane]);
  }
}

template <class Step>
void add_slices(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  const int64_t stride = lane_stride(lanes), blocks = block_count(layer->in_features);
  const auto* block_slices = reinterpret_cast<const uint32_t*>(blob + layer->block_slices);
  const auto* slice = reinterpret_cast<const Slice*>(blob + layer->slices);
  const auto* step = reinterpret_cast<const Step*>(blob + layer->steps);
  const auto* bias = reinterpret_cast<const float*>(blob + layer->slice_bias);

  for (int64_t row = 0; row < tile_rows(layer->out_features); row += BLOCK_FEATURES + 1)
    for (int lane = 0; lane < lanes; ++lane) y[row * stride + lane] = 0;

  for (int64_t block = 0; block < blocks; ++block) {
    const float* x_block = x + block * (BLOCK_FEATURES + 1) * stride;
    for (uint32_t s = 0; s < block_slices[block]; ++s, ++slice) {
      for (int r = 0; r < SLICE_ROWS; ++r) {
        float* y_row = y + slice->row[r] * stride;
        if (block == 0)
          for (int lane = 0; lane < lanes; ++lane) y_row[lane] = bias[s * SLICE_ROWS + uint32_t(r)];
        for (uint32_t i = 0; i < slice->steps; ++i) add_step(step[i], r, x_block, lanes, y_row);
        if (layer->activation == ACTIVATION_RELU && block == blocks - 1)
          for (int lane = 0; lane < lanes; ++lane) y_row[lane] = relu(y_row[lane]);
      }
      step += slice->steps;
    }
  }
}

void slices_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  add_slices<StepF32>(blob, layer, x, y, lanes);
}
void slices_widened_bf16(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  add_slices<StepBf16>(blob, layer, x, y, lanes);
}

// Calls `add(weights, indices, window, y)` for each kept weight's place: P of them for each feature and step.
template <int kPlaces, class Weight, class Activation, class Value, class Fma>
void add_table(const uint8_t* blob, const LayerRecord* layer, const Value* start, const Activation* x, int64_t x_stride,
               int rows, Value* y, int64_t y_stride, Fma fma) {
  const auto* bundle_steps = reinterpret_cast<const uint32_t*>(blob + layer->bundle_steps);
  const auto* windows = reinterpret_cast<const uint32_t*>(blob + layer->windows);
  const uint8_t* indices = blob + layer->indices;
  const auto* weights = reinterpret_cast<const Weight*>(blob + layer->weights);
  const int64_t groups = padded(layer->out_features) / GROUP;
  for (int row = 0; row < rows; ++row)
    for (int64_t feature = 0; feature < groups * GROUP; ++feature) y[row * y_stride + feature] = start[feature];

  for (int64_t first = 0; first < groups; ++bundle_steps) {
    const int64_t bundle = groups - first < BUNDLE ? 1 : BUNDLE;
    for (uint32_t step = 0; step < *bundle_steps; ++step) {
      for (int64_t group = first; group < first + bundle; ++group) {
        for (int row = 0; row < rows; ++row) {
          const Activation* window = x + row * x_stride + *windows;
          for (int feature = 0; feature < GROUP; ++feature) {
            Value& sum = y[row * y_stride + group * GROUP + feature];
            for (int place = kPlaces - 1; place >= 0; --place) {  // the last place holds the first weight
              const int at = feature * kPlaces + place;
              sum = fma(weights[at], window[indices[at]], sum);
            }
          }
        }
        ++windows;
        indices += GROUP * kPlaces;
        weights += GROUP * kPlaces;
      }
    }
    first += bundle;
  }
}

void table_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride, int rows, float* y,
               int64_t y_stride) {
  const auto* bias = reinterpret_cast<const float*>(blob + layer->bias);
  add_table<1, float>(blob, layer, bias, x, x_stride, rows, y, y_stride,
                      [](float weight, float v, float sum) { return std::fma(weight, v, sum); });
}
void table_bf16(const uint8_t* blob, const LayerRecord* layer, const uint16_t* x, int64_t x_stride, int rows, float* y,
                int64_t y_stride) {
  const auto* bias = reinterpret_cast<const float*>(blob + layer->bias);
  add_table<2, uint16_t>(blob, layer, bias, x, x_stride, rows, y, y_stride,
                         [](uint16_t weight, uint16_t v, float sum) { return fma_bf16(weight, v, sum); });
}
void table_s8(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int rows, int32_t* y,
              int64_t y_stride) {
  const auto* start = reinterpret_cast<const int32_t*>(blob + layer->start);
  add_table<4, int8_t>(blob, layer, start, x, x_stride, rows, y, y_stride,
                       [](int8_t weight, uint8_t code, int32_t sum) { return sum + weight * code; });
}

// Calls `fma(weight, activation, sum)` for each weight of each block; `place(input, output)` says where a block holds
// it, `inputs` in which order they are added.
template <class Weight, class Activation, class Value, class Place, class Fma>
void add_blocks(const uint8_t* blob, const LayerRecord* layer, const Value* bias, const Activation* x, int64_t x_stride,
                int64_t rows, Value* y, int64_t y_stride, const int (&inputs)[QUAD], Place place, Fma fma) {
  const int64_t groups = padded(layer->out_features) / GROUP;
  const auto* quads = reinterpret_cast<const uint32_t*>(blob + layer->block_quads);
  const auto* weights = reinterpret_cast<const Weight*>(blob + layer->block_weights);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t feature = 0; feature < groups * GROUP; ++feature) y[row * y_stride + feature] = bias[feature];
  for (int64_t panel = 0; panel < panel_count(layer->in_features, sizeof(Weight) == 1); ++panel) {
    const auto* order = reinterpret_cast<const uint32_t*>(blob + layer->block_groups) + panel * groups;
    const auto* begins = reinterpret_cast<const uint32_t*>(blob + layer->group_blocks) + panel * (groups + 1);
    for (int64_t i = 0; i < groups; ++i) {
      for (uint32_t block = begins[i]; block < begins[i + 1]; ++block) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int output = 0; output < GROUP; ++output) {
            Value& sum = y[row * y_stride + int64_t{order[i]} * GROUP + output];
            for (int input : inputs)
              sum = fma(weights[block * int64_t{QUAD * GROUP} + place(input, output)],
                        x[row * x_stride + int64_t{quads[block]} * QUAD + input], sum);
          }
        }
      }
    }
  }
}

void apply_relu(const LayerRecord* layer, int64_t rows, float* y, int64_t y_stride) {
  if (layer->activation != ACTIVATION_RELU) return;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t feature = 0; feature < padded(layer->out_features); ++feature)
      y[row * y_stride + feature] = relu(y[row * y_stride + feature]);
}

void blocks_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride, int64_t rows, float* y,
                int64_t y_stride) {
  const auto* bias = reinterpret_cast<const float*>(blob + layer->bias);
  add_blocks<float>(
      blob, layer, bias, x, x_stride, rows, y, y_stride, {0, 1, 2, 3},
      [](int input, int output) { return input * GROUP + output; },
      [](float weight, float v, float sum) { return std::fma(weight, v, sum); });
  apply_relu(layer, rows, y, y_stride);
}
void blocks_widened_bf16(const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride, int64_t rows,
                         float* y, int64_t y_stride) {
  const auto* bias = reinterpret_cast<const float*>(blob + layer->bias);
  add_blocks<uint16_t>(
      blob, layer, bias, x, x_stride, rows, y, y_stride, {1, 0, 3, 2},
      [](int input, int output) { return input / 2 * 2 * GROUP + output * 2 + input % 2; },
      [](uint16_t weight, float v, float sum) { return fma_bf16(weight, v, sum); });
  apply_relu(layer, rows, y, y_stride);
}
void blocks_s8(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int64_t rows,
               int32_t* y, int64_t y_stride) {
  const auto* start = reinterpret_cast<const int32_t*>(blob + layer->start);
  add_blocks<int8_t>(
      blob, layer, start, x, x_stride, rows, y, y_stride, {0, 1, 2, 3},
      [](int input, int output) { return output * QUAD + input; },
      [](int8_t weight, uint8_t code, int32_t sum) { return sum + weight * code; });
}

void transpose_f32(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                   int64_t to_stride) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace

extern "C" const Isa lt4rec_isa_scalar = {
    "scalar",
    slices_f32,     nullptr,            slices_widened_bf16,
    table_f32,      table_bf16,         table_s8,
    blocks_f32,     nullptr,            blocks_widened_bf16, blocks_s8,
    transpose_f32,  widen_bf16,         round_bf16,          round_widened_bf16,
    add_f32,        add_s32,            line_f32,            line_bf16,
    dequantize_s32,
    line_u8,        requantize_s32,     codes_f32,           recode_f32,
    dequantize_f32, codes_u8,           recode_s32,          activate, leaky_relu, dice,
    widen_f16,      widen_s8,           cross,
    /*slices_from_f32=*/5, /*slices_from_bf16=*/9, /*slices_from_s8=*/6,
    /*filled_from_many=*/0.9f, /*filled_from_some=*/0.9f, /*filled_from_few_cached=*/0.9f, /*filled_from_few=*/0.9f};
