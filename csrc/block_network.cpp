// Weights that are kept in blocks -> the layers of a blob: as network.cpp, for LAYOUT_BLOCKS.
#include <algorithm>
#include <cmath>

#include "network.h"
#include "sharing.h"

namespace lt4rec {
namespace {

constexpr int64_t kBlock = GROUP * QUAD;  // weights

// How much of a group or a quad, the `index`-th of `size` features each, is within the layer.
int64_t within(int64_t features, int64_t index, int64_t size) { return std::min(size, features - index * size); }

int64_t weights_of(const CanonicalLayer& layer, int64_t group, int64_t quad) {
  return within(layer.out_features, group, GROUP) * within(layer.in_features, quad, QUAD);
}

const float* block_at(const CanonicalLayer& layer, int64_t index) {
  return reinterpret_cast<const float*>(layer.values) + index * kBlock;
}

// Blocks of all of a dense weight, padded with zeros.
Layer cut_dense(const CanonicalLayer& from) {
  Layer layer = without_weights(from);
  const int64_t groups = padded(from.out_features) / GROUP, quads = quad_count(from.in_features);
  const auto* values = reinterpret_cast<const float*>(from.values);
  layer.cut.resize(size_t(groups * quads * kBlock));
  for (int64_t row = 0; row < from.out_features; ++row)
    for (int64_t column = 0; column < from.in_features; ++column)
      layer.cut[size_t((row / GROUP * quads + column / QUAD) * kBlock + row % GROUP * QUAD + column % QUAD)] =
          values[row * from.in_features + column];
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t quad = 0; quad < quads; ++quad)
      layer.blocks.push(quad, &layer.cut[size_t((group * quads + quad) * kBlock)]);
    layer.blocks.end_group();
  }
  layer.multiply_adds = from.in_features * from.out_features;
  return layer;
}

Layer linear(const CanonicalLayer& from, const View& view) {
  Layer layer = without_weights(from);
  for (int64_t group = 0; group < padded(from.out_features) / GROUP; ++group) {
    view.each_of_union(group, [&](int64_t quad, int64_t at) {
      if (!(view.own_word(group, quad / 64) >> (quad % 64) & 1)) return;
      layer.blocks.push(quad, block_at(from, at));
      layer.multiply_adds += weights_of(from, group, quad);
    });
    layer.blocks.end_group();
  }
  return layer;
}

// What all first layers of one weight keep, each part as if it were a layer's groups.
Layer shared_layer(const std::vector<const CanonicalLayer*>& tasks, const std::vector<View>& views,
                   std::vector<std::vector<uint32_t>>& parts_of_task) {
  const CanonicalLayer& first = *tasks[0];
  if (tasks.size() < 2 || tasks.size() > 64) return {};
  for (const CanonicalLayer* task : tasks)
    if (!shares_weight(*task, first)) return {};
  const int64_t part_features = padded(first.out_features), groups = part_features / GROUP;
  Owners owners = owners_of(views, groups);
  for (int64_t& count : owners.counts) count *= kBlock;
  const Parts parts = choose_parts(owners, tasks.size(), first.out_features);
  if (parts.shared == 0) return {};

  Layer layer = without_weights(first);
  layer.kind = LAYER_SHARED;
  layer.bias.clear();
  layer.slopes.clear();
  layer.activation = ACTIVATION_NONE;
  layer.is_head = layer.takes_bias = 0;
  layer.out_features = int64_t(parts.sets.size()) * part_features;
  layer.part_features = uint32_t(part_features);
  for (uint32_t part = 0; part < parts.sets.size(); ++part)
    for (int64_t group = 0; group < groups; ++group) {
      std::vector<uint64_t> keeps(size_t(views[0].words()));
      each_set(views, group, [&](int64_t word, uint64_t columns, uint64_t set) {
        const std::vector<uint32_t>& cover = parts.cover[owners.number_of.at(set)];
        if (std::find(cover.begin(), cover.end(), part) != cover.end()) keeps[size_t(word)] |= columns;
      });
      views[0].each_of_union(group, [&](int64_t quad, int64_t at) {
        if (!(keeps[size_t(quad / 64)] >> (quad % 64) & 1)) return;
        layer.blocks.push(quad, block_at(first, at));
        layer.multiply_adds += weights_of(first, group, quad);
      });
      layer.blocks.end_group();
    }
  for (size_t task = 0; task < tasks.size(); ++task) parts_of_task.push_back(parts.of_task(task));
  return layer;
}

