// Activations but ReLU, in place: plain loops, included by the ISA files after elementwise.h and as it is, so that every
// ISA computes the same bits. Polynomials were fitted for the least largest error over their range.

// v held within a range; NaN stays.
inline float within(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

// exp(v) as 2^n (1 + r + r^2 q(r)), |r| at most log(2) / 2: the error is below 2^-23 of the result. At the ends of the
// range it is practically 0 or infinite.
struct Exponential {
  float power, rest, tail;  // 2^n, r, r^2 q(r)
};
inline Exponential exponential(float v) {
  const float inside = within(v, -80, 88);  // products of the least one are no denormals, which are slow
  // Above 2^23 a float is a whole number, which stands in its low bits.
  const float shifted = __builtin_fmaf(inside, 0x1.715476p+0f, 0x1.8p+23f), n = shifted - 0x1.8p+23f;
  const float r = __builtin_fmaf(n, -0x1.7f7d1cp-20f, __builtin_fmaf(n, -0x1.62e4p-1f, inside));
  float q = 0x1.a17e36p-13f;
  q = __builtin_fmaf(q, r, 0x1.6d4352p-10f);
  q = __builtin_fmaf(q, r, 0x1.1110acp-7f);
  q = __builtin_fmaf(q, r, 0x1.5554e8p-5f);
  q = __builtin_fmaf(q, r, 0x1.555556p-3f);
  q = __builtin_fmaf(q, r, 0x1p-1f);
  return {float_of((bits_of(shifted) << 23) + (127u << 23)), r, r * r * q};
}
inline float exp_of(float v) {
  const Exponential e = exponential(v);
  return e.power * (1 + (e.rest + e.tail));
}
inline float expm1_of(float v) {
  const Exponential e = exponential(v);
  return __builtin_fmaf(e.power, e.rest + e.tail, e.power - 1);
}

inline float with_sign_of(float magnitude, float v) {
  return float_of((bits_of(magnitude) & 0x7fffffff) | (bits_of(v) & 0x80000000));
}
inline float magnitude_of(float v) { return float_of(bits_of(v) & 0x7fffffff); }

inline float tanh_of(float v) {
  const float twice = expm1_of(2 * magnitude_of(v));
  return with_sign_of(twice / (twice + 2), v);
}

inline float sigmoid_of(float v) { return 1 / (1 + exp_of(-v)); }
inline float silu_of(float v) { return v / (1 + exp_of(-v)); }

// erfc(a) = t exp(p(t) - a^2) with t = 1 / (1 + a / 2) for a from 0 to 10; practically 0 above.
inline float erfc_of(float a) {
  const float t = 1 / __builtin_fmaf(a, 0.5f, 1);
  float p = 0x1.233708p-3f;
  p = __builtin_fmaf(p, t, -0x1.55069cp-1f);
  p = __builtin_fmaf(p, t, 0x1.1f562p+0f);
  p = __builtin_fmaf(p, t, -0x1.4d71ap-1f);
  p = __builtin_fmaf(p, t, -0x1.de54eep-4f);
  p = __builtin_fmaf(p, t, 0x1.4ad45p-6f);
  p = __builtin_fmaf(p, t, 0x1.d09f7ep-6f);
  p = __builtin_fmaf(p, t, 0x1.8d3586p-2f);
  p = __builtin_fmaf(p, t, 0x1.ff3a6ap-1f);
  p = __builtin_fmaf(p, t, -0x1.43f3f8p+0f);
  return t * exp_of(__builtin_fmaf(-a, a, p));
}

inline float gelu_of(float v) {
  const float beyond = 0.5f * erfc_of(magnitude_of(v) * 0x1.6a09e6p-1f);  // over the root of 2
  return v * (0.5f + with_sign_of(0.5f - beyond, v));  // a choice of two would not be vectorised
}

inline float gelu_tanh_of(float v) {
  const float cubed = __builtin_fmaf(v * v, 0.044715f * v, v);
  return 0.5f * v * (1 + tanh_of(0x1.988454p-1f * cubed));  // times the root of 2 / pi
}

inline float hardswish_of(float v) { return v * within(v + 3, 0, 6) / 6; }

// The function is part of the type: through a pointer it would be called for each value.
template <class Function>
inline void map(float* values, int64_t count, Function function) {
  for (int64_t i = 0; i < count; ++i) values[i] = function(values[i]);
}

// v above 0, else another value. By bits: a choice of two is a branch on AVX2, whose sign is hard to predict.
inline float above_or(float v, float other) {
  const uint32_t above = 0u - uint32_t(v > 0);
  return float_of((bits_of(v) & above) | (bits_of(other) & ~above));
}

inline float leaky_relu_of(float v, float slope) { return above_or(v, v * slope); }

void leaky_relu(const float* slopes, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = leaky_relu_of(values[i], slopes[i]);
}

inline float dice_of(float v, float scale, float shift, float alpha) {
  return v * __builtin_fmaf(1 - alpha, sigmoid_of(__builtin_fmaf(v, scale, shift)), alpha);
}

void dice(const float* constants, int64_t stride, int is_one, float* values, int64_t count) {
  const float *scale = constants, *shift = scale + stride, *alpha = shift + stride;
  if (is_one)
    return map(values, count, [a = *scale, b = *shift, c = *alpha](float v) { return dice_of(v, a, b, c); });
  for (int64_t i = 0; i < count; ++i) values[i] = dice_of(values[i], scale[i], shift[i], alpha[i]);
}

void activate(uint32_t activation, float slope, float* values, int64_t count) {
  switch (activation) {
    case ACTIVATION_SIGMOID: return map(values, count, [](float v) { return sigmoid_of(v); });
    case ACTIVATION_TANH: return map(values, count, [](float v) { return tanh_of(v); });
    case ACTIVATION_SILU: return map(values, count, [](float v) { return silu_of(v); });
    case ACTIVATION_GELU: return map(values, count, [](float v) { return gelu_of(v); });
    case ACTIVATION_GELU_TANH: return map(values, count, [](float v) { return gelu_tanh_of(v); });
    case ACTIVATION_HARDSWISH: return map(values, count, [](float v) { return hardswish_of(v); });
    case ACTIVATION_LEAKY_RELU: return map(values, count, [slope](float v) { return leaky_relu_of(v, slope); });
    case ACTIVATION_ELU: return map(values, count, [slope](float v) { return above_or(v, slope * expm1_of(v)); });
    default: return;
  }
}
