// Random networks in canonical form, and what plain loops compute for them.
#ifndef LT4REC_SPARSE_TESTS_NETWORKS_H
#define LT4REC_SPARSE_TESTS_NETWORKS_H

#include <algorithm>
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

// What layers of several tasks share: the values of the union, and a bit plane for each task.
struct Weight {
  int64_t in_features = 0, out_features = 0, tasks = 1;
  std::vector<float> values;
  std::vector<uint8_t> planes;  // none: dense
  bool is_blocks = false;       // keeps whole blocks of GROUP x QUAD alone

  int64_t row_bytes() const { return (in_features + 7) / 8; }
  bool keeps(int64_t task, int64_t row, int64_t column) const {
    if (planes.empty()) return true;
    return planes[size_t((task * out_features + row) * row_bytes() + column / 8)] >> (column % 8) & 1;
  }
  bool any_keeps(int64_t row, int64_t column) const {
    for (int64_t task = 0; task < tasks; ++task)
      if (keeps(task, row, column)) return true;
    return false;
  }
};

// The same as LAYOUT_BLOCKS has it: a bit and 64 values for each block.
inline Weight in_blocks(const Weight& weight) {
  Weight blocks;
  blocks.in_features = quad_count(weight.in_features);
  blocks.out_features = padded(weight.out_features) / GROUP;
  blocks.tasks = weight.tasks;
  blocks.planes.resize(size_t(weight.tasks * blocks.out_features * blocks.row_bytes()));
  std::vector<float> dense(size_t(weight.in_features * weight.out_features));
  size_t next = 0;
  for (int64_t row = 0; row < weight.out_features; ++row)
    for (int64_t column = 0; column < weight.in_features; ++column)
      if (weight.any_keeps(row, column)) dense[size_t(row * weight.in_features + column)] = weight.values[next++];
  for (int64_t group = 0; group < blocks.out_features; ++group)
    for (int64_t quad = 0; quad < blocks.in_features; ++quad) {
      if (!weight.any_keeps(group * GROUP, quad * QUAD)) continue;
      for (int64_t task = 0; task < weight.tasks; ++task)
        if (weight.keeps(task, group * GROUP, quad * QUAD))
          blocks.planes[size_t((task * blocks.out_features + group) * blocks.row_bytes() + quad / 8)] |= 1 << (quad % 8);
      for (int64_t row = group * GROUP; row < (group + 1) * GROUP; ++row)
        for (int64_t column = quad * QUAD; column < (quad + 1) * QUAD; ++column) {
          const bool is_within = row < weight.out_features && column < weight.in_features;
          blocks.values.push_back(is_within ? dense[size_t(row * weight.in_features + column)] : 0);
        }
    }
  return blocks;
}

struct Layer {
  size_t weight = 0;  // of the network's
  int64_t task = 0;
  std::vector<float> bias;
  std::vector<float> slopes;  // of DICE
  int64_t activation = ACTIVATION_NONE, is_head = 0;
  double input_scale = 0.05;
  int64_t input_zero_point = 100;
};

struct Network {
  bool is_blocks = false;  // all of its weights are, or dense
  std::vector<Weight> weights;
  std::vector<Layer> layers;  // task by task

  const Weight& weight(const Layer& layer) const { return weights[layer.weight]; }
  int64_t layouts() const { return is_blocks ? LAYOUT_BLOCKS : LAYOUT_TABLES | LAYOUT_SLICES | LAYOUT_FILLED; }
};

// A copy whose memory ends with its last value, where a vector often has room to spare: a sanitizer finds the byte
// behind it.
template <class T>
std::vector<T> exactly(const std::vector<T>& values) {
  return std::vector<T>(values.begin(), values.end());
}

struct Prepacked {
  int64_t bytes;  // -1 or -2 where prepack refused
  std::string message;
  uint8_t* blob;

