// Eight floats a register, sixteen registers. Two rows of a slice of 32 lanes at a time; windows are read by gathers,
// which are so slow that slices are faster for a single row too, and by byte shuffles.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels_avx2.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {

#include "vectors_avx.h"

// Sixteen sums in two registers.
struct Floats {
  __m256 low, high;
};
struct Words {
  __m256i low, high;
};

__m256i bytes_to_words(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
void store_floats(float* p, const Floats& v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}

struct TableF32 {
  using Activation = float;
  using Value = float;
  using Sum = Floats;
  static constexpr int kSums = 4;
  struct Operands {
    Words index;
    Floats weight;
  };
  static constexpr int64_t kIndexBytes = GROUP, kWeightBytes = 4 * GROUP;
  static Sum load_sum(const float* p) { return load_floats(p); }
  static void store_sum(float* p, const Sum& v) { store_floats(p, v); }
  static Operands load(const uint8_t* indices, const uint8_t* weights) {
    return {{bytes_to_words(indices), bytes_to_words(indices + 8)},
            load_floats(reinterpret_cast<const float*>(weights))};
  }
  static Sum add(const Sum& sum, const float* window, const Operands& o) {
    return {_mm256_fmadd_ps(o.weight.low, _mm256_i32gather_ps(window, o.index.low, 4), sum.low),
            _mm256_fmadd_ps(o.weight.high, _mm256_i32gather_ps(window, o.index.high, 4), sum.high)};
  }
};

// A pair of bfloat16 weights is one 32-bit word, a pair of indices one of 16 bits. A gather fetches the activation at
// the index and its right neighbour, which the shift drops.
struct TableBf16 {
  using Activation = uint16_t;
  using Value = float;
  using Sum = Floats;
  static constexpr int kSums = 4;
  struct Operands {
    Words index, weight;
  };
  static constexpr int64_t kIndexBytes = 2 * GROUP, kWeightBytes = 4 * GROUP;
  static Sum load_sum(const float* p) { return load_floats(p); }
  static void store_sum(float* p, const Sum& v) { store_floats(p, v); }
  static Operands load(const uint8_t* indices, const uint8_t* weights) {
    const auto* index = reinterpret_cast<const __m128i*>(indices);
    const auto* weight = reinterpret_cast<const __m256i*>(weights);
    return {{_mm256_cvtepu16_epi32(_mm_loadu_si128(index)), _mm256_cvtepu16_epi32(_mm_loadu_si128(index + 1))},
            {_mm256_loadu_si256(weight), _mm256_loadu_si256(weight + 1)}};
  }
  static __m256 look_up(const uint16_t* window, __m256i index) {
    const __m256i pairs = _mm256_i32gather_epi32(reinterpret_cast<const int*>(window), index, 2);
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  }
  static __m256 add(__m256 sum, const uint16_t* window, __m256i index, __m256i weight) {
    const __m256 first = _mm256_castsi256_ps(_mm256_and_si256(weight, _mm256_set1_epi32(int(0xffff0000))));
    const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(weight, 16));
    sum = _mm256_fmadd_ps(first, look_up(window, _mm256_srli_epi32(index, 8)), sum);
    return _mm256_fmadd_ps(second, look_up(window, _mm256_and_si256(index, _mm256_set1_epi32(0xff))), sum);
  }
  static Sum add(const Sum& sum, const uint16_t* window, const Operands& o) {
    return {add(sum.low, window, o.index.low, o.weight.low), add(sum.high, window, o.index.high, o.weight.high)};
  }
};

// The window of 64 bytes is four tables of sixteen, of which a byte shuffle looks up one. It yields 0 where the index
// has its high bit set, which (index ^ 16 t) + 0x70 has unless the index points into table t.
// Products go through 16-bit words: the 8-bit multiply-add saturates.
struct TableS8 {
  using Activation = uint8_t;
  using Value = int32_t;
  using Sum = Words;
  static constexpr int kSums = 4;
  struct Operands {
    Words index, weight;
  };
  static constexpr int64_t kIndexBytes = 4 * GROUP, kWeightBytes = 4 * GROUP;
  static Sum load_sum(const int32_t* p) {
    const auto* v = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
  }
  static void store_sum(int32_t* p, const Sum& v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, v.high);
  }
  static Operands load(const uint8_t* indices, const uint8_t* weights) {
    const auto *index = reinterpret_cast<const __m256i*>(indices), *weight = reinterpret_cast<const __m256i*>(weights);
    return {{_mm256_loadu_si256(index), _mm256_loadu_si256(index + 1)},
            {_mm256_loadu_si256(weight), _mm256_loadu_si256(weight + 1)}};
  }
  static __m256i add(__m256i sum, const uint8_t* window, __m256i index, __m256i weight) {
    __m256i codes = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(window) + t);
      const __m256i within = _mm256_add_epi8(_mm256_xor_si256(index, _mm256_set1_epi8(char(16 * t))),
                                             _mm256_set1_epi8(0x70));
      codes = _mm256_or_si256(codes, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), within));
    }
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(weight, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(weight, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  }
  static Sum add(const Sum& sum, const uint8_t* window, const Operands& o) {
    return {add(sum.low, window, o.index.low, o.weight.low), add(sum.high, window, o.index.high, o.weight.high)};
  }
};

