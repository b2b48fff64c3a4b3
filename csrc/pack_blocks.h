// Blocks of 16 outputs x 4 inputs as engine.h lays them out; a part of prepack.cpp.
#include "network.h"

template <class Weight>
struct PackedBlocks {
  std::vector<uint32_t> groups, begins, quads;
  std::vector<Weight> weights;
};

// What a precision's blocks look like: where the weight of an input and an output stands, and what it is stored as.
struct BlocksF32 {
  using Weight = float;
  static int64_t place(int64_t input, int64_t output) { return input * GROUP + output; }
  static float weight(float value, float) { return value; }
};
struct BlocksBf16 {
  using Weight = uint16_t;
  static int64_t place(int64_t input, int64_t output) { return (input / 2 * GROUP + output) * 2 + input % 2; }
  static uint16_t weight(float value, float) { return bf16_of(value); }
};
struct BlocksS8 {
  using Weight = int8_t;
  static int64_t place(int64_t input, int64_t output) { return output * QUAD + input; }
  static int8_t weight(float value, float step) {
    const float code = step > 0 ? std::nearbyint(value / step) : 0;
    return int8_t(std::max(-127.0f, std::min(127.0f, code)));
  }
};

// `steps`: what one step of a quantised weight is worth in each row; repeats from part to part.
template <class Blocks>
PackedBlocks<typename Blocks::Weight> pack_blocks(const lt4rec::Layer& layer, const std::vector<float>& steps) {
  constexpr int64_t kBlock = GROUP * QUAD;
  const lt4rec::BlockMatrix& blocks = layer.blocks;
  const int64_t groups = blocks.groups();
  PackedBlocks<typename Blocks::Weight> packed;
  packed.weights.resize(blocks.quad.size() * kBlock);
  std::vector<int64_t> begin(blocks.starts.begin(), blocks.starts.end() - 1), end(begin);  // in the panel at hand
  std::vector<uint32_t> order(static_cast<size_t>(groups));
  const auto count = [&](uint32_t group) { return end[group] - begin[group]; };
  constexpr bool kIsS8 = sizeof(typename Blocks::Weight) == 1;
  auto* to = packed.weights.data();
  for (int64_t panel = 0; panel < panel_count(layer.in_features, kIsS8); ++panel) {
    const int64_t end_quad = (panel + 1) * panel_quads(kIsS8);
    for (size_t group = 0; group < size_t(groups); ++group)
      while (end[group] < blocks.starts[group + 1] && blocks.quad[size_t(end[group])] < end_quad) ++end[group];
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return count(a) > count(b); });
    for (uint32_t group : order) {
      packed.groups.push_back(group);
      packed.begins.push_back(uint32_t(packed.quads.size()));
      for (int64_t i = begin[group]; i < end[group]; ++i, to += kBlock) {
        packed.quads.push_back(uint32_t(blocks.quad[size_t(i)]));
        const float* from = blocks.value[size_t(i)];
        for (int64_t output = 0; output < GROUP; ++output) {
          const float step = steps.empty() ? 0 : steps[(group * GROUP + size_t(output)) % steps.size()];
          for (int64_t input = 0; input < QUAD; ++input)
            to[Blocks::place(input, output)] = Blocks::weight(from[output * QUAD + input], step);
        }
      }
    }
    packed.begins.push_back(uint32_t(packed.quads.size()));
    begin = end;
  }
  return packed;
}
