// The instructions of AVX-512 and AVX-VNNI that the engine uses, one lane after the other: for machines that lack them.
// Found in front of the compiler's header, which it includes: its types stay, its AVX2 instructions too.
#pragma once
#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

template <class T, int kLanes>
struct Lanes {
  T lane[kLanes];
};

// A vector as lanes of T, and back.
template <class T, class Vector>
Lanes<T, int(sizeof(Vector) / sizeof(T))> lanes_of(const Vector& v) {
  Lanes<T, int(sizeof(Vector) / sizeof(T))> lanes;
  std::memcpy(&lanes, &v, sizeof(v));
  return lanes;
}
template <class Vector, class T, int kLanes>
Vector vector_of(const Lanes<T, kLanes>& lanes) {
  static_assert(sizeof(Vector) == sizeof(lanes), "as many bytes");
  Vector v;
  std::memcpy(&v, &lanes, sizeof(v));
  return v;
}

// Vector of To with lane i = function(i).
template <class Vector, class To, class Function>
Vector make(Function function) {
  Lanes<To, int(sizeof(Vector) / sizeof(To))> lanes;
  for (int i = 0; i < int(sizeof(Vector) / sizeof(To)); ++i) lanes.lane[i] = To(function(i));
  return vector_of<Vector>(lanes);
}
template <class Vector>
Vector load(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
// Without the lanes that the mask leaves out, whose memory may not be there.
template <class Vector, class T>
Vector load_some(uint64_t mask, const void* p) {
  return make<Vector, T>([=](int i) {
    T v{};
    if (mask >> i & 1) std::memcpy(&v, static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
    return v;
  });
}
inline int64_t clamped(int64_t v, int64_t least, int64_t most) { return v < least ? least : v > most ? most : v; }

inline __m512 fma(__m512 a, __m512 b, __m512 c) {
  const auto x = lanes_of<float>(a), y = lanes_of<float>(b), z = lanes_of<float>(c);
  return make<__m512, float>([&](int i) { return std::fma(x.lane[i], y.lane[i], z.lane[i]); });
}

template <class Vector>
Vector dot_bytes(Vector sum, Vector bytes, Vector weights) {
  const auto s = lanes_of<int32_t>(sum);
  const auto u = lanes_of<uint8_t>(bytes);
  const auto w = lanes_of<int8_t>(weights);
  return make<Vector, int32_t>([&](int i) {
    int32_t total = s.lane[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) total += u.lane[j] * w.lane[j];
    return total;
  });
}

// The high halves' product first. The instruction takes denormals for zeros; here the caller has told the processor so.
inline __m512 dot_bf16(__m512 sum, __m512bh a, __m512bh b) {
  const auto s = lanes_of<float>(sum);
  const auto x = lanes_of<uint32_t>(a), y = lanes_of<uint32_t>(b);
  const auto upper = [](uint32_t bits) {
    bits &= 0xffff0000;
    float v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  };
  return make<__m512, float>([&](int i) {
    const float first = std::fma(upper(x.lane[i]), upper(y.lane[i]), s.lane[i]);
    return std::fma(upper(x.lane[i] << 16), upper(y.lane[i] << 16), first);
  });
}

template <class T, class Index>
__m512i permute_two(__m512i a, Index index, __m512i b) {
  const auto x = lanes_of<T>(a), y = lanes_of<T>(b), at = lanes_of<T>(index);
  constexpr int kLanes = 64 / sizeof(T);
  return make<__m512i, T>([&](int i) {
    const int place = at.lane[i] & (2 * kLanes - 1);
    return place < kLanes ? x.lane[place] : y.lane[place - kLanes];
  });
}

// Interleaves the low or high halves of each 128 bits.
inline __m512i unpack16(__m512i a, __m512i b, int half) {
  const auto x = lanes_of<uint16_t>(a), y = lanes_of<uint16_t>(b);
  return make<__m512i, uint16_t>([&](int i) {
    const int from = i / 8 * 8 + 4 * half + i % 8 / 2;
    return i % 2 ? y.lane[from] : x.lane[from];
  });
}

// Within each 128 bits: lanes of `a` and `b` in turn, the lower two of each, or the upper two.
inline __m512 unpack(__m512 a, __m512 b, int half) {
  const auto x = lanes_of<float>(a), y = lanes_of<float>(b);
  return make<__m512, float>([&](int i) {
    const int from = i / 4 * 4 + 2 * half + i % 4 / 2;
    return i % 2 ? y.lane[from] : x.lane[from];
  });
}

// Within each 128 bits: two of `a`, then two of `b`, each at the place that two bits of `places` say.
inline __m512 shuffle(__m512 a, __m512 b, int places) {
  const auto x = lanes_of<float>(a), y = lanes_of<float>(b);
  return make<__m512, float>([&](int i) {
    const int from = i / 4 * 4 + (places >> 2 * (i % 4) & 3);
    return i % 4 < 2 ? x.lane[from] : y.lane[from];
  });
}

// The same of parts of 128 bits.
inline __m512 shuffle_parts(__m512 a, __m512 b, int places) {
  const auto x = lanes_of<float>(a), y = lanes_of<float>(b);
  return make<__m512, float>([&](int i) {
    const int part = i / 4, from = (places >> 2 * part & 3) * 4 + i % 4;
    return part < 2 ? x.lane[from] : y.lane[from];
  });
}

// Saturates: within each 128 bits first those of `a`, then those of `b`.
template <class From, class To>
__m512i pack(__m512i a, __m512i b, int64_t least, int64_t most) {
  const auto x = lanes_of<From>(a), y = lanes_of<From>(b);
  constexpr int kPart = 16 / sizeof(To), kHalf = kPart / 2;
  return make<__m512i, To>([&](int i) {
    const int from = i / kPart * kHalf + i % kHalf;
    return clamped(i % kPart < kHalf ? x.lane[from] : y.lane[from], least, most);
  });
}

// To nearest even; out of range, the least integer.
inline int32_t rounded(float v) {
  const float r = std::nearbyint(v);
  return r >= -0x1p31f && r < 0x1p31f ? int32_t(r) : INT32_MIN;
}

}  // namespace emulated

#define LT4REC_LANES(T, v) ::emulated::lanes_of<T>(v).lane
#define LT4REC_EACH(Vector, To, expression) ::emulated::make<Vector, To>([&](int i) { return expression; })

// All masks but those of loads, stores and comparisons are full in the engine.
#define _mm512_loadu_si512(p) ::emulated::load<__m512i>(p)
#define _mm512_load_si512(p) ::emulated::load<__m512i>(p)
#define _mm512_loadu_ps(p) ::emulated::load<__m512>(p)
#define _mm512_load_ps(p) ::emulated::load<__m512>(p)
#define _mm512_storeu_si512(p, v) (void)(lt4rec_store(p, v))
#define _mm512_storeu_ps(p, v) (void)(lt4rec_store(p, v))
#define _mm512_store_ps(p, v) (void)(lt4rec_store(p, v))
template <class Vector>
inline void* lt4rec_store(void* p, const Vector& v) {
  return std::memcpy(p, &v, sizeof(v));
}

#define _mm512_maskz_loadu_ps(mask, p) ::emulated::load_some<__m512, float>(mask, p)
#define _mm512_maskz_loadu_epi32(mask, p) ::emulated::load_some<__m512i, int32_t>(mask, p)
#define _mm_mask_storeu_epi8(p, mask, v) lt4rec_store_some<uint8_t>(p, mask, ::emulated::lanes_of<uint8_t>(v))
#define _mm512_mask_storeu_epi32(p, mask, v) lt4rec_store_some<uint32_t>(p, mask, ::emulated::lanes_of<uint32_t>(v))
#define _mm512_mask_cvtepi32_storeu_epi16(p, mask, v) \
  lt4rec_store_some<uint16_t>(p, mask, ::emulated::lanes_of<uint32_t>(v))
template <class T, class Lanes>
inline void lt4rec_store_some(void* p, __mmask16 mask, const Lanes& lanes) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) static_cast<T*>(p)[i] = T(lanes.lane[i]);
}