// Twelve registers of sums, two of weights, one of an activation.
struct BlocksF32 {
  using Activation = float;
  using Value = float;
  using Sum = Floats;
  using Operand = Floats;
  static constexpr int kBytes = 256, kSteps = QUAD, kRows = 6, kSums = 6;
  static constexpr bool kHasRelu = true;
  static Sum load_sum(const float* p) { return load_floats(p); }
  static void store_sum(float* p, const Sum& v) { store_floats(p, v); }
  static Sum relu(const Sum& v) { return {Ymm::relu(v.low), Ymm::relu(v.high)}; }
  static constexpr int input(int step) { return step; }
  static Operand load(const uint8_t* block, int step) {
    return load_floats(reinterpret_cast<const float*>(block) + GROUP * step);
  }
  static Sum add(const Sum& sum, const float* x, const Operand& weight) {
    const __m256 v = _mm256_broadcast_ss(x);
    return {_mm256_fmadd_ps(weight.low, v, sum.low), _mm256_fmadd_ps(weight.high, v, sum.high)};
  }
};

// A pair of inputs' weights is one 32-bit word, whose high half comes first. Five rows leave registers for both halves,
// so that each word is loaded once.
struct BlocksBf16 : BlocksF32 {
  struct Operand {
    Floats first, second;
  };
  static constexpr int kBytes = 128, kSteps = 2, kRows = 5, kSums = 5;
  static constexpr int input(int step) { return 2 * step; }
  static Operand load(const uint8_t* block, int step) {
    const auto* pairs = reinterpret_cast<const __m256i*>(block + 64 * step);
    const __m256i a = _mm256_loadu_si256(pairs), b = _mm256_loadu_si256(pairs + 1);
    return {{Ymm::high(a), Ymm::high(b)}, {Ymm::low(a), Ymm::low(b)}};
  }
  static Sum add(const Sum& sum, const float* x, const Operand& weight) {
    return BlocksF32::add(BlocksF32::add(sum, x + 1, weight.first), x, weight.second);
  }
};

struct BlocksS8 {
  using Activation = uint8_t;
  using Value = int32_t;
  using Sum = Words;
  using Operand = Words;
  static constexpr int kBytes = 64, kSteps = 1, kRows = 5, kSums = 5;
  static constexpr bool kHasRelu = false;
  static Sum load_sum(const int32_t* p) { return TableS8::load_sum(p); }
  static void store_sum(int32_t* p, const Sum& v) { TableS8::store_sum(p, v); }
  static constexpr int input(int) { return 0; }
  static Operand load(const uint8_t* block, int) { return TableS8::load_sum(reinterpret_cast<const int32_t*>(block)); }
  // Pairs of products fit 16 bits, as engine.h has it.
  static __m256i add(__m256i sum, __m256i codes, __m256i weight) {
    const __m256i pairs = _mm256_maddubs_epi16(codes, weight);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Sum add(const Sum& sum, const uint8_t* x, const Operand& weight) {
    int32_t quad;
    __builtin_memcpy(&quad, x, sizeof(quad));
    const __m256i codes = _mm256_set1_epi32(quad);
    return {add(sum.low, codes, weight.low), add(sum.high, codes, weight.high)};
  }
};

#include "blocks.h"
#include "elementwise.h"
#include "activations.h"
#include "codes.h"

// Codes from values, before the zero point, as 32-bit integers. Above a million the conversion might overflow to the
// other end; a NaN passes the minimum, which returns its second operand then, and converts to the least integer there
// is.
inline __m256i scaled(__m256 v, __m256 inverse_scale) {
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(1e6f), _mm256_mul_ps(v, inverse_scale)));
}

// Writes codes by thirty-two, which `values(first)` gives by eight, and the rest one by one. In a line (see HALF_S8)
// each thirty-two appear twice.
template <bool kIsLine, class Values, class Code>
__attribute__((always_inline)) inline void write_by_32(int64_t count, int32_t zero_point, uint8_t* to, Values values,
                                                       Code code) {
  // Packing works within 128 bits and leaves the eights interleaved by fours.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i zero = _mm256_set1_epi16(int16_t(zero_point));
  int64_t first = 0;
  for (; first + 32 <= count; first += 32) {
    const __m256i low = _mm256_packs_epi32(values(first), values(first + 8));
    const __m256i high = _mm256_packs_epi32(values(first + 16), values(first + 24));
    const __m256i packed = _mm256_packus_epi16(_mm256_adds_epi16(low, zero), _mm256_adds_epi16(high, zero));
    const __m256i codes = _mm256_permutevar8x32_epi32(packed, order);
    uint8_t* at = to + (kIsLine ? 2 : 1) * first;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), codes);
    if (kIsLine && first) _mm256_storeu_si256(reinterpret_cast<__m256i*>(at) - 1, codes);
  }
  uint8_t* at = to + (kIsLine ? 2 : 1) * first;
  for (int64_t i = first; i < count; ++i) at[i - first] = code(i);
  if (kIsLine && first && first < count) __builtin_memcpy(at - HALF_S8, at, HALF_S8);
}

