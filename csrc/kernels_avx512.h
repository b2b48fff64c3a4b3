// Sixteen floats a register, thirty-two registers: a whole slice of 64 lanes in sixteen accumulators.
//
// Built three times, each a superset of the one before: kernels_avx512.cpp, kernels_avx512_vnni.cpp,
// kernels_avx512_bf16.cpp say which instructions there are.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels_avx2.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target(LT4REC_TARGET))), apply_to = function)
#elif !defined(LT4REC_EMULATED)  // by tests, which bring the instructions
#define LT4REC_PRAGMA(words) _Pragma(#words)
#define LT4REC_PRAGMA_OF(words) LT4REC_PRAGMA(words)
LT4REC_PRAGMA_OF(GCC target(LT4REC_TARGET))
#endif

namespace {

struct Zmm {
  using Type = __m512;
  static constexpr int kWidth = 16;
  static Type load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Type v) { _mm512_store_ps(p, v); }
  static Type broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  // max returns its second operand where one is NaN: in this order NaN passes, as through torch.relu.
  // The mask is full, and spares a false warning: GCC 12 builds the plain form on an undefined register.
  static Type relu(Type v) { return _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), v); }
  static __m512i broadcast_pair(const uint16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Type high(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
  }
  static Type low(__m512i pairs) { return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, pairs, 16)); }
};

// Eight lanes need half a register: the narrow one loads on more ports, and costs half on CPUs that split the wide.
#include "vectors_avx.h"

struct TableF32 {
  using Activation = float;
  using Value = float;
  using Sum = __m512;
  static constexpr int kSums = 16;
  struct Operands {
    __m512i index;
    __m512 weight;
  };
  static constexpr int64_t kIndexBytes = GROUP, kWeightBytes = 4 * GROUP;
  static Sum load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sum(float* p, Sum v) { _mm512_storeu_ps(p, v); }
  static Operands load(const uint8_t* indices, const uint8_t* weights) {
    const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(indices));
    return {_mm512_maskz_cvtepu8_epi32(0xffff, index), _mm512_loadu_ps(weights)};
  }
  static Sum add(Sum sum, const float* window, const Operands& o) {
    const __m512 x = _mm512_permutex2var_ps(_mm512_loadu_ps(window), o.index, _mm512_loadu_ps(window + 16));
    return _mm512_fmadd_ps(o.weight, x, sum);
  }
};

struct TableBf16 {
  using Activation = uint16_t;
  using Value = float;
  using Sum = __m512;
  static constexpr int kSums = 16;
  struct Operands {
    __m512i index, weight;
  };
  static constexpr int64_t kIndexBytes = 2 * GROUP, kWeightBytes = 4 * GROUP;
  static Sum load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sum(float* p, Sum v) { _mm512_storeu_ps(p, v); }
  static Operands load(const uint8_t* indices, const uint8_t* weights) {
    return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices))),
            _mm512_loadu_si512(weights)};
  }
  static __m512i look_up(const uint16_t* window, const Operands& o) {
    return _mm512_permutex2var_epi16(_mm512_loadu_si512(window), o.index, _mm512_loadu_si512(window + 32));
  }
#ifdef LT4REC_HAS_BF16
  static Sum add(Sum sum, const uint16_t* window, const Operands& o) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(look_up(window, o)), reinterpret_cast<__m512bh>(o.weight));
  }
#else
  static Sum add(Sum sum, const uint16_t* window, const Operands& o) {
    const __m512i x = look_up(window, o);
    return _mm512_fmadd_ps(Zmm::low(o.weight), Zmm::low(x), _mm512_fmadd_ps(Zmm::high(o.weight), Zmm::high(x), sum));
  }
#endif
};

