// Four floats a register, thirty-two registers. Windows are looked up by byte shuffles, which read four registers at
// once. Baseline ARMv8-A; the dot products of later processors stand in kernels_neon_dot.cpp.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "engine.h"

namespace {

struct Quad {
  using Type = float32x4_t;
  static constexpr int kWidth = 4;
  static Type load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Type v) { vst1q_f32(p, v); }
  static Type broadcast(const float* p) { return vld1q_dup_f32(p); }
  static Type fma(Type a, Type b, Type c) { return vfmaq_f32(c, a, b); }
  // What is below zero becomes zero; NaN and -0 pass, as through torch.relu. A maximum would make +0 of -0.
  static Type relu(Type v) { return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltzq_f32(v))); }
  static uint32x4_t broadcast_pair(const uint16_t* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return vdupq_n_u32(pair);
  }
  static uint32x4_t load_pairs(const uint16_t* p) { return vreinterpretq_u32_u16(vld1q_u16(p)); }
  static Type high(uint32x4_t pairs) { return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000))); }
  static Type low(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
  static Type gather(const float* a, const float* b, const float* c, const float* d) {
    return vld1q_lane_f32(d, vld1q_lane_f32(c, vld1q_lane_f32(b, vld1q_dup_f32(a), 1), 2), 3);
  }
};

// Places of elements -> those of the bytes, or of the byte pairs, that each consists of: 2i and 2i + 1 for each i.
uint8x16x2_t halves(uint8x16_t index) {
  const uint8x16_t first = vshlq_n_u8(index, 1);
  return vzipq_u8(first, vorrq_u8(first, vdupq_n_u8(1)));
}

// A window of 128 bytes is two tables of 64. The first lookup yields 0 where the index is not its own, the second
// leaves what is there.
uint8x16_t look_up(const uint8x16x4_t& low, const uint8x16x4_t& high, uint8x16_t index) {
  return vqtbx4q_u8(vqtbl4q_u8(low, index), high, vsubq_u8(index, vdupq_n_u8(64)));
}

struct TableF32 {
  using Activation = float;
  using Value = float;
  using Sum = float32x4x4_t;
  static constexpr int kSums = 4;
  struct Operands {
    uint8x16_t index[4];
    float32x4x4_t weight;
  };
  static constexpr int64_t kIndexBytes = GROUP, kWeightBytes = 4 * GROUP;
  static Sum load_sum(const float* p) { return vld1q_f32_x4(p); }
  static void store_sum(float* p, const Sum& v) { vst1q_f32_x4(p, v); }
  static Operands load(const uint8_t* indices, const uint8_t* weights) {
    const uint8x16x2_t pairs = halves(vld1q_u8(indices));
    const uint8x16x2_t first = halves(pairs.val[0]), second = halves(pairs.val[1]);
    return {{first.val[0], first.val[1], second.val[0], second.val[1]},
            vld1q_f32_x4(reinterpret_cast<const float*>(weights))};
  }
  static Sum add(Sum sum, const float* window, const Operands& o) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(window);
    const uint8x16x4_t low = vld1q_u8_x4(bytes), high = vld1q_u8_x4(bytes + 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      sum.val[i] = vfmaq_f32(sum.val[i], o.weight.val[i], vreinterpretq_f32_u8(look_up(low, high, o.index[i])));
    return sum;
  }
};