  Prepacked(const Network& network, int64_t precision, bool takes_bias = false)
      : Prepacked(network, precision, network.layouts(), takes_bias) {}
  Prepacked(const Network& network, int64_t precision, int64_t layouts, bool takes_bias = false) {
    Network held(network);
    for (Weight& weight : held.weights) {
      if (weight.is_blocks) weight = in_blocks(weight);
      weight.values = exactly(weight.values);
      weight.planes = exactly(weight.planes);
    }
    std::vector<CanonicalLayer> layers;
    for (Layer& layer : held.layers) {
      layer.bias = exactly(layer.bias);
      layer.slopes = exactly(layer.slopes);
      const Weight &weight = held.weight(layer), &whole = network.weight(layer);
      const auto nnz = int64_t(weight.values.size()) / (whole.is_blocks ? GROUP * QUAD : 1);
      layers.push_back({whole.is_blocks, int64_t(weight.values.data()), int64_t(weight.planes.data()), weight.tasks,
                        layer.task, int64_t(layer.bias.data()), whole.in_features, whole.out_features, nnz,
                        layer.activation, layer.is_head, layer.input_scale, layer.input_zero_point, 0,
                        layer.slopes.empty() ? 0 : int64_t(layer.slopes.data()), 0});
      if (takes_bias && (layers.size() == 1 || layers[layers.size() - 2].is_head)) {
        layers.back().bias = 0;
        layers.back().takes_bias = 1;
      }
    }
    char text[MESSAGE_BYTES] = "";
    bytes = lt4rec_prepack(layers.data(), int64_t(layers.size()), precision, layouts, &lt4rec_isa_scalar, -1, &blob,
                           text);
    message = text;
  }
  ~Prepacked() { lt4rec_free(blob); }
  Prepacked(const Prepacked&) = delete;
  Prepacked& operator=(const Prepacked&) = delete;

  const BlobHeader& header() const { return *reinterpret_cast<const BlobHeader*>(blob); }

  bool has(int64_t path) const {
    const uint32_t layouts[] = {~0u, LAYOUT_TABLES, LAYOUT_SLICES, LAYOUT_BLOCKS, LAYOUT_FILLED};
    return header().layouts & layouts[path];
  }
  std::vector<int64_t> paths() const {
    std::vector<int64_t> found;
    for (int64_t path = PATH_TABLES; path <= PATH_FILLED; ++path)
      if (has(path)) found.push_back(path);
    return found;
  }

  // How many parts of a shared layer one task adds; 0 where nothing is shared.
  int64_t most_parts() const {
    const auto* records = reinterpret_cast<const LayerRecord*>(blob + sizeof(BlobHeader));
    int64_t most = 0;
    for (uint32_t i = 0; i < header().layers; ++i) most = std::max(most, int64_t{records[i].part_count});
    return most;
  }
};

// Weights of -1, 0 and 1, some of the kept ones 0: sums of them are exact in every precision's float32. Each of several
// tasks keeps its share of the union. Where everything is kept, half of the weights are dense.
inline Weight random_weight(Random& random, int64_t in_features, int64_t out_features, double density,
                            int64_t tasks = 1, double share = 1, bool is_blocks = false) {
  if (is_blocks) {  // each weight of the grid stands for a block
    const Weight grid = random_weight(random, quad_count(in_features), padded(out_features) / GROUP, density, tasks,
                                      share);
    Weight weight;
    weight.is_blocks = !grid.planes.empty();
    weight.in_features = in_features;
    weight.out_features = out_features;
    weight.tasks = tasks;
    if (weight.is_blocks) weight.planes.resize(size_t(tasks * out_features * weight.row_bytes()));
    for (int64_t row = 0; row < out_features; ++row)
      for (int64_t column = 0; column < in_features; ++column) {
        for (int64_t task = 0; task < tasks; ++task)
          if (weight.is_blocks && grid.keeps(task, row / GROUP, column / QUAD))
            weight.planes[size_t((task * out_features + row) * weight.row_bytes() + column / 8)] |= 1 << (column % 8);
        if (weight.any_keeps(row, column)) weight.values.push_back(float(below(random, 3) - 1));
      }
    return weight;
  }
  Weight weight;
  weight.in_features = in_features;
  weight.out_features = out_features;
  weight.tasks = tasks;
  weight.planes.resize(size_t(tasks * out_features * weight.row_bytes()));
  for (int64_t row = 0; row < out_features; ++row) {
    const double of_row = density == 1 ? 1 : chance(random, 0.1) ? 0 : chance(random, 0.1) ? 1 : density;
    for (int64_t column = 0; column < in_features; ++column) {
      if (!chance(random, of_row)) continue;
      for (int64_t task = 0; task < tasks; ++task)
        if (share == 1 || chance(random, share))
          weight.planes[size_t((task * out_features + row) * weight.row_bytes() + column / 8)] |= 1 << (column % 8);
      if (weight.any_keeps(row, column)) weight.values.push_back(float(below(random, 3) - 1));
    }
  }
  if (tasks == 1 && density == 1 && chance(random, 0.5)) weight.planes.clear();
  return weight;
}

