// What the engine needs of Arrow's C data interface: arrays of one column and streams of them, as capsules show them.
// Specification: https://arrow.apache.org/docs/format/CDataInterface.html
#pragma once
#include <cstdint>

namespace arrow {

struct Schema {
  const char *format, *name, *metadata;
  int64_t flags, child_count;
  Schema** children;
  Schema* dictionary;
  void (*release)(Schema*);
  void* private_data;
};

struct Array {
  int64_t length, null_count, offset, buffer_count, child_count;
  const void** buffers;
  Array** children;
  Array* dictionary;
  void (*release)(Array*);
  void* private_data;
};

struct Stream {
  int (*schema)(Stream*, Schema* out);  // each returns 0, or an error
  int (*next)(Stream*, Array* out);     // an array that is released ends the stream
  const char* (*last_error)(Stream*);
  void (*release)(Stream*);
  void* private_data;
};

}  // namespace arrow