#define _mm512_set1_ps(v) lt4rec_set<__m512, float>(v)
#define _mm512_set1_epi32(v) lt4rec_set<__m512i, int32_t>(v)
#define _mm512_set1_epi16(v) lt4rec_set<__m512i, int16_t>(v)
#define _mm512_setzero_ps() lt4rec_set<__m512, float>(0)
#define _mm512_setzero_si512() lt4rec_set<__m512i, int32_t>(0)
template <class Vector, class T>
inline Vector lt4rec_set(T v) {
  return LT4REC_EACH(Vector, T, (void(i), v));
}
#undef _mm512_setr_epi32
#define _mm512_setr_epi32(...) ::emulated::vector_of<__m512i>(::emulated::Lanes<int32_t, 16>{{__VA_ARGS__}})

#define _mm512_castsi512_ps(v) ::emulated::load<__m512>(&(const __m512i&)(v))
#define _mm512_castps_si512(v) ::emulated::load<__m512i>(&(const __m512&)(v))

#define _mm512_fmadd_ps(a, b, c) ::emulated::fma(a, b, c)
#define _mm512_dpbf16_ps(sum, a, b) ::emulated::dot_bf16(sum, a, b)
#define _mm512_dpbusd_epi32(sum, bytes, weights) ::emulated::dot_bytes<__m512i>(sum, bytes, weights)
#define _mm256_dpbusd_avx_epi32(sum, bytes, weights) ::emulated::dot_bytes<__m256i>(sum, bytes, weights)
#define _mm512_permutex2var_ps(a, index, b) \
  ::emulated::load<__m512>(&(const __m512i&)::emulated::permute_two<uint32_t>(lt4rec_words(a), index, lt4rec_words(b)))
