// Sixteen floats a register, thirty-two registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "training.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx2,fma")
#endif

namespace {

#include "training_avx.h"

struct Zmm {
  using Type = __m512;
  static constexpr int kWidth = 16;
  static Type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Type v) { _mm512_storeu_ps(p, v); }
  static Type broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Type zero() { return _mm512_setzero_ps(); }
  static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  // max returns its second operand where one is NaN: in this order NaN passes, as through torch.relu.
  // The mask is full, and spares a false warning: GCC 12 builds the plain form on an undefined register.
  static Type relu(Type v) { return _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), v); }
  static Type gate(Type h, Type v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(h, _mm512_setzero_ps(), _CMP_NLE_UQ), v);
  }
  template <int kHalf>
  static __m256 half(Type v) {
    return _mm256_castpd_ps(_mm512_maskz_extractf64x4_pd(0xf, _mm512_castps_pd(v), kHalf));
  }
  static __m128 four(const Type* part) { return halved(_mm256_add_ps(half<0>(*part), half<1>(*part))); }
  static float sum(const Type* part) { return sum_of_four(four(part)); }
  template <class Sums>
  static void add_sums(const Sums (&sums)[4], float* to) {
    add_sums_of_four(four(sums[0].part), four(sums[1].part), four(sums[2].part), four(sums[3].part), to);
  }
};

#include "training_kernels.h"

}  // namespace

extern "C" const TrainingKernels lt4rec_training_avx512 = {
    forward_blocks<Zmm, 8, 2>,  inputs_blocks<Zmm, 4>,  weights_blocks<Zmm, 4>, forward_weights<Zmm, 2>,
    inputs_weights<Zmm, 2>,     weights_weights<Zmm, 4>, gate<Zmm>, PANEL_ROWS};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
