// NEON with dot products, which most processors from ARMv8.2 on have: four products of 8 bits each in one lane. They
// multiply signed bytes alone, so that codes count from -128 on and sums begin at `signed_start`.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "engine.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace {

#include "bytes_neon.h"

int8x16_t signed_codes(uint8x16_t codes) { return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80))); }

struct TableS8 : OperandsOfTableS8 {
  static Sum add(Sum sum, const uint8_t* window, const Operands& o) {
    const uint8x16x4_t bytes = vld1q_u8_x4(window);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      sum.val[i] = vdotq_s32(sum.val[i], o.weight.val[i], signed_codes(vqtbl4q_u8(bytes, o.index.val[i])));
    return sum;
  }
};

// Twenty-four registers of sums, four of weights, one of codes.
struct BlocksS8 : OperandsOfBlocksS8 {
  static constexpr int kRows = 6, kSums = 6;
  static Sum add(Sum sum, const uint8_t* x, const Operand& weight) {
    const int8x16_t codes = signed_codes(vreinterpretq_u8_u32(vdupq_n_u32(quad_of(x))));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum.val[i] = vdotq_s32(sum.val[i], weight.val[i], codes);
    return sum;
  }
};

#include "blocks.h"
#include "table.h"

void table_s8(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int rows, int32_t* y,
              int64_t y_stride) {
  run_table<TableS8>(blob, layer, layer->signed_start, x, x_stride, rows, y, y_stride);
}

void blocks_s8(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int64_t rows,
               int32_t* y, int64_t y_stride) {
  run_blocks<BlocksS8>(blob, layer, layer->signed_start, x, x_stride, rows, y, y_stride);
}

}  // namespace

extern "C" const Isa* lt4rec_isa_neon_dot(void) {
  static Isa isa = lt4rec_isa_neon;
  isa.name = "neon_dot";
  isa.table_s8 = table_s8;
  isa.blocks_s8 = blocks_s8;
  return &isa;
}

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
