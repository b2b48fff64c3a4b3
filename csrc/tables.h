// From raw values to ids: what ranker/features/tables.py fits, looked up value by value.
#ifndef LT4REC_SPARSE_TABLES_H
#define LT4REC_SPARSE_TABLES_H

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "hashes.h"
#include "ranker.h"

namespace lt4rec {

constexpr int64_t kMissing = 0, kUnseen = 1, kFirstKnown = 2;

// An id is 0 for a missing value. In a vocabulary 1 is an unseen value, and the known ones follow in the order of the
// keys; hashes, and buckets between cuts, begin at 1.
class Table {
 public:
  explicit Table(const TableSpec& spec) : spec_(spec) {
    if (spec.kind != TABLE_INTS && spec.kind != TABLE_STRINGS) return;
    size_t slots = 4;
    while (slots < 2 * size_t(spec.count)) slots *= 2;
    slots_.resize(slots);
    for (int64_t i = 0; i < spec.count; ++i) insert(i);
  }

  int64_t size() const { return spec_.size; }
  bool takes_strings() const { return spec_.kind == TABLE_STRINGS || spec_.kind == TABLE_HASHED_STRINGS; }
  bool takes_numbers() const { return spec_.kind == TABLE_CUTS; }

  int64_t id_of(int64_t value) const {
    if (spec_.kind == TABLE_HASHED_INTS) return hashed(splitmix64(uint64_t(value)));
    for (size_t at = splitmix64(uint64_t(value));; ++at) {
      const Slot& slot = slots_[at & (slots_.size() - 1)];
      if (slot.id == kMissing) return kUnseen;
      if (slot.key == uint64_t(value)) return slot.id;
    }
  }

  int64_t id_of(const char* text, size_t size) const {
    if (spec_.kind == TABLE_HASHED_STRINGS) return hashed(blake2b8(text, size));
    const uint64_t hash = hash_of(text, size);
    for (size_t at = hash;; ++at) {
      const Slot& slot = slots_[at & (slots_.size() - 1)];
      if (slot.id == kMissing) return kUnseen;
      if (slot.key == hash && is_key(slot.id - kFirstKnown, text, size)) return slot.id;
    }
  }

  // Of a number that is not NaN.
  int64_t id_of(double value) const {
    const auto* cuts = reinterpret_cast<const double*>(spec_.keys);
    return 1 + (std::lower_bound(cuts, cuts + spec_.count, value) - cuts);
  }

 private:
  struct Slot {
    uint64_t key;  // an integer, or the hash of a string
    int64_t id = kMissing;
  };

  void insert(int64_t index) {
    const bool is_text = spec_.kind == TABLE_STRINGS;
    const auto* bytes = reinterpret_cast<const char*>(spec_.keys);
    const auto* offsets = reinterpret_cast<const int64_t*>(spec_.offsets);
    const char* text = is_text ? bytes + offsets[index] : nullptr;
    const size_t size = is_text ? size_t(offsets[index + 1] - offsets[index]) : 0;
    const uint64_t key = is_text ? hash_of(text, size) : reinterpret_cast<const uint64_t*>(spec_.keys)[index];
    for (size_t at = is_text ? key : splitmix64(key);; ++at) {
      Slot& slot = slots_[at & (slots_.size() - 1)];
      if (slot.id != kMissing && (slot.key != key || (is_text && !is_key(slot.id - kFirstKnown, text, size)))) continue;
      // Of keys that are there twice the first counts among integers and the last among strings, as in tables.py.
      if (slot.id == kMissing || is_text) slot = {key, index + kFirstKnown};
      return;
    }
  }

  bool is_key(int64_t index, const char* text, size_t size) const {
    const auto* offsets = reinterpret_cast<const int64_t*>(spec_.offsets);
    const char* key = reinterpret_cast<const char*>(spec_.keys) + offsets[index];
    return size_t(offsets[index + 1] - offsets[index]) == size && (size == 0 || std::memcmp(key, text, size) == 0);
  }

  // Private to a process.
  static uint64_t hash_of(const char* text, size_t size) {
    uint64_t hash = size;
    for (; size >= 8; text += 8, size -= 8) {
      uint64_t word;
      std::memcpy(&word, text, 8);
      hash = splitmix64(hash ^ word);
    }
    uint64_t word = 0;
    if (size) std::memcpy(&word, text, size);
    return splitmix64(hash ^ word);
  }

  int64_t hashed(uint64_t hash) const { return 1 + int64_t(hash % uint64_t(spec_.size - 1)); }

  TableSpec spec_;
  std::vector<Slot> slots_;  // open addressing; a power of two, half of them free
};

}  // namespace lt4rec
#endif