#ifdef LT4REC_HAS_VNNI
// One permutation looks up 64 codes, one dot product does 64 multiply-adds: two instructions for each row of the batch.
struct TableS8 {
  using Activation = uint8_t;
  using Value = int32_t;
  using Sum = __m512i;
  static constexpr int kSums = 16;
  struct Operands {
    __m512i index, weight;
  };
  static constexpr int64_t kIndexBytes = 4 * GROUP, kWeightBytes = 4 * GROUP;
  static Sum load_sum(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_sum(int32_t* p, Sum v) { _mm512_storeu_si512(p, v); }
  static Operands load(const uint8_t* indices, const uint8_t* weights) {
    return {_mm512_loadu_si512(indices), _mm512_loadu_si512(weights)};
  }
  static Sum add(Sum sum, const uint8_t* window, const Operands& o) {
    const __m512i codes = _mm512_maskz_permutexvar_epi8(~__mmask64{0}, o.index, _mm512_loadu_si512(window));
    return _mm512_dpbusd_epi32(sum, codes, o.weight);
  }
};
#endif

// The activation is an operand in memory, which the instruction broadcasts.
struct BlocksF32 {
  using Activation = float;
  using Value = float;
  using Sum = __m512;
  using Operand = __m512;
  static constexpr int kBytes = 256, kSteps = QUAD, kRows = 12, kSums = 24;
  static constexpr bool kHasRelu = true;
  static Sum load_sum(const float* p) { return _mm512_loadu_ps(p); }
  static void store_sum(float* p, Sum v) { _mm512_storeu_ps(p, v); }
  static Sum relu(Sum v) { return Zmm::relu(v); }
  static constexpr int input(int step) { return step; }
  static Operand load(const uint8_t* block, int step) {
    return _mm512_loadu_ps(reinterpret_cast<const float*>(block) + GROUP * step);
  }
  static Sum add(Sum sum, const float* x, Operand weight) { return _mm512_fmadd_ps(weight, _mm512_set1_ps(*x), sum); }
};

// A pair of inputs' weights is one 32-bit word, whose high half comes first.
#ifdef LT4REC_HAS_BF16
struct BlocksBf16 : BlocksF32 {
  using Activation = uint16_t;
  using Operand = __m512bh;
  static constexpr int kBytes = 128, kSteps = 2;
  static constexpr int input(int step) { return 2 * step; }
  static Operand load(const uint8_t* block, int step) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(block + 64 * step));
  }
  static Sum add(Sum sum, const uint16_t* x, Operand weight) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return _mm512_dpbf16_ps(sum, weight, reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)));
  }
};
#else
struct BlocksBf16 : BlocksF32 {
  static constexpr int kBytes = 128;
  static constexpr int input(int step) { return step ^ 1; }
  static Operand load(const uint8_t* block, int step) {
    const __m512i pairs = _mm512_loadu_si512(block + 64 * (step / 2));
    return step % 2 ? Zmm::low(pairs) : Zmm::high(pairs);
  }
};
#endif

