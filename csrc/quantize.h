// Lines and rows of codes, for the ISAs that leave it to the compiler; included as elementwise.h is, and after it.

#include "codes.h"

// Every HALF_S8 codes appear twice: at the start of a window and at the end of the one before.
template <class Code>
inline void write_line(int64_t count, uint8_t* line, Code code) {
  for (int64_t first = 0; first < count; first += HALF_S8) {
    const int64_t left = count - first, size = left < HALF_S8 ? left : int64_t{HALF_S8};
    uint8_t* to = line + 2 * first;
    for (int64_t i = 0; i < size; ++i) to[i] = code(first + i);
    if (first) __builtin_memcpy(to - HALF_S8, to, HALF_S8);
  }
}

int line_u8(const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* line) {
  write_line(count, line, [=](int64_t i) { return code_of(from[i], inverse_scale, float(zero_point)); });
  return has_nan(from, count);
}

int codes_u8(const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = code_of(from[i], inverse_scale, float(zero_point));
  return has_nan(from, count);
}

// Two loops in one: a test of `b` inside would keep the compiler from vectorising.
template <class Write>
inline void recode(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int has_relu,
                   float inverse_scale, int32_t zero_point, Write write) {
  const auto code = [=](int32_t sum, int64_t i) {
    const float v = __builtin_fmaf(float(sum), scale[i], bias[i]);
    return code_of(has_relu ? relu(v) : v, inverse_scale, float(zero_point));
  };
  if (b)
    write([=](int64_t i) { return code(a[i] + b[i], i); });
  else
    write([=](int64_t i) { return code(a[i], i); });
}

void requantize_s32(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                    int has_relu, float inverse_scale, int32_t zero_point, uint8_t* line) {
  recode(a, b, scale, bias, has_relu, inverse_scale, zero_point, [=](auto code) { write_line(count, line, code); });
}

void recode_s32(const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count, int has_relu,
                float inverse_scale, int32_t zero_point, uint8_t* codes) {
  recode(a, b, scale, bias, has_relu, inverse_scale, zero_point, [=](auto code) {
    for (int64_t i = 0; i < count; ++i) codes[i] = code(i);
  });
}
