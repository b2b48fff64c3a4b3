// Quantised activations (codes), one by one. Included as elementwise.h is.

// A NaN fails the first comparison and becomes 0; infinities end at the ends.
inline uint8_t code_of(float v, float inverse_scale, float zero_point) {
  const float code = __builtin_rintf(v * inverse_scale) + zero_point;
  const float above = code > 0 ? code : 0;
  return uint8_t(int32_t(above < 255 ? above : 255));
}

inline int has_nan(const float* from, int64_t count) {
  int nans = 0;
  for (int64_t i = 0; i < count; ++i) nans |= from[i] != from[i];
  return nans;
}
