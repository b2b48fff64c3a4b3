// float32 and its upper half, bfloat16. Included as elementwise.h is.

inline uint32_t bits_of(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

// To nearest even. The addend carries into the exponent, and into infinity, as it should; a NaN must not get there.
inline uint16_t bf16_of(float v) {
  const uint32_t bits = bits_of(v), magnitude = bits & 0x7fffffff;
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const uint32_t zero = bits >> 16 & 0x8000, nan = bits >> 16 | 0x40;
  return uint16_t(magnitude > 0x7f800000 ? nan : magnitude < 0x00800000 ? zero : rounded);
}
