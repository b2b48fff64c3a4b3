// Eight floats a register, sixteen registers: eight accumulators, one weight, and the rest for the compiler.
#if defined(__x86_64__)
#include <immintrin.h>

#include "engine.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace {

struct Ymm {
  using Type = __m256;
  static constexpr int kWidth = 8;
  static Type load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Type v) { _mm256_store_ps(p, v); }
  static Type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  // max returns its second operand where one is NaN: in this order NaN passes, as through torch.relu.
  static Type relu(Type v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
};

#include "layer_f32.h"
#include "transpose_avx.h"

void layer_f32(const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
  switch (lanes) {
    case 8: return add_layer<Ymm, 1, 4>(blob, layer, x, y);
    case 16: return add_layer<Ymm, 2, 4>(blob, layer, x, y);
    case 32: return add_layer<Ymm, 4, 2>(blob, layer, x, y);
    default: return add_layer<Ymm, 8, 1>(blob, layer, x, y);
  }
}

}  // namespace

extern "C" const Isa lt4rec_isa_avx2 = {"avx2", layer_f32, transpose_f32};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
