// Eight floats a register, sixteen registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "training.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {

#include "training_avx.h"

struct Ymm {
  using Type = __m256;
  static constexpr int kWidth = 8;
  static Type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  static Type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Type zero() { return _mm256_setzero_ps(); }
  static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  // max returns its second operand where one is NaN: in this order NaN passes, as through torch.relu.
  static Type relu(Type v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  static Type gate(Type h, Type v) {
    return _mm256_and_ps(_mm256_cmp_ps(h, _mm256_setzero_ps(), _CMP_NLE_UQ), v);
  }
  static __m128 four(const Type* part) { return halved(_mm256_add_ps(part[0], part[1])); }
  static float sum(const Type* part) { return sum_of_four(four(part)); }
  template <class Sums>
  static void add_sums(const Sums (&sums)[4], float* to) {
    add_sums_of_four(four(sums[0].part), four(sums[1].part), four(sums[2].part), four(sums[3].part), to);
  }
};

#include "training_kernels.h"

}  // namespace

extern "C" const TrainingKernels lt4rec_training_avx2 = {
    forward_blocks<Ymm, 4, 2>,  inputs_blocks<Ymm, 2>,  weights_blocks<Ymm, 1>, forward_weights<Ymm, 2>,
    inputs_weights<Ymm, 2>,     weights_weights<Ymm, 4>, gate<Ymm>, 8};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