// Calls visit(group, quads) with the quads, ascending, in which any row of the group has a weight.
template <class Visit>
void each_group_of_quads(const Matrix& weight, Visit visit) {
  std::vector<uint64_t> has(size_t(quad_count(weight.columns) + 63) / 64);
  std::vector<int64_t> quads;
  for (int64_t group = 0; group < padded(weight.rows()) / GROUP; ++group) {
    const int64_t end = weight.starts[size_t(std::min((group + 1) * GROUP, weight.rows()))];
    for (int64_t i = weight.starts[size_t(group * GROUP)]; i < end; ++i) {
      const int64_t quad = weight.column[size_t(i)] / QUAD;
      has[size_t(quad / 64)] |= uint64_t{1} << (quad % 64);
    }
    quads.clear();
    for (size_t word = 0; word < has.size(); ++word)
      for (; has[word]; has[word] &= has[word] - 1) quads.push_back(int64_t(word) * 64 + __builtin_ctzll(has[word]));
    visit(group, quads);
  }
}

// Half of the largest sum of two neighbours in each row, over all blocks; groups of parts repeat.
std::vector<float> largest_pairs(const BlockMatrix& blocks, int64_t features) {
  std::vector<float> largest(static_cast<size_t>(features));
  for (int64_t group = 0; group < blocks.groups(); ++group)
    for (int64_t i = blocks.starts[size_t(group)]; i < blocks.starts[size_t(group) + 1]; ++i)
      for (int64_t pair = 0; pair < kBlock / 2; ++pair) {
        const float* w = blocks.value[size_t(i)] + 2 * pair;
        float& most = largest[size_t((group * GROUP + 2 * pair / QUAD) % features)];
        most = std::max(most, std::fabs(w[0]) / 2 + std::fabs(w[1]) / 2);
      }
  return largest;
}

}  // namespace

void count_filled(Layer& layer) {
  layer.filled = 0;
  each_group_of_quads(layer.weight, [&](int64_t, const std::vector<int64_t>& quads) {
    layer.filled += int64_t(quads.size()) * kBlock;
  });
}

void fill_blocks(Layer& layer, float (*round)(float)) {
  const Matrix& weight = layer.weight;
  std::vector<int64_t> block_of(size_t(quad_count(weight.columns)));
  layer.blocks = {};
  layer.cut.assign(size_t(layer.filled), FILLER);
  float* block = layer.cut.data();
  each_group_of_quads(weight, [&](int64_t group, const std::vector<int64_t>& quads) {
    for (size_t i = 0; i < quads.size(); ++i) {
      block_of[size_t(quads[i])] = int64_t(i);
      layer.blocks.push(quads[i], block + int64_t(i) * kBlock);
    }
    for (int64_t row = group * GROUP; row < std::min((group + 1) * GROUP, weight.rows()); ++row)
      for (auto i = size_t(weight.starts[size_t(row)]); i < size_t(weight.starts[size_t(row) + 1]); ++i) {
        const int64_t at = block_of[size_t(weight.column[i] / QUAD)] * kBlock;
        const float kept = round(weight.value[i]);
        block[at + row % GROUP * QUAD + weight.column[i] % QUAD] = kept == 0 ? 0 : kept;
      }
    layer.blocks.end_group();
    block += int64_t(quads.size()) * kBlock;
  });
}