// Tasks of these widths, which begin with one number of inputs. Where `share` is above 0, first layers as wide as the
// first task's are one weight, and each task keeps that share of it.
inline Network random_network(Random& random, const std::vector<std::vector<int>>& tasks, double density,
                              double share, bool is_blocks = false) {
  Network network;
  network.is_blocks = is_blocks;
  int64_t sharing = 0, task_of_shared = 0;
  for (const std::vector<int>& widths : tasks) sharing += share > 0 && widths[1] == tasks[0][1];
  for (const std::vector<int>& widths : tasks) {
    for (size_t i = 0; i + 1 < widths.size(); ++i) {
      const bool is_shared = i == 0 && sharing > 0 && widths[1] == tasks[0][1];
      Layer layer;
      layer.weight = is_shared ? 0 : network.weights.size();
      layer.task = is_shared ? task_of_shared++ : 0;
      if (layer.weight == network.weights.size())
        network.weights.push_back(is_shared
                                      ? random_weight(random, widths[i], widths[i + 1], density, sharing, share,
                                                      is_blocks)
                                      : random_weight(random, widths[i], widths[i + 1], density, 1, 1, is_blocks));
      if (chance(random, 0.8))
        for (int row = 0; row < widths[i + 1]; ++row) layer.bias.push_back(float(below(random, 5) - 2));
      layer.is_head = i + 2 == widths.size();
      layer.activation = layer.is_head && chance(random, 0.5) ? ACTIVATION_NONE : ACTIVATION_RELU;
      if (chance(random, 0.3)) {
        layer.activation = ACTIVATION_DICE;
        // A gate that is 1, or lost beside alpha, whatever z is: z or alpha z, which are exact.
        layer.slopes.resize(size_t(3 * widths[i + 1]));
        for (int row = 0; row < widths[i + 1]; ++row) {
          layer.slopes[size_t(widths[i + 1] + row)] = chance(random, 0.5) ? 100.0f : -100.0f;
          layer.slopes[size_t(2 * widths[i + 1] + row)] = chance(random, 0.5) ? -1.0f : 2.0f;
        }
      }
      if (i > 0) layer.input_scale = 0.1, layer.input_zero_point = below(random, 3) * 10;
      network.layers.push_back(layer);
    }
  }
  return network;
}

inline int64_t outputs_of(const Network& network) {
  int64_t outputs = 0;
  for (const Layer& layer : network.layers) outputs += layer.is_head ? network.weight(layer).out_features : 0;
  return outputs;
}

inline double rounded_to_bf16(double value) {
  if (value == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(value) - 7);
  return std::nearbyint(value / unit) * unit;
}

// All heads for one row, for F32 and BF16.
inline std::vector<float> reference(const Network& network, const std::vector<float>& x, bool is_bf16) {
  std::vector<float> out;
  std::vector<double> h(x.begin(), x.end());
  for (const Layer& layer : network.layers) {
    const Weight& weight = network.weight(layer);
    std::vector<double> y(size_t(weight.out_features));
    size_t next = 0;  // of the union's values
    for (size_t row = 0; row < y.size(); ++row) {
      y[row] = layer.bias.empty() ? 0 : layer.bias[row];
      for (int64_t column = 0; column < weight.in_features; ++column) {
        if (!weight.any_keeps(int64_t(row), column)) continue;
        const double v = h[size_t(column)], value = weight.values[next++];
        if (weight.keeps(layer.task, int64_t(row), column)) y[row] += value * (is_bf16 ? rounded_to_bf16(v) : v);
      }
      if (layer.activation == ACTIVATION_RELU && y[row] < 0) y[row] = 0;
      if (layer.activation == ACTIVATION_DICE && layer.slopes[y.size() + row] < 0) y[row] *= layer.slopes[2 * y.size() + row];
    }
    if (layer.is_head) out.insert(out.end(), y.begin(), y.end());
    h = layer.is_head ? std::vector<double>(x.begin(), x.end()) : y;
  }
  return out;
}

#endif
