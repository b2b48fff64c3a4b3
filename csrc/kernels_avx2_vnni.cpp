// AVX-VNNI (Alder Lake, Sapphire Rapids): 32 multiply-adds of int8 in one instruction of 256 bits. For blocks; the rest
// is that of AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels_avx2.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avxvnni,avx2,fma"))), apply_to = function)
#elif !defined(LT4REC_EMULATED)
#pragma GCC target("avxvnni,avx2,fma")
#endif

namespace {

struct Words {
  __m256i low, high;
};

struct BlocksS8 {
  using Activation = uint8_t;
  using Value = int32_t;
  using Sum = Words;
  using Operand = Words;
  static constexpr int kBytes = 64, kSteps = 1, kRows = 6, kSums = 6;
  static constexpr bool kHasRelu = false;
  static Sum load_sum(const int32_t* p) {
    const auto* v = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
  }
  static void store_sum(int32_t* p, const Sum& v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, v.high);
  }
  static constexpr int input(int) { return 0; }
  static Operand load(const uint8_t* block, int) { return load_sum(reinterpret_cast<const int32_t*>(block)); }
  static Sum add(const Sum& sum, const uint8_t* x, const Operand& weight) {
    int32_t quad;
    __builtin_memcpy(&quad, x, sizeof(quad));
    const __m256i codes = _mm256_set1_epi32(quad);
    return {_mm256_dpbusd_avx_epi32(sum.low, codes, weight.low), _mm256_dpbusd_avx_epi32(sum.high, codes, weight.high)};
  }
};

#include "blocks.h"

void blocks_s8(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int64_t rows,
               int32_t* y, int64_t y_stride) {
  run_blocks<BlocksS8>(blob, layer, layer->start, x, x_stride, rows, y, y_stride);
}

}  // namespace

extern "C" const Isa* lt4rec_isa_avx2_vnni(void) {
  static Isa isa = lt4rec_isa_avx2;
  isa.name = "avx2_vnni";
  isa.blocks_s8 = blocks_s8;
  return &isa;
}

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
