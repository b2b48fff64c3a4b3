// Which sets of tasks keep weights in common, and for which of them it pays to add once.
#include "sharing.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace lt4rec {

CanonicalLayer grid_of(const CanonicalLayer& layer) {
  CanonicalLayer grid = layer;
  if (!layer.is_blocks) return grid;
  grid.in_features = quad_count(layer.in_features);
  grid.out_features = padded(layer.out_features) / GROUP;
  return grid;
}

bool shares_weight(const CanonicalLayer& a, const CanonicalLayer& b) {
  return a.planes != 0 && a.planes == b.planes && a.values == b.values && a.tasks == b.tasks &&
         a.is_blocks == b.is_blocks && a.in_features == b.in_features && a.out_features == b.out_features;
}

Owners owners_of(const std::vector<View>& tasks, int64_t out_features) {
  Owners owners;
  for (int64_t row = 0; row < out_features; ++row)
    each_set(tasks, row, [&](int64_t, uint64_t columns, uint64_t set) {
      const auto found = owners.number_of.try_emplace(set, uint32_t(owners.sets.size()));
      if (found.second) owners.sets.push_back(set), owners.counts.push_back(0);
      owners.counts[found.first->second] += __builtin_popcountll(columns);
    });
  return owners;
}

Parts choose_parts(const Owners& owners, size_t tasks, int64_t out_features) {
  constexpr int64_t kMostShared = 8;       // the sums of more parts cost what they save
  constexpr size_t kMostCandidates = 256;  // the search is quadratic in them
  Parts parts;
  parts.cover.resize(owners.sets.size());
  std::vector<uint64_t> left(owners.sets);  // of each set, the tasks that no part serves yet
  std::vector<std::pair<int64_t, uint64_t>> candidates;
  for (size_t s = 0; s < owners.sets.size(); ++s)
    if (owners.sets[s] & (owners.sets[s] - 1)) candidates.emplace_back(owners.counts[s], owners.sets[s]);
  std::sort(candidates.begin(), candidates.end(), std::greater<>());
  if (candidates.size() > kMostCandidates) candidates.resize(kMostCandidates);
  const auto take = [&](uint64_t part) {
    for (size_t s = 0; s < left.size(); ++s) {
      if (part & ~left[s]) continue;
      parts.cover[s].push_back(uint32_t(parts.sets.size()));
      left[s] &= ~part;
    }
    parts.sets.push_back(part);
  };
  while (int64_t(parts.sets.size()) < kMostShared) {
    int64_t most = -1;
    uint64_t best = 0;
    for (const auto& candidate : candidates) {
      const uint64_t part = candidate.second;
      const int64_t of_part = __builtin_popcountll(part);
      // To add one part to a task's sum costs as much as some eight multiply-adds for each output feature.
      int64_t saved = -8 * of_part * out_features;
      for (size_t s = 0; s < left.size(); ++s)
        if (!(part & ~left[s])) saved += owners.counts[s] * (of_part - 1);
      if (saved > most) most = saved, best = part;
    }
    if (!best) break;
    take(best);
  }
  parts.shared = parts.sets.size();
  for (size_t task = 0; task < tasks; ++task) take(uint64_t{1} << task);
  return parts;
}

}  // namespace lt4rec