struct BlocksS8 {
  using Activation = uint8_t;
  using Value = int32_t;
  using Sum = __m512i;
  using Operand = __m512i;
  static constexpr int kBytes = 64, kSteps = 1, kRows = 24, kSums = 24;
  static constexpr bool kHasRelu = false;
  static Sum load_sum(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_sum(int32_t* p, Sum v) { _mm512_storeu_si512(p, v); }
  static constexpr int input(int) { return 0; }
  static Operand load(const uint8_t* block, int) { return _mm512_loadu_si512(block); }
  static Sum add(Sum sum, const uint8_t* x, Operand weight) {
    int32_t quad;
    __builtin_memcpy(&quad, x, sizeof(quad));
    const __m512i codes = _mm512_set1_epi32(quad);
#ifdef LT4REC_HAS_VNNI
    return _mm512_dpbusd_epi32(sum, codes, weight);
#else  // pairs of products fit 16 bits, as engine.h has it
    const __m512i pairs = _mm512_maddubs_epi16(codes, weight);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
  }
};

#define LT4REC_OWN_ROUNDING
#include "blocks.h"
#include "elementwise.h"
#include "activations.h"
#include "slices.h"
#include "table.h"
#include "entries.h"
#include "transpose_avx.h"

// Sixteen rows by sixteen columns: whole lines of the cache on both sides. Full masks spare a false warning of GCC 12.
inline void transpose_16x16(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 row[16], pair[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_maskz_unpacklo_ps(0xffff, row[i], row[i + 1]);
    pair[i + 1] = _mm512_maskz_unpackhi_ps(0xffff, row[i], row[i + 1]);
  }
  // row[4 q + k]: rows 4 q to 4 q + 3 of columns k, 4 + k, 8 + k and 12 + k.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    row[i] = _mm512_maskz_shuffle_ps(0xffff, pair[i], pair[i + 2], 0x44);
    row[i + 1] = _mm512_maskz_shuffle_ps(0xffff, pair[i], pair[i + 2], 0xee);
    row[i + 2] = _mm512_maskz_shuffle_ps(0xffff, pair[i + 1], pair[i + 3], 0x44);
    row[i + 3] = _mm512_maskz_shuffle_ps(0xffff, pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m512 even_low = _mm512_maskz_shuffle_f32x4(0xffff, row[k], row[4 + k], 0x88);
    const __m512 even_high = _mm512_maskz_shuffle_f32x4(0xffff, row[8 + k], row[12 + k], 0x88);
    const __m512 odd_low = _mm512_maskz_shuffle_f32x4(0xffff, row[k], row[4 + k], 0xdd);
    const __m512 odd_high = _mm512_maskz_shuffle_f32x4(0xffff, row[8 + k], row[12 + k], 0xdd);
    _mm512_storeu_ps(to + k * to_stride, _mm512_maskz_shuffle_f32x4(0xffff, even_low, even_high, 0x88));
    _mm512_storeu_ps(to + (4 + k) * to_stride, _mm512_maskz_shuffle_f32x4(0xffff, odd_low, odd_high, 0x88));
    _mm512_storeu_ps(to + (8 + k) * to_stride, _mm512_maskz_shuffle_f32x4(0xffff, even_low, even_high, 0xdd));
    _mm512_storeu_ps(to + (12 + k) * to_stride, _mm512_maskz_shuffle_f32x4(0xffff, odd_low, odd_high, 0xdd));
  }
}

void transpose_by_16(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                     int64_t to_stride) {
  const int64_t whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
  for (int64_t c = 0; c < whole_columns; c += 16)
    for (int64_t r = 0; r < whole_rows; r += 16)
      transpose_16x16(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  transpose_f32(from + whole_columns, from_stride, rows, columns - whole_columns, to + whole_columns * to_stride,
                to_stride);
  transpose_f32(from + whole_rows * from_stride, from_stride, rows - whole_rows, whole_columns, to + whole_rows,
                to_stride);
}

// bits_of_rounded of sixteen values, at half the instructions that compilers make of it. The lower half stays.
inline __m512i rounded(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), even = _mm512_set1_epi32(1);
  const __m512i is_odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, bits, 16), even);
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), is_odd);
  const __mmask16 is_small = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  const __m512i normal = _mm512_mask_and_epi32(sum, is_small, bits, _mm512_set1_epi32(int(0x80000000)));
  return _mm512_mask_or_epi32(normal, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x00400000));
}

// Calls `store(first, lanes, rounded)` for sixteen values at a time.
template <class Store>
__attribute__((always_inline)) inline void round_all(const float* from, int64_t count, Store store) {
  for (int64_t first = 0; first < count; first += 16) {
    const int64_t left = count - first;
    const __mmask16 lanes = left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
    store(first, lanes, rounded(_mm512_maskz_loadu_ps(lanes, from + first)));
  }
}

void round_bf16(const float* from, int64_t count, uint16_t* to) {
  round_all(from, count, [to](int64_t first, __mmask16 lanes, __m512i bits) {
    _mm512_mask_cvtepi32_storeu_epi16(to + first, lanes, _mm512_maskz_srli_epi32(0xffff, bits, 16));
  });
}

void round_widened_bf16(const float* from, int64_t count, float* to) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
  round_all(from, count, [=](int64_t first, __mmask16 lanes, __m512i bits) {
    _mm512_mask_storeu_epi32(to + first, lanes, _mm512_and_si512(bits, upper));
  });
}

// Codes from values, not yet clamped. Above a million the conversion might overflow to the other end; a NaN passes the
// minimum, which returns its second operand then, and converts to the least integer there is.
inline __m512i codes_of(__m512 v, __m512 inverse_scale, __m512i zero_point) {
  const __m512 scaled = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(1e6f), _mm512_mul_ps(v, inverse_scale));
  return _mm512_add_epi32(_mm512_maskz_cvtps_epi32(0xffff, scaled), zero_point);
}

// Calls `codes(first, lanes)` for sixteen features at a time and returns the codes of sixty-four, clamped.
template <class Codes>
__attribute__((always_inline)) inline __m512i sixty_four(int64_t first, int64_t count, Codes codes) {
  // Packing works within 128 bits and leaves the sixteens interleaved by fours.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i sixteen[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int64_t left = count - first - 16 * i;
    sixteen[i] = codes(first + 16 * i, left >= 16 ? __mmask16(0xffff) : __mmask16(left > 0 ? (1u << left) - 1 : 0));
  }
  const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(sixteen[0], sixteen[1]),
                                             _mm512_packs_epi32(sixteen[2], sixteen[3]));
  return _mm512_maskz_permutexvar_epi32(0xffff, order, packed);
}

