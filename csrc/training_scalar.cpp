// The readable definition of the training kernels, and what other processors run.
#include <cmath>

#include "training.h"

namespace {

struct Plain {
  struct Type {
    float v[16];
  };
  static constexpr int kWidth = 16;
  template <class Function>
  static Type map(Function function) {
    Type result;
    for (int i = 0; i < kWidth; ++i) result.v[i] = function(i);
    return result;
  }
  static Type load(const float* p) {
    return map([&](int i) { return p[i]; });
  }
  static void store(float* p, const Type& v) {
    for (int i = 0; i < kWidth; ++i) p[i] = v.v[i];
  }
  static Type broadcast(const float* p) {
    return map([&](int) { return *p; });
  }
  static Type zero() { return {}; }
  static Type fma(const Type& a, const Type& b, const Type& c) {
    return map([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  static Type add(const Type& a, const Type& b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  static Type relu(const Type& v) {
    return map([&](int i) { return v.v[i] < 0 ? 0 : v.v[i]; });  // NaN passes, and -0, as through torch.relu
  }
  static Type gate(const Type& h, const Type& v) {
    return map([&](int i) { return h.v[i] <= 0 ? 0 : v.v[i]; });  // NaN passes
  }
  static float sum(const Type* part) {
    float halves[16];
    for (int i = 0; i < kWidth; ++i) halves[i] = part->v[i];
    for (int width = 8; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) halves[i] += halves[i + width];
    return halves[0];
  }
  template <class Sums>
  static void add_sums(const Sums (&sums)[1], float* to) {
    *to += sum(sums[0].part);
  }
};

#include "training_kernels.h"

}  // namespace

extern "C" const TrainingKernels lt4rec_training_scalar = {
    forward_blocks<Plain, 4, 1>,  inputs_blocks<Plain, 1>,  weights_blocks<Plain, 1>, forward_weights<Plain, 1>,
    inputs_weights<Plain, 1>,     weights_weights<Plain, 1>, gate<Plain>, 8};