#define _mm512_permutex2var_epi16(a, index, b) ::emulated::permute_two<uint16_t>(a, index, b)
inline __m512i lt4rec_words(__m512 v) { return ::emulated::load<__m512i>(&v); }
#define _mm512_maskz_permutexvar_epi8(mask, index, v) ::emulated::permute_two<uint8_t>(v, lt4rec_within(index), v)
#define _mm512_maskz_permutexvar_epi32(mask, index, v) ::emulated::permute_two<uint32_t>(v, index, v)
inline __m512i lt4rec_within(__m512i index) { return LT4REC_EACH(__m512i, uint8_t, LT4REC_LANES(uint8_t, index)[i] & 63); }
#define _mm512_unpacklo_epi16(a, b) ::emulated::unpack16(a, b, 0)
#define _mm512_unpackhi_epi16(a, b) ::emulated::unpack16(a, b, 1)
#define _mm512_maskz_unpacklo_ps(mask, a, b) ::emulated::unpack(a, b, 0)
#define _mm512_maskz_unpackhi_ps(mask, a, b) ::emulated::unpack(a, b, 1)
#undef _mm512_maskz_shuffle_ps
#define _mm512_maskz_shuffle_ps(mask, a, b, places) ::emulated::shuffle(a, b, places)
#undef _mm512_maskz_shuffle_f32x4
#define _mm512_maskz_shuffle_f32x4(mask, a, b, places) ::emulated::shuffle_parts(a, b, places)
#define _mm512_packs_epi32(a, b) (::emulated::pack<int32_t, int16_t>(a, b, -32768, 32767))
#define _mm512_packus_epi16(a, b) (::emulated::pack<int16_t, uint8_t>(a, b, 0, 255))