// A pair of bfloat16 is one 32-bit word, whose high half comes first.
struct TableBf16 {
  using Activation = uint16_t;
  using Value = float;
  using Sum = float32x4x4_t;
  static constexpr int kSums = 4;
  struct Operands {
    uint8x16_t index[4];
    uint32x4x4_t weight;
  };
  static constexpr int64_t kIndexBytes = 2 * GROUP, kWeightBytes = 4 * GROUP;
  static Sum load_sum(const float* p) { return vld1q_f32_x4(p); }
  static void store_sum(float* p, const Sum& v) { vst1q_f32_x4(p, v); }
  static Operands load(const uint8_t* indices, const uint8_t* weights) {
    const uint8x16x2_t first = halves(vld1q_u8(indices)), second = halves(vld1q_u8(indices + 16));
    return {{first.val[0], first.val[1], second.val[0], second.val[1]},
            vld1q_u32_x4(reinterpret_cast<const uint32_t*>(weights))};
  }
  static Sum add(Sum sum, const uint16_t* window, const Operands& o) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(window);
    const uint8x16x4_t first = vld1q_u8_x4(bytes), second = vld1q_u8_x4(bytes + 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t x = vreinterpretq_u32_u8(look_up(first, second, o.index[i])), weight = o.weight.val[i];
      const float32x4_t first = vfmaq_f32(sum.val[i], Quad::high(weight), Quad::high(x));
      sum.val[i] = vfmaq_f32(first, Quad::low(weight), Quad::low(x));
    }
    return sum;
  }
};

#include "bytes_neon.h"

// A product of 8 bits each fits 16 signed ones: 255 * 127 < 2^15.
struct TableS8 : OperandsOfTableS8 {
  // The sums of two products each.
  static int32x4_t pairs(uint8x8_t codes, int8x8_t weight) {
    return vpaddlq_s16(vmulq_s16(vreinterpretq_s16_u16(vmovl_u8(codes)), vmovl_s8(weight)));
  }
  static Sum add(Sum sum, const uint8_t* window, const Operands& o) {
    const uint8x16x4_t bytes = vld1q_u8_x4(window);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t codes = vqtbl4q_u8(bytes, o.index.val[i]);
      const int32x4_t low = pairs(vget_low_u8(codes), vget_low_s8(o.weight.val[i]));
      const int32x4_t high = pairs(vget_high_u8(codes), vget_high_s8(o.weight.val[i]));
      sum.val[i] = vaddq_s32(sum.val[i], vpaddq_s32(low, high));
    }
    return sum;
  }
};

struct BlocksF32 {
  using Activation = float;
  using Value = float;
  using Sum = float32x4x4_t;
  using Operand = float32x4x4_t;
  static constexpr int kBytes = 256, kSteps = QUAD, kRows = 6, kSums = 6;
  static constexpr bool kHasRelu = true;
  static Sum load_sum(const float* p) { return vld1q_f32_x4(p); }
  static void store_sum(float* p, const Sum& v) { vst1q_f32_x4(p, v); }
  static Sum relu(const Sum& v) {
    return {{Quad::relu(v.val[0]), Quad::relu(v.val[1]), Quad::relu(v.val[2]), Quad::relu(v.val[3])}};
  }
  static constexpr int input(int step) { return step; }
  static Operand load(const uint8_t* block, int step) {
    return vld1q_f32_x4(reinterpret_cast<const float*>(block) + GROUP * step);
  }
  static Sum add(Sum sum, const float* x, const Operand& weight) {
    const float32x4_t v = vld1q_dup_f32(x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum.val[i] = vfmaq_f32(sum.val[i], weight.val[i], v);
    return sum;
  }
};

// A pair of inputs' weights is one 32-bit word, whose high half comes first.
struct BlocksBf16 : BlocksF32 {
  static constexpr int kBytes = 128;
  static constexpr int input(int step) { return step ^ 1; }
  static Operand load(const uint8_t* block, int step) {
    const uint32x4x4_t pairs = vld1q_u32_x4(reinterpret_cast<const uint32_t*>(block) + GROUP * (step / 2));
    Operand halves;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) halves.val[i] = step % 2 ? Quad::low(pairs.val[i]) : Quad::high(pairs.val[i]);
    return halves;
  }
};

