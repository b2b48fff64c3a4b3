// Candidates in order, as ranker/ranking.py defines it.
#ifndef LT4REC_SPARSE_RANKING_H
#define LT4REC_SPARSE_RANKING_H

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lt4rec {

// As numpy raises an array to a number.
inline double raised(double value, double power) {
  if (power == 0) return 1;
  if (power == 1) return value;
  if (power == 2) return value * value;
  return power == 0.5 ? std::sqrt(value) : std::pow(value, power);
}

// The first `count` places of `order` are those of the largest values, descending; the first of equal ones first. No
// value is NaN. It fills `order`.
inline void order_descending(const std::vector<double>& values, std::size_t count, std::vector<int64_t>& order) {
  order.resize(values.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  const auto is_before = [&](int64_t a, int64_t b) {
    const double x = values[std::size_t(a)], y = values[std::size_t(b)];
    return x != y ? x > y : a < b;
  };
  std::partial_sort(order.begin(), order.begin() + std::ptrdiff_t(count), order.end(), is_before);
}

}  // namespace lt4rec
#endif