// The rest, lane by lane: as functions, so that each argument is evaluated once.
namespace emulated {
inline __m512 mul(__m512 a, __m512 b) {
  return LT4REC_EACH(__m512, float, LT4REC_LANES(float, a)[i] * LT4REC_LANES(float, b)[i]);
}
// The second operand where one is NaN, or both are zeros.
inline __m512 max(__m512 a, __m512 b) {
  const auto x = lanes_of<float>(a), y = lanes_of<float>(b);
  return LT4REC_EACH(__m512, float, (x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i]));
}
inline __m512 min(__m512 a, __m512 b) {
  const auto x = lanes_of<float>(a), y = lanes_of<float>(b);
  return LT4REC_EACH(__m512, float, (x.lane[i] < y.lane[i] ? x.lane[i] : y.lane[i]));
}
inline __m512i max_words(__m512i a, __m512i b) {
  const auto x = lanes_of<int32_t>(a), y = lanes_of<int32_t>(b);
  return LT4REC_EACH(__m512i, int32_t, (x.lane[i] > y.lane[i] ? x.lane[i] : y.lane[i]));
}
inline __m512i add(__m512i a, __m512i b) {
  const auto x = lanes_of<uint32_t>(a), y = lanes_of<uint32_t>(b);
  return LT4REC_EACH(__m512i, uint32_t, x.lane[i] + y.lane[i]);
}
inline __m512i bits_and(__m512i a, __m512i b) {
  const auto x = lanes_of<uint32_t>(a), y = lanes_of<uint32_t>(b);
  return LT4REC_EACH(__m512i, uint32_t, x.lane[i] & y.lane[i]);
}
inline __m512i select(__mmask16 mask, __m512i a, __m512i b) {
  const auto x = lanes_of<uint32_t>(a), y = lanes_of<uint32_t>(b);
  return LT4REC_EACH(__m512i, uint32_t, (mask >> i & 1 ? x.lane[i] : y.lane[i]));
}
inline __m512i bits_or(__m512i a, __m512i b) {
  const auto x = lanes_of<uint32_t>(a), y = lanes_of<uint32_t>(b);
  return LT4REC_EACH(__m512i, uint32_t, x.lane[i] | y.lane[i]);
}
inline __mmask16 zeros(__m512i v) {
  const auto x = lanes_of<uint32_t>(v);
  int mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (x.lane[i] == 0) << i;
  return __mmask16(mask);
}
inline __m512i shift_left(__m512i a, int count) {
  const auto x = lanes_of<uint32_t>(a);
  return LT4REC_EACH(__m512i, uint32_t, x.lane[i] << count);
}
inline __m512i shift_right(__m512i a, int count) {
  const auto x = lanes_of<uint32_t>(a);
  return LT4REC_EACH(__m512i, uint32_t, x.lane[i] >> count);
}
inline __m512i multiply_bytes(__m512i bytes, __m512i weights) {
  const auto u = lanes_of<uint8_t>(bytes);
  const auto w = lanes_of<int8_t>(weights);
  return make<__m512i, int16_t>([&](int i) {
    return clamped(u.lane[2 * i] * w.lane[2 * i] + u.lane[2 * i + 1] * w.lane[2 * i + 1], -32768, 32767);
  });
}
inline __m512i multiply_halves(__m512i a, __m512i b) {
  const auto x = lanes_of<int16_t>(a), y = lanes_of<int16_t>(b);
  return make<__m512i, int32_t>(
      [&](int i) { return x.lane[2 * i] * y.lane[2 * i] + x.lane[2 * i + 1] * y.lane[2 * i + 1]; });
}
template <class From, class To, class Vector, class Source>
Vector widened(const Source& v) {
  const auto x = lanes_of<From>(v);
  return make<Vector, To>([&](int i) { return x.lane[i]; });
}
inline __m512i to_words(__m512 v) {
  const auto x = lanes_of<float>(v);
  return make<__m512i, int32_t>([&](int i) { return rounded(x.lane[i]); });
}
inline __m128i to_bytes(__m512i v) {
  const auto x = lanes_of<uint32_t>(v);
  return make<__m128i, uint8_t>([&](int i) { return x.lane[i] < 255 ? x.lane[i] : 255; });
}
inline __mmask16 nans(__m512 a, __m512 b) {
  const auto x = lanes_of<float>(a), y = lanes_of<float>(b);
  int mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (std::isnan(x.lane[i]) || std::isnan(y.lane[i])) << i;
  return __mmask16(mask);
}
inline __m256i half(__m512i v, int which) { return load<__m256i>(reinterpret_cast<const char*>(&v) + 32 * which); }
}  // namespace emulated

#define _mm512_mul_ps(a, b) ::emulated::mul(a, b)
#define _mm512_maskz_max_ps(mask, a, b) ::emulated::max(a, b)
#define _mm512_maskz_min_ps(mask, a, b) ::emulated::min(a, b)
#define _mm512_maskz_max_epi32(mask, a, b) ::emulated::max_words(a, b)
#define _mm512_add_epi32(a, b) ::emulated::add(a, b)
#define _mm512_and_si512(a, b) ::emulated::bits_and(a, b)
#define _mm512_maskz_slli_epi32(mask, v, count) ::emulated::shift_left(v, count)
#define _mm512_maskz_srli_epi32(mask, v, count) ::emulated::shift_right(v, count)
#define _mm512_testn_epi32_mask(a, b) ::emulated::zeros(::emulated::bits_and(a, b))
#define _mm512_mask_and_epi32(from, mask, a, b) ::emulated::select(mask, ::emulated::bits_and(a, b), from)
#define _mm512_mask_or_epi32(from, mask, a, b) ::emulated::select(mask, ::emulated::bits_or(a, b), from)
#define _mm512_maddubs_epi16(bytes, weights) ::emulated::multiply_bytes(bytes, weights)
#define _mm512_madd_epi16(a, b) ::emulated::multiply_halves(a, b)
#define _mm512_cvtepu8_epi16(v) (::emulated::widened<uint8_t, uint16_t, __m512i>(v))
#define _mm512_maskz_cvtepu8_epi32(mask, v) (::emulated::widened<uint8_t, uint32_t, __m512i>(v))
#define _mm512_maskz_cvtepu16_epi32(mask, v) (::emulated::widened<uint16_t, uint32_t, __m512i>(v))
#define _mm512_maskz_cvtepi32_ps(mask, v) (::emulated::widened<int32_t, float, __m512>(v))
#define _mm512_maskz_cvtps_epi32(mask, v) ::emulated::to_words(v)
#define _mm512_maskz_cvtusepi32_epi8(mask, v) ::emulated::to_bytes(v)
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, unordered) ::emulated::nans(a, b)
#undef _mm512_maskz_extracti64x4_epi64
#define _mm512_maskz_extracti64x4_epi64(mask, v, which) ::emulated::half(v, which)
