// Registers of eight and of four floats, which the x86 instruction sets share; included as slices.h is.

struct Ymm {
  using Type = __m256;
  static constexpr int kWidth = 8;
  static Type load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Type v) { _mm256_store_ps(p, v); }
  static Type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  // max returns its second operand where one is NaN: in this order NaN passes, as through torch.relu.
  static Type relu(Type v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  static __m256i broadcast_pair(const uint16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return _mm256_set1_epi32(pair);
  }
  static Type high(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
  }
  static Type low(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
};

// Four floats, for a single row of the batch.
struct Xmm {
  using Type = __m128;
  static Type load(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, Type v) { _mm_storeu_ps(p, v); }
  static Type fma(Type a, Type b, Type c) { return _mm_fmadd_ps(a, b, c); }
  static Type relu(Type v) { return _mm_max_ps(_mm_setzero_ps(), v); }
  static Type gather(const float* a, const float* b, const float* c, const float* d) {
    const __m128 low = _mm_insert_ps(_mm_load_ss(a), _mm_load_ss(b), 0x10);
    return _mm_insert_ps(_mm_insert_ps(low, _mm_load_ss(c), 0x20), _mm_load_ss(d), 0x30);
  }
  static __m128i load_pairs(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static Type high(__m128i v) { return _mm_castsi128_ps(_mm_and_si128(v, _mm_set1_epi32(int(0xffff0000)))); }
  static Type low(__m128i v) { return _mm_castsi128_ps(_mm_slli_epi32(v, 16)); }
};