template <bool kIsLine>
__attribute__((always_inline)) inline int write_quantized(const float* from, int64_t count, float inverse_scale,
                                                          int32_t zero_point, uint8_t* to) {
  const __m256 inverse = _mm256_set1_ps(inverse_scale);
  __m256 nans = _mm256_setzero_ps();
  const auto values = [&](int64_t first) {
    const __m256 v = _mm256_loadu_ps(from + first);
    nans = _mm256_or_ps(nans, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return scaled(v, inverse);
  };
  const auto code = [=](int64_t i) { return code_of(from[i], inverse_scale, float(zero_point)); };
  write_by_32<kIsLine>(count, zero_point, to, values, code);
  return _mm256_movemask_ps(nans) != 0 || has_nan(from + count / 32 * 32, count % 32);
}

template <bool kIsLine>
__attribute__((always_inline)) inline void write_requantized(const int32_t* a, const int32_t* b, const float* scale,
                                                             const float* bias, int64_t count, int has_relu,
                                                             float inverse_scale, int32_t zero_point, uint8_t* to) {
  const __m256 inverse = _mm256_set1_ps(inverse_scale);
  const auto values = [=](int64_t first) {
    __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + first));
    if (b) sum = _mm256_add_epi32(sum, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + first)));
    const __m256 v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(scale + first),
                                     _mm256_loadu_ps(bias + first));
    return scaled(has_relu ? Ymm::relu(v) : v, inverse);
  };
  const auto code = [=](int64_t i) {
    const float v = __builtin_fmaf(float(b ? a[i] + b[i] : a[i]), scale[i], bias[i]);
    return code_of(has_relu ? relu(v) : v, inverse_scale, float(zero_point));
  };
  write_by_32<kIsLine>(count, zero_point, to, values, code);
}

int line_u8(const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* line) {
  return write_quantized<true>(from, count, inverse_scale, zero_point, line);
}

int codes_u8(const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* codes) {
  return write_quantized<false>(from, count, inverse_scale, zero_point, codes);
}

void requantize_s32(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                    int has_relu, float inverse_scale, int32_t zero_point, uint8_t* line) {
  write_requantized<true>(a, b, scale, bias, count, has_relu, inverse_scale, zero_point, line);
}

void recode_s32(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count, int has_relu,
                float inverse_scale, int32_t zero_point, uint8_t* codes) {
  write_requantized<false>(a, b, scale, bias, count, has_relu, inverse_scale, zero_point, codes);
}

#include "slices.h"
#include "table.h"
#include "entries.h"
#include "transpose_avx.h"

void slices_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  switch (lanes) {
    case 1: return add_slices_of_one<StepF32, Xmm>(blob, layer, x, y);
    case 8: return add_slices<SlicesF32, Ymm, 1, 4>(blob, layer, x, y);
    case 16: return add_slices<SlicesF32, Ymm, 2, 4>(blob, layer, x, y);
    case 32: return add_slices<SlicesF32, Ymm, 4, 2>(blob, layer, x, y);
    default: return add_slices<SlicesF32, Ymm, 8, 1>(blob, layer, x, y);
  }
}

void slices_widened_bf16(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  switch (lanes) {
    case 1: return add_slices_of_one<StepBf16, Xmm>(blob, layer, x, y);
    case 8: return add_slices<SlicesWidenedBf16, Ymm, 1, 4>(blob, layer, x, y);
    case 16: return add_slices<SlicesWidenedBf16, Ymm, 2, 4>(blob, layer, x, y);
    case 32: return add_slices<SlicesWidenedBf16, Ymm, 4, 2>(blob, layer, x, y);
    default: return add_slices<SlicesWidenedBf16, Ymm, 8, 1>(blob, layer, x, y);
  }
}

}  // namespace

extern "C" void lt4rec_table_s8_avx2(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride,
                                     int rows, int32_t* y, int64_t y_stride) {
  run_table<TableS8>(blob, layer, layer->start, x, x_stride, rows, y, y_stride);
}

extern "C" const Isa lt4rec_isa_avx2 = {
    "avx2",
    slices_f32,     nullptr,            slices_widened_bf16,
    table_f32,      table_bf16,         lt4rec_table_s8_avx2,
    blocks_f32,     native(blocks_bf16), widened(blocks_bf16), blocks_s8,
    transpose_f32,  widen_bf16,         round_bf16,          round_widened_bf16,
    add_f32,        add_s32,            line_f32,            line_bf16,
    dequantize_s32,
    line_u8,        requantize_s32,     codes_f32,           recode_f32,
    dequantize_f32, codes_u8,           recode_s32,          activate, leaky_relu, dice,
    widen_f16,      widen_s8,           cross,
    /*slices_from_f32=*/1, /*slices_from_bf16=*/1, /*slices_from_s8=*/6,
    /*filled_from_many=*/0.65f, /*filled_from_some=*/0.65f, /*filled_from_few_cached=*/0.25f, /*filled_from_few=*/0.4f};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