int64_t kept_in_blocks(const CanonicalLayer& layer) {
  const CanonicalLayer grid = grid_of(layer);
  const View view(grid);
  int64_t kept = 0;
  for (int64_t group = 0; group < grid.out_features; ++group)
    for (int64_t word = 0; word < view.words(); ++word)
      for (uint64_t bits = view.own_word(group, word); bits; bits &= bits - 1)
        kept += weights_of(layer, group, 64 * word + __builtin_ctzll(bits));
  return kept;
}

bool has_zeros_beyond_edges(const CanonicalLayer& layer, const View& grid) {
  bool has = true;
  for (int64_t group = 0; group < padded(layer.out_features) / GROUP; ++group)
    grid.each_of_union(group, [&](int64_t quad, int64_t at) {
      const int64_t rows = within(layer.out_features, group, GROUP), columns = within(layer.in_features, quad, QUAD);
      if (rows == GROUP && columns == QUAD) return;
      for (int64_t i = 0; i < kBlock; ++i)
        has = has && ((i / QUAD < rows && i % QUAD < columns) || block_at(layer, at)[i] == 0);
    });
  return has;
}

std::vector<Layer> arrange_blocks(const CanonicalLayer* layers, int64_t count, int64_t precision) {
  std::vector<CanonicalLayer> grids;
  for (int64_t i = 0; i < count; ++i) grids.push_back(grid_of(layers[i]));
  std::vector<View> views(grids.begin(), grids.end()), first_views;
  std::vector<const CanonicalLayer*> firsts;
  for (int64_t i = 0; i < count; ++i) {
    if (i != 0 && !layers[i - 1].is_head) continue;
    firsts.push_back(&layers[i]);
    first_views.push_back(views[size_t(i)]);
  }

  std::vector<Layer> arranged;
  std::vector<std::vector<uint32_t>> parts_of_task;
  Layer shared = shared_layer(firsts, first_views, parts_of_task);
  const bool is_shared = shared.kind == LAYER_SHARED;
  const uint32_t part_features = shared.part_features;
  if (is_shared) {
    if (precision == PRECISION_S8) shared.largest = largest_pairs(shared.blocks, part_features);
    arranged.push_back(std::move(shared));
  }
  std::vector<size_t> first_layers;  // among `arranged`
  size_t task = 0;
  for (int64_t i = 0; i < count; ++i) {
    const CanonicalLayer& from = layers[i];
    const bool is_first = i == 0 || layers[i - 1].is_head;
    if (is_first && is_shared) {
      Layer layer = without_weights(from);
      layer.kind = LAYER_COMBINED;
      layer.parts = parts_of_task[task++];
      layer.part_features = part_features;
      arranged.push_back(std::move(layer));
      continue;
    }
    if (is_first) first_layers.push_back(arranged.size());
    arranged.push_back(from.planes ? linear(from, views[size_t(i)]) : cut_dense(from));
    if (precision == PRECISION_S8)
      arranged.back().largest = largest_pairs(arranged.back().blocks, padded(from.out_features));
  }
  if (precision != PRECISION_S8) return arranged;
  // Whether multiply-adds are shared must not show in the result: tasks of one weight have their scales in common.
  std::vector<std::vector<float>> in_common;
  for (size_t t = 0; t < first_layers.size(); ++t) {
    std::vector<float> largest = arranged[first_layers[t]].largest;
    for (size_t other = 0; other < first_layers.size(); ++other) {
      if (!shares_weight(*firsts[other], *firsts[t])) continue;
      const std::vector<float>& of_other = arranged[first_layers[other]].largest;
      for (size_t row = 0; row < largest.size(); ++row) largest[row] = std::max(largest[row], of_other[row]);
    }
    in_common.push_back(std::move(largest));
  }
  for (size_t t = 0; t < first_layers.size(); ++t) arranged[first_layers[t]].largest = in_common[t];
  return arranged;
}

}  // namespace lt4rec
