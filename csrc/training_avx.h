// The last steps of a sum of sixteen, which the x86 vector ISAs share; included as vectors_avx.h is.

inline __m128 halved(__m256 eight) {
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

inline float sum_of_four(__m128 four) {
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Adds four such sums to the four floats at `to`.
inline void add_sums_of_four(__m128 a, __m128 b, __m128 c, __m128 d, float* to) {
  _MM_TRANSPOSE4_PS(a, b, c, d);
  const __m128 all = _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), all));
}
