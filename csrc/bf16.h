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

// v rounded to bfloat16: to nearest even. The addend carries into the exponent, and into infinity, as it should; a NaN
// must not get there. Signed comparisons: AVX2 has no others.
inline uint32_t bits_of_rounded(float v) {
  const uint32_t bits = bits_of(v), rounded = bits + 0x7fff + (bits >> 16 & 1);
  const auto magnitude = int32_t(bits & 0x7fffffff);
  const uint32_t nan = bits | 0x00400000, zero = bits & 0x80000000;
  return (magnitude > 0x7f800000 ? nan : magnitude < 0x00800000 ? zero : rounded) & 0xffff0000;
}
inline uint16_t bf16_of(float v) { return uint16_t(bits_of_rounded(v) >> 16); }
