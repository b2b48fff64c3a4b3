// Random networks in canonical CSR, and what the plainest of loops makes of them.
#ifndef LT4REC_SPARSE_TESTS_NETWORKS_H
#define LT4REC_SPARSE_TESTS_NETWORKS_H

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "engine.h"

// Ends the process with status 1 and says where. Sanitizers end it with others.
#define CHECK(condition, ...)                                             \
  do {                                                                    \
    if (condition) break;                                                 \
    std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
    std::fprintf(stderr, __VA_ARGS__);                                    \
    std::fprintf(stderr, "\n");                                           \
    std::exit(1);                                                         \
  } while (false)

using Random = std::mt19937;

inline int below(Random& random, int64_t bound) { return int(random() % uint64_t(bound)); }
inline bool chance(Random& random, double probability) { return random() < probability * 4294967296.0; }

struct CsrLayer {
  std::vector<int32_t> crow_indices{0}, col_indices;
  std::vector<float> values, bias;
  int64_t in_features = 0, activation = ACTIVATION_NONE, is_head = 0;
  double input_scale = 0.05;
  int64_t input_zero_point = 100;

  int64_t out_features() const { return int64_t(crow_indices.size()) - 1; }
};
using CsrNetwork = std::vector<CsrLayer>;  // task by task

// The array alone, so that a sanitizer finds the byte behind it, which in a vector is often spare.
template <class T>
std::vector<T> exactly(const std::vector<T>& values) {
  return std::vector<T>(values.begin(), values.end());
}

struct Prepacked {
  int64_t bytes;  // -1 or -2 where prepack refused
  std::string message;
  uint8_t* blob;

  Prepacked(const CsrNetwork& network, int64_t precision) {
    const CsrNetwork held = [&] {
      CsrNetwork copy(network);
      for (CsrLayer& layer : copy) {
        layer.crow_indices = exactly(layer.crow_indices);
        layer.col_indices = exactly(layer.col_indices);
        layer.values = exactly(layer.values);
        layer.bias = exactly(layer.bias);
      }
      return copy;
    }();
    std::vector<CanonicalLayer> layers;
    for (const CsrLayer& layer : held)
      layers.push_back({int64_t(layer.crow_indices.data()), int64_t(layer.col_indices.data()),
                        int64_t(layer.values.data()), int64_t(layer.bias.data()), layer.in_features,
                        layer.out_features(), int64_t(layer.col_indices.size()), layer.activation, layer.is_head,
                        layer.input_scale, layer.input_zero_point});
    char text[MESSAGE_BYTES] = "";
    bytes = lt4rec_prepack(layers.data(), int64_t(layers.size()), precision, &blob, text);
    message = text;
  }
  ~Prepacked() { lt4rec_free(blob); }
  Prepacked(const Prepacked&) = delete;
  Prepacked& operator=(const Prepacked&) = delete;

  const BlobHeader& header() const { return *reinterpret_cast<const BlobHeader*>(blob); }
};

// Weights of -1, 0 and 1, some of the kept ones 0: sums of them are exact in every precision's float32.
inline CsrLayer random_layer(Random& random, int64_t in_features, int64_t out_features, double density) {
  CsrLayer layer;
  layer.in_features = in_features;
  for (int64_t row = 0; row < out_features; ++row) {
    const double of_row = chance(random, 0.1) ? 0 : chance(random, 0.1) ? 1 : density;
    for (int32_t column = 0; column < in_features; ++column) {
      if (!chance(random, of_row)) continue;
      layer.col_indices.push_back(column);
      layer.values.push_back(float(below(random, 3) - 1));
    }
    layer.crow_indices.push_back(int32_t(layer.col_indices.size()));
  }
  if (chance(random, 0.8))
    for (int64_t row = 0; row < out_features; ++row) layer.bias.push_back(float(below(random, 5) - 2));
  return layer;
}

// Tasks of these widths, which begin with one number of inputs. Where `is_shared`, first layers of one width keep most
// weights in common.
inline CsrNetwork random_network(Random& random, const std::vector<std::vector<int>>& tasks, double density,
                                 bool is_shared) {
  CsrNetwork network;
  for (const std::vector<int>& widths : tasks) {
    for (size_t i = 0; i + 1 < widths.size(); ++i) {
      CsrLayer layer = random_layer(random, widths[i], widths[i + 1], density);
      const bool is_alike = i == 0 && is_shared && !network.empty() && network[0].out_features() == widths[1];
      if (is_alike) {
        layer.crow_indices = network[0].crow_indices;
        layer.col_indices = network[0].col_indices;
        layer.values = network[0].values;
        for (float& value : layer.values)
          if (chance(random, 0.1)) value = 2;
      }
      layer.is_head = i + 2 == widths.size();
      layer.activation = layer.is_head && chance(random, 0.5) ? ACTIVATION_NONE : ACTIVATION_RELU;
      if (i > 0) layer.input_scale = 0.1, layer.input_zero_point = below(random, 3) * 10;
      network.push_back(layer);
    }
  }
  return network;
}

inline int64_t outputs_of(const CsrNetwork& network) {
  int64_t outputs = 0;
  for (const CsrLayer& layer : network) outputs += layer.is_head ? layer.out_features() : 0;
  return outputs;
}

inline double rounded_to_bf16(double value) {
  if (value == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(value) - 7);
  return std::nearbyint(value / unit) * unit;
}

// All heads for one row, for F32 and BF16.
inline std::vector<float> reference(const CsrNetwork& network, const std::vector<float>& x, bool is_bf16) {
  std::vector<float> out;
  std::vector<double> h(x.begin(), x.end());
  for (const CsrLayer& layer : network) {
    std::vector<double> y(size_t(layer.out_features()));
    for (size_t row = 0; row < y.size(); ++row) {
      y[row] = layer.bias.empty() ? 0 : layer.bias[row];
      for (int32_t i = layer.crow_indices[row]; i < layer.crow_indices[row + 1]; ++i) {
        const double v = h[size_t(layer.col_indices[size_t(i)])];
        y[row] += layer.values[size_t(i)] * (is_bf16 ? rounded_to_bf16(v) : v);
      }
      if (layer.activation == ACTIVATION_RELU && y[row] < 0) y[row] = 0;
    }
    if (layer.is_head) out.insert(out.end(), y.begin(), y.end());
    h = layer.is_head ? std::vector<double>(x.begin(), x.end()) : y;
  }
  return out;
}

#endif
