// The hashes behind hashed tables. Neither may ever change: the ids of served models depend on them.
#ifndef LT4REC_SPARSE_HASHES_H
#define LT4REC_SPARSE_HASHES_H

#include <cstdint>
#include <cstring>

namespace lt4rec {

// splitmix64 (Steele, Lea and Flood, 2014).
inline uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// The first 8 bytes, little-endian, of BLAKE2b with a digest of 8 bytes and no key (RFC 7693).
inline uint64_t blake2b8(const char* text, size_t size) {
  constexpr uint64_t kStart[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                                  0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
  constexpr uint8_t kOrder[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                      {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                      {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                      {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                      {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                      {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                      {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                      {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                      {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                      {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
  constexpr size_t kBlock = 128;
  uint64_t h[8];
  std::memcpy(h, kStart, sizeof(h));
  h[0] ^= 0x01010000 ^ 8;
  for (size_t at = 0;;) {
    const size_t taken = size - at < kBlock ? size - at : kBlock;
    uint64_t m[16] = {}, v[16];
    if (taken) std::memcpy(m, text + at, taken);
    at += taken;
    std::memcpy(v, h, sizeof(h));
    std::memcpy(v + 8, kStart, sizeof(kStart));
    v[12] ^= at;
    if (at == size) v[14] = ~v[14];
    const auto turned = [](uint64_t x, int by) { return x >> by | x << (64 - by); };
    const auto mix = [&](int a, int b, int c, int d, uint64_t x, uint64_t y) {
      v[a] += v[b] + x;
      v[d] = turned(v[d] ^ v[a], 32);
      v[c] += v[d];
      v[b] = turned(v[b] ^ v[c], 24);
      v[a] += v[b] + y;
      v[d] = turned(v[d] ^ v[a], 16);
      v[c] += v[d];
      v[b] = turned(v[b] ^ v[c], 63);
    };
    for (int round = 0; round < 12; ++round) {
      const uint8_t* order = kOrder[round % 10];
      for (int i = 0; i < 4; ++i) mix(i, i + 4, i + 8, i + 12, m[order[2 * i]], m[order[2 * i + 1]]);
      for (int i = 0; i < 4; ++i)
        mix(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12, m[order[2 * i + 8]], m[order[2 * i + 9]]);
    }
    for (int i = 0; i < 8; ++i) h[i] ^= v[i] ^ v[i + 8];
    if (at == size) return h[0];
  }
}

}  // namespace lt4rec
#endif