// Each half of sixty-four codes twice (see HALF_S8).
template <class Codes>
__attribute__((always_inline)) inline void write_line(int64_t count, uint8_t* line, Codes codes) {
  for (int64_t first = 0; first < count; first += WINDOW_S8) {
    const __m512i all = sixty_four(first, count, codes);
    uint8_t* to = line + 2 * first;
    _mm512_storeu_si512(to, all);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + WINDOW_S8), _mm512_maskz_extracti64x4_epi64(0xff, all, 1));
    const __m256i half = _mm512_maskz_extracti64x4_epi64(0xff, all, 0);
    if (first) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to - HALF_S8), half);
  }
}

// The same, each code once.
template <class Codes>
__attribute__((always_inline)) inline void write_codes(int64_t count, uint8_t* to, Codes codes) {
  int64_t first = 0;
  for (; first + 64 <= count; first += 64) _mm512_storeu_si512(to + first, sixty_four(first, first + 64, codes));
  for (; first < count; first += 16) {
    const int64_t left = count - first;
    const __mmask16 lanes = left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1);
    const __m512i above = _mm512_maskz_max_epi32(0xffff, codes(first, lanes), _mm512_setzero_si512());
    _mm_mask_storeu_epi8(to + first, lanes, _mm512_maskz_cvtusepi32_epi8(0xffff, above));
  }
}

// Two vectors by one comparison.
inline int is_nan_among(const float* values, int64_t count) {
  __mmask16 nans = 0;
  int64_t first = 0;
  for (; first + 32 <= count; first += 32)
    nans |= _mm512_cmp_ps_mask(_mm512_loadu_ps(values + first), _mm512_loadu_ps(values + first + 16), _CMP_UNORD_Q);
  return nans != 0 || has_nan(values + first, count - first);
}

inline auto quantizer(const float* from, float inverse_scale, int32_t zero_point) {
  return [=](int64_t first, __mmask16 lanes) {
    return codes_of(_mm512_maskz_loadu_ps(lanes, from + first), _mm512_set1_ps(inverse_scale),
                    _mm512_set1_epi32(zero_point));
  };
}

int line_u8(const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* line) {
  write_line(count, line, quantizer(from, inverse_scale, zero_point));
  return is_nan_among(from, count);
}

int codes_u8(const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* to) {
  write_codes(count, to, quantizer(from, inverse_scale, zero_point));
  return is_nan_among(from, count);
}

inline auto requantizer(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int has_relu,
                        float inverse_scale, int32_t zero_point) {
  const bool needs_relu = has_relu && zero_point != 0;  // what is below a zero point of 0 is clamped to it
  return [=](int64_t first, __mmask16 lanes) {
    __m512i sum = _mm512_maskz_loadu_epi32(lanes, a + first);
    if (b) sum = _mm512_add_epi32(sum, _mm512_maskz_loadu_epi32(lanes, b + first));
    const __m512 v = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, sum), _mm512_maskz_loadu_ps(lanes, scale + first),
                                     _mm512_maskz_loadu_ps(lanes, bias + first));
    return codes_of(needs_relu ? Zmm::relu(v) : v, _mm512_set1_ps(inverse_scale), _mm512_set1_epi32(zero_point));
  };
}

void requantize_s32(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                    int has_relu, float inverse_scale, int32_t zero_point, uint8_t* line) {
  write_line(count, line, requantizer(a, b, scale, bias, has_relu, inverse_scale, zero_point));
}

void recode_s32(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count, int has_relu,
                float inverse_scale, int32_t zero_point, uint8_t* to) {
  write_codes(count, to, requantizer(a, b, scale, bias, has_relu, inverse_scale, zero_point));
}

void slices_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  switch (lanes) {
    case 1: return add_slices_of_one<StepF32, Xmm>(blob, layer, x, y);
    case 8: return add_slices<SlicesF32, Ymm, 1, 4>(blob, layer, x, y);
    case 16: return add_slices<SlicesF32, Zmm, 1, 4>(blob, layer, x, y);
    case 32: return add_slices<SlicesF32, Zmm, 2, 4>(blob, layer, x, y);
    default: return add_slices<SlicesF32, Zmm, 4, 4>(blob, layer, x, y);
  }
}

