// Typed values -> the ids of a field. Every door to a ranker reads its columns through these.
#ifndef LT4REC_SPARSE_VALUES_H
#define LT4REC_SPARSE_VALUES_H

#include <charconv>
#include <cmath>
#include <cstring>

#include "request.h"

namespace lt4rec {

// Each writes an id, kMissing for a missing value, or returns false for a value that is not of the table's type.
inline bool id_of(const Table& table, double value, int64_t* id) {
  constexpr double kTwoTo63 = 9223372036854775808.0;
  if (table.takes_strings()) return false;
  if (std::isnan(value)) return *id = kMissing, true;
  if (table.takes_numbers()) return *id = table.id_of(value), true;
  if (value != std::trunc(value) || std::fabs(value) >= kTwoTo63) return false;
  return *id = table.id_of(int64_t(value)), true;
}

inline bool id_of(const Table& table, int64_t value, int64_t* id) {
  if (table.takes_strings()) return false;
  return *id = table.takes_numbers() ? table.id_of(double(value)) : table.id_of(value), true;
}

inline bool id_of(const Table& table, uint64_t value, int64_t* id) {
  if (table.takes_numbers()) return *id = table.id_of(double(value)), true;
  return value <= uint64_t(INT64_MAX) && id_of(table, int64_t(value), id);
}

inline bool id_of(const Table& table, const char* text, size_t size, int64_t* id) {
  return table.takes_strings() && (*id = table.id_of(text, size), true);
}

// Where ids go: one per row, or those of a bag, which holds no missing values.
class Sink {
 public:
  Sink(const Table& table, FieldIds& field, bool is_bag) : table_(table), field_(field), is_bag_(is_bag) {}

  // Types of values may bring an `id_of` of their own.
  template <class... Value>
  bool put(Value... value) {
    int64_t id;
    if (!id_of(table_, value..., &id)) return false;
    if (id != kMissing || !is_bag_) field_.ids.push_back(id);
    return true;
  }
  void put_missing() {
    if (!is_bag_) field_.ids.push_back(kMissing);
  }
  // Ends a row of bags.
  void end() { field_.ends.push_back(int64_t(field_.ids.size())); }

 private:
  const Table& table_;
  FieldIds& field_;
  bool is_bag_;
};

// The bytes of the space that UTF-8 text begins with, as str.isspace has it; 0 where it begins with none.
inline size_t leading_space(const char* text, size_t size) {
  const auto at = [&](size_t i) { return i < size ? uint8_t(text[i]) : uint8_t{0}; };
  const uint8_t c = at(0);
  if (c == ' ' || (c >= '\t' && c <= '\r') || (c >= 0x1c && c <= 0x1f)) return 1;
  if (c == 0xc2) return at(1) == 0x85 || at(1) == 0xa0 ? 2 : 0;
  const uint32_t of_three = uint32_t(c) << 16 | uint32_t(at(1)) << 8 | at(2);
  const bool is_space = of_three == 0xe19a80 || (of_three >= 0xe28080 && of_three <= 0xe2808a) ||
                        of_three == 0xe280a8 || of_three == 0xe280a9 || of_three == 0xe280af || of_three == 0xe2819f ||
                        of_three == 0xe38080;
  return is_space ? 3 : 0;
}

// The same of the space that it ends in.
inline size_t trailing_space(const char* text, size_t size) {
  for (size_t width = 1; width <= 3 && width <= size; ++width)
    if (leading_space(text + size - width, width) == width) return width;
  return 0;
}

// A bag as text: parts between separators, without the spaces around them, empty ones left out; integers are of 64 bits,
// in ASCII. False for a part that is not of the table's type. The separator is not empty.
inline bool put_text(const char* text, size_t size, const char* separator, bool is_text, Sink& sink) {
  const size_t width = std::strlen(separator);
  for (size_t first = 0; first <= size;) {
    size_t end = first;
    while (end + width <= size && std::memcmp(text + end, separator, width) != 0) ++end;
    if (end + width > size) end = size;
    const char* part = text + first;
    size_t count = end - first;
    while (const size_t space = leading_space(part, count)) part += space, count -= space;
    while (const size_t space = trailing_space(part, count)) count -= space;
    if (count > 0 && is_text) {
      if (!sink.put(part, count)) return false;
    } else if (count > 0) {
      if (*part == '+' && count > 1 && part[1] != '-') ++part, --count;
      int64_t number;
      const auto [past, error] = std::from_chars(part, part + count, number);
      if (error != std::errc() || past != part + count || !sink.put(number)) return false;
    }
    first = end + width;
  }
  return true;
}

}  // namespace lt4rec
#endif
