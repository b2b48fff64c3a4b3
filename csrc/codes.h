// Quantised activations (codes), one by one. Included as elementwise.h is.

inline uint8_t code_of(float v, float inverse_scale, float zero_point) {
  return uint8_t(int32_t(float_code_of(v, inverse_scale, zero_point)));
}