// Neither a product of 8 bits each nor the sum of a pair leaves 16 signed bits.
struct BlocksS8 : OperandsOfBlocksS8 {
  static constexpr int kRows = 4, kSums = 4;
  static Sum add(Sum sum, const uint8_t* x, const Operand& weight) {
    const uint8x8_t codes = vreinterpret_u8_u32(vdup_n_u32(quad_of(x)));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int32x4_t low = TableS8::pairs(codes, vget_low_s8(weight.val[i]));
      const int32x4_t high = TableS8::pairs(codes, vget_high_s8(weight.val[i]));
      sum.val[i] = vaddq_s32(sum.val[i], vpaddq_s32(low, high));
    }
    return sum;
  }
};

#include "blocks.h"
#include "elementwise.h"
#include "activations.h"
#include "quantize.h"
#include "slices.h"
#include "table.h"
#include "entries.h"

// Eight accumulators, or sixteen: up to four multiply-adds under way in each of four units.
void slices_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  switch (lanes) {
    case 1: return add_slices_of_one<StepF32, Quad>(blob, layer, x, y);
    case 8: return add_slices<SlicesF32, Quad, 2, 4>(blob, layer, x, y);
    case 16: return add_slices<SlicesF32, Quad, 4, 4>(blob, layer, x, y);
    case 32: return add_slices<SlicesF32, Quad, 8, 2>(blob, layer, x, y);
    default: return add_slices<SlicesF32, Quad, 16, 1>(blob, layer, x, y);
  }
}

void slices_widened_bf16(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  switch (lanes) {
    case 1: return add_slices_of_one<StepBf16, Quad>(blob, layer, x, y);
    case 8: return add_slices<SlicesWidenedBf16, Quad, 2, 4>(blob, layer, x, y);
    case 16: return add_slices<SlicesWidenedBf16, Quad, 4, 4>(blob, layer, x, y);
    case 32: return add_slices<SlicesWidenedBf16, Quad, 8, 2>(blob, layer, x, y);
    default: return add_slices<SlicesWidenedBf16, Quad, 16, 1>(blob, layer, x, y);
  }
}

void table_s8(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int rows, int32_t* y,
              int64_t y_stride) {
  run_table<TableS8>(blob, layer, layer->start, x, x_stride, rows, y, y_stride);
}

// Interleaving rows 0 and 2, and rows 1 and 3, is half a transposition: twice is a whole one.
inline void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  float32x4_t row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) row[i] = vld1q_f32(from + i * from_stride);
#pragma GCC unroll 2
  for (int time = 0; time < 2; ++time) {
    const float32x4x2_t even = vzipq_f32(row[0], row[2]), odd = vzipq_f32(row[1], row[3]);
    row[0] = even.val[0], row[1] = even.val[1], row[2] = odd.val[0], row[3] = odd.val[1];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) vst1q_f32(to + i * to_stride, row[i]);
}

void transpose_f32(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                   int64_t to_stride) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t c = 0; c < whole_columns; c += 4)
    for (int64_t r = 0; r < whole_rows; r += 4)
      transpose_4x4(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r)
      to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace

// Where slices begin is an estimate from counted instructions: no ARM machine was at hand.
extern "C" const Isa lt4rec_isa_neon = {
    "neon",
    slices_f32,     nullptr,            slices_widened_bf16,
    table_f32,      table_bf16,         table_s8,
    blocks_f32,     native(blocks_bf16), widened(blocks_bf16), blocks_s8,
    transpose_f32,  widen_bf16,         round_bf16,          round_widened_bf16,
    add_f32,        add_s32,            line_f32,            line_bf16,
    dequantize_s32,
    line_u8,        requantize_s32,     codes_f32,           recode_f32,
    dequantize_f32, codes_u8,           recode_s32,          activate, leaky_relu, dice,
    widen_f16,      widen_s8,           cross,
    /*slices_from_f32=*/4, /*slices_from_bf16=*/4, /*slices_from_s8=*/NEVER,
    /*filled_from_many=*/0.65f, /*filled_from_some=*/0.65f,
    /*filled_from_few_cached=*/0.65f, /*filled_from_few=*/0.65f};
#endif
