// The transposition that the x86 vector ISAs share; included as layer_f32.h is.

// Eight rows by eight columns. The halves of two rows meet in the load (vinsertf128 from memory), which spares a
// third of the shuffles, of which Intel has one port for 512 and two for 256 bits.
inline void transpose_8x8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 row[8], pair[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float *low = from + i * from_stride, *high = from + (i + 4) * from_stride;
    row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
    row[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44));
    _mm256_storeu_ps(to + (i + 1) * to_stride, _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee));
    _mm256_storeu_ps(to + (i + 2) * to_stride, _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44));
    _mm256_storeu_ps(to + (i + 3) * to_stride, _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee));
  }
}

void transpose_f32(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                   int64_t to_stride) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t c = 0; c < whole_columns; c += 8)
    for (int64_t r = 0; r < whole_rows; r += 8)
      transpose_8x8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r)
      to[c * to_stride + r] = from[r * from_stride + c];
}