#ifdef LT4REC_HAS_BF16
// Both weights of a step in one instruction. Interleaving two tile rows leaves the lanes of each pair of accumulators
// in the order lanes 0-3, 8-11, 16-19, 24-27 | 4-7, 12-15, 20-23, 28-31, which the last pass puts right.
struct PairsBf16 {
  using Step = StepBf16;
  using Activation = uint16_t;

  template <class Vector, int kVectors, int kStride>
  __attribute__((always_inline)) static void add(const Step& step, int r, const uint16_t* x_block, __m512* sum) {
    const auto* block = reinterpret_cast<const char*>(x_block);
    const char* second = block + step_offset(step.offsets[0], r) * (kStride / 32);
    const char* first = block + step_offset(step.offsets[1], r) * (kStride / 32);
    int32_t weights;
    __builtin_memcpy(&weights, step.weight[r], sizeof(weights));
    const auto weight = reinterpret_cast<__m512bh>(_mm512_set1_epi32(weights));
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2) {
      const __m512i a = _mm512_load_si512(second + 32 * v), b = _mm512_load_si512(first + 32 * v);
      sum[v] = _mm512_dpbf16_ps(sum[v], reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b)), weight);
      sum[v + 1] = _mm512_dpbf16_ps(sum[v + 1], reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b)), weight);
    }
  }
};

void restore_lanes(float* y, int64_t values) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (float* p = y; p < y + values; p += 32) {
    const __m512 a = _mm512_load_ps(p), b = _mm512_load_ps(p + 16);
    _mm512_store_ps(p, _mm512_permutex2var_ps(a, low, b));
    _mm512_store_ps(p + 16, _mm512_permutex2var_ps(a, high, b));
  }
}

void slices_bf16(const uint8_t* blob, const LayerRecord* layer, const uint16_t* x, float* y, int lanes) {
  if (lanes == 32)
    add_slices<PairsBf16, Zmm, 2, 4>(blob, layer, x, y);
  else
    add_slices<PairsBf16, Zmm, 4, 4>(blob, layer, x, y);
  restore_lanes(y, tile_rows(layer->out_features) * lanes);
}
constexpr decltype(Isa::slices_widened_bf16) slices_widened_bf16 = nullptr;
constexpr int kSlicesFromBf16 = 25;
#else
void slices_widened_bf16(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  switch (lanes) {
    case 1: return add_slices_of_one<StepBf16, Xmm>(blob, layer, x, y);
    case 8: return add_slices<SlicesWidenedBf16, Ymm, 1, 4>(blob, layer, x, y);
    case 16: return add_slices<SlicesWidenedBf16, Zmm, 1, 4>(blob, layer, x, y);
    case 32: return add_slices<SlicesWidenedBf16, Zmm, 2, 4>(blob, layer, x, y);
    default: return add_slices<SlicesWidenedBf16, Zmm, 4, 4>(blob, layer, x, y);
  }
}
constexpr decltype(Isa::slices_bf16) slices_bf16 = nullptr;
constexpr int kSlicesFromBf16 = 9;
#endif

#ifdef LT4REC_HAS_VNNI
constexpr int kSlicesFromS8 = NEVER;
void table_s8(const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int rows, int32_t* y,
              int64_t y_stride) {
  run_table<TableS8>(blob, layer, layer->start, x, x_stride, rows, y, y_stride);
}
#else
constexpr int kSlicesFromS8 = 6;  // as AVX2
constexpr auto table_s8 = lt4rec_table_s8_avx2;
#endif

}  // namespace

extern "C" const Isa LT4REC_ISA = {
    LT4REC_ISA_NAME,
    slices_f32,     slices_bf16,        slices_widened_bf16,
    table_f32,      table_bf16,         table_s8,
    blocks_f32,     native(blocks_bf16), widened(blocks_bf16), blocks_s8,
    transpose_by_16, widen_bf16,         round_bf16,          round_widened_bf16,
    add_f32,        add_s32,            line_f32,            line_bf16,
    dequantize_s32,
    line_u8,        requantize_s32,     codes_f32,           recode_f32,
    dequantize_f32, codes_u8,           recode_s32,          activate, leaky_relu, dice,
    widen_f16,      widen_s8,           cross,
    /*slices_from_f32=*/9, /*slices_from_bf16=*/kSlicesFromBf16, /*slices_from_s8=*/kSlicesFromS8,
    /*filled_from_many=*/0.75f, /*filled_from_some=*/0.48f, /*filled_from_few_cached=*/0.75f, /*filled_from_few=*/0.9f};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
