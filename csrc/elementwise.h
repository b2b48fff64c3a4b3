// What happens between layers, element by element: plain loops that the compiler vectorises for the ISA file that
// includes this, as it does slices.h. Fused multiply-adds are written out and nothing else is fused (the build says
// -ffp-contract=off), so every ISA rounds alike.

#include "bf16.h"

// As torch.relu: a NaN passes.
inline float relu(float v) { return 0.0f > v ? 0.0f : v; }

void widen_bf16(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_of(uint32_t{from[i]} << 16);
}

#ifndef LT4REC_OWN_ROUNDING  // by instructions that compilers do not choose
void round_bf16(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = bf16_of(from[i]);
}

void round_widened_bf16(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float_of(bits_of_rounded(from[i]));
}
#endif

// The four cases are four loops: a test inside would keep the compiler from vectorising.
template <class Store>
inline void add(const float* a, const float* b, const float* bias, int64_t count, bool has_relu, Store store) {
  if (b && bias) {
    for (int64_t i = 0; i < count; ++i) store(i, has_relu ? relu(a[i] + b[i] + bias[i]) : a[i] + b[i] + bias[i]);
  } else if (b) {
    for (int64_t i = 0; i < count; ++i) store(i, has_relu ? relu(a[i] + b[i]) : a[i] + b[i]);
  } else if (bias) {
    for (int64_t i = 0; i < count; ++i) store(i, has_relu ? relu(a[i] + bias[i]) : a[i] + bias[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) store(i, has_relu ? relu(a[i]) : a[i]);
  }
}

void add_f32(const float* a, const float* b, const float* bias, int64_t count, int has_relu, float* to) {
  add(a, b, bias, count, has_relu, [to](int64_t i, float v) { to[i] = v; });
}

void add_s32(const int32_t* a, const int32_t* b, int64_t count, int32_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = a[i] + b[i];
}

// The features between two gaps at a time, each time with the zero in front of them; and the zero after the last.
template <int64_t kGap, class T, class Convert>
inline void add_line(const float* a, const float* b, const float* bias, int64_t count, bool has_relu, T* line,
                     Convert convert) {
  const auto part = [=](int64_t first, int64_t size) {
    T* to = line + line_position(first, kGap);
    to[-1] = 0;
    add(a + first, b ? b + first : nullptr, bias ? bias + first : nullptr, size, has_relu,
        [=](int64_t i, float v) { to[i] = convert(v); });
  };
  int64_t first = 0;
  for (; first + kGap <= count; first += kGap) part(first, kGap);
  if (first < count) part(first, count - first), first += kGap;
  line[line_position(first, kGap) - 1] = 0;
}

void line_f32(const float* a, const float* b, const float* bias, int64_t count, int has_relu, float* line) {
  add_line<GAP_F32>(a, b, bias, count, has_relu, line, [](float v) { return v; });
}

void line_bf16(const float* a, const float* b, const float* bias, int64_t count, int has_relu, uint16_t* line) {
  add_line<GAP_BF16>(a, b, bias, count, has_relu, line, [](float v) { return bf16_of(v); });
}

// A NaN fails the first comparison and becomes 0; infinities end at the ends.
inline float float_code_of(float v, float inverse_scale, float zero_point) {
  const float code = __builtin_rintf(v * inverse_scale) + zero_point;
  const float above = code > 0 ? code : 0;
  return above < 255 ? above : 255;
}

inline int has_nan(const float* from, int64_t count) {
  int nans = 0;
  for (int64_t i = 0; i < count; ++i) nans |= from[i] != from[i];
  return nans;
}

int codes_f32(const float* from, int64_t count, float inverse_scale, int32_t zero_point, float* codes) {
  const int nans = has_nan(from, count);
  for (int64_t i = 0; i < count; ++i) codes[i] = float_code_of(from[i], inverse_scale, float(zero_point));
  return nans;
}

void dequantize_f32(const float* sums, int64_t count, float scale, const float* bias, int has_relu, float* to) {
  if (has_relu) {
    for (int64_t i = 0; i < count; ++i) to[i] = relu(__builtin_fmaf(sums[i], scale, bias[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = __builtin_fmaf(sums[i], scale, bias[i]);
  }
}

void recode_f32(const float* sums, int64_t count, float scale, const float* bias, int has_relu, float inverse_scale,
                int32_t zero_point, float* codes) {
  dequantize_f32(sums, count, scale, bias, has_relu, codes);
  for (int64_t i = 0; i < count; ++i) codes[i] = float_code_of(codes[i], inverse_scale, float(zero_point));
}

void dequantize_s32(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                    float* to) {
  if (b) {
    for (int64_t i = 0; i < count; ++i) to[i] = __builtin_fmaf(float(a[i] + b[i]), scale[i], bias[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = __builtin_fmaf(float(a[i]), scale[i], bias[i]);
  }
}

// By shifts alone, which every ISA has: a half's exponent counts from 15, a float's from 127. What is denormal among
// halves is normal among floats; a product with 2^112 makes it so.
void widen_f16(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t half = from[i], magnitude = half & 0x7fff;
    const float scaled = float_of(magnitude << 13) * 0x1p112f;
    const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000 | magnitude << 13 : bits_of(scaled);
    to[i] = float_of(special | (half & 0x8000) << 16);
  }
}

void widen_s8(const int8_t* from, int64_t count, float scale, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = float(from[i]) * scale;
}

// The pragmas keep the sums in registers, and compilers from unrolling what they then no longer vectorise.
template <int kGroups>
inline void cross_groups(const float* vector, const float* transposed, int64_t stride, int64_t dim, float* dots) {
  float sums[kGroups][GROUP] = {};
#pragma GCC unroll 1
  for (int64_t d = 0; d < dim; ++d) {
    const float factor = vector[d];
    const float* row = transposed + d * stride;
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
#pragma omp simd
      for (int j = 0; j < GROUP; ++j) sums[g][j] = __builtin_fmaf(factor, row[g * GROUP + j], sums[g][j]);
    }
  }
  for (int g = 0; g < kGroups; ++g)
    for (int j = 0; j < GROUP; ++j) dots[g * GROUP + j] = sums[g][j];
}

void cross(const float* vectors, int64_t rows, const float* transposed, int64_t stride, int64_t dim, int64_t width,
           float* dots, int64_t dots_stride) {
  constexpr int kAtOnce = 3;
  for (int64_t i = 0; i < rows; ++i) {
    const float* vector = vectors + i * dim;
    float* to = dots + i * dots_stride;
    int64_t first = 0;
    for (; first + kAtOnce * GROUP <= width; first += kAtOnce * GROUP)
      cross_groups<kAtOnce>(vector, transposed + first, stride, dim, to + first);
    for (; first < width; first += GROUP) cross_groups<1>(vector, transposed + first, stride, dim, to + first);
  }
}
