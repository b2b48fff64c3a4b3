// Kernels with every argument between inaccessible pages, and NaN wherever engine.h promises no value.
//
// A sanitizer does not see a gather, nor an overrun from one piece of the engine's scratch memory into the next. Here
// each kernel gets copies of exactly the size that its contract names: one byte read or written out of place ends the
// process, and a NaN that is read must not reach the result.
#ifndef LT4REC_SPARSE_TESTS_GUARDED_H
#define LT4REC_SPARSE_TESTS_GUARDED_H

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "networks.h"

class GuardedPages {
 public:
  explicit GuardedPages(size_t bytes) {
    const auto page = size_t(sysconf(_SC_PAGESIZE));
    bytes_ = (bytes + page - 1) / page * page;
    void* all = mmap(nullptr, bytes_ + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(all != MAP_FAILED, "no memory");
    begin_ = static_cast<char*>(all) + page;
    CHECK(mprotect(begin_ - page, page, PROT_NONE) == 0 && mprotect(begin_ + bytes_, page, PROT_NONE) == 0, "mprotect");
  }
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  // `count` values right before the page behind, or right after the one in front; each byte 0xff, which is a NaN.
  template <class T>
  T* take(int64_t count, bool is_at_end) {
    const size_t size = size_t(count) * sizeof(T);
    CHECK(size <= bytes_, "%zu bytes", size);
    char* at = is_at_end ? begin_ + bytes_ - size : begin_;
    std::memset(at, 0xff, size);
    return reinterpret_cast<T*>(at);
  }

 private:
  char* begin_;
  size_t bytes_;
};

namespace guarded {

struct State {
  const Isa* isa = nullptr;
  bool is_at_end = true;
  GuardedPages pages[6] = {GuardedPages(1 << 22), GuardedPages(1 << 22), GuardedPages(1 << 20),
                           GuardedPages(1 << 20), GuardedPages(1 << 20), GuardedPages(1 << 20)};
};
inline State& state() {
  static State state;
  return state;
}

template <class T>
T* fresh(int page, int64_t count) {
  return state().pages[page].take<T>(count, state().is_at_end);
}
template <class T>
const T* copied(int page, const T* from, int64_t count) {
  if (from == nullptr) return nullptr;
  T* to = fresh<T>(page, count);
  std::memcpy(to, from, size_t(count) * sizeof(T));
  return to;
}

// What lies between the rows of y must be as it was.
template <class T>
void check_untouched(const T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    T poison;
    std::memset(&poison, 0xff, sizeof(T));
    CHECK(std::memcmp(values + i, &poison, sizeof(T)) == 0, "a kernel wrote out of place, at %lld", (long long)i);
  }
}

template <class T, class Slices>
void slices(Slices kernel, const uint8_t* blob, const LayerRecord* layer, const T* x, float* y, int lanes) {
  const int64_t stride = lane_stride(lanes), y_count = tile_rows(layer->out_features) * stride;
  T* from = fresh<T>(0, tile_rows(layer->in_features) * stride);
  for (int64_t row = 0; row < tile_rows(layer->in_features); ++row)
    std::memcpy(from + row * stride, x + row * stride, size_t(lanes) * sizeof(T));
  float* to = fresh<float>(1, y_count);
  kernel(blob, layer, from, to, lanes);
  for (int64_t row = 0; row < tile_rows(layer->out_features); ++row)
    std::memcpy(y + row * stride, to + row * stride, size_t(lanes) * sizeof(float));
}

// A line: where its features and its zeros stand, and how long it is (line_length of sparse_mlp.cpp, not rounded up).
template <int64_t kGap, int64_t kWindow>
struct GapLine {
  static int64_t length(int64_t features) { return line_position(features, kGap) + 1 + kWindow; }
  static bool holds(int64_t position, int64_t features) {
    const int64_t last_zero = (features + kGap - 1) / kGap * (kGap + 1);
    return position <= line_position(features - 1, kGap) || position == last_zero;
  }
};
struct LineS8 {
  static int64_t length(int64_t features) { return 2 * (features + HALF_S8) + WINDOW_S8; }
  static bool holds(int64_t position, int64_t features) {
    return position / WINDOW_S8 * HALF_S8 + position % WINDOW_S8 < features;
  }
};
using LineF32 = GapLine<GAP_F32, WINDOW_F32>;
using LineBf16 = GapLine<GAP_BF16, WINDOW_BF16>;

template <class Line, class T, class Value, class Table>
void table(Table kernel, const uint8_t* blob, const LayerRecord* layer, const T* x, int64_t x_stride, int rows,
           Value* y, int64_t y_stride) {
  const int64_t length = Line::length(layer->in_features), out_features = padded(layer->out_features);
  CHECK(length <= x_stride || rows == 1, "lines overlap");
  CHECK(out_features <= y_stride || rows == 1, "rows overlap");
  T* from = fresh<T>(0, (rows - 1) * x_stride + length);
  for (int row = 0; row < rows; ++row)
    for (int64_t i = 0; i < length; ++i)
      if (Line::holds(i, layer->in_features)) from[row * x_stride + i] = x[row * x_stride + i];
  Value* to = fresh<Value>(1, (rows - 1) * y_stride + out_features);
  kernel(blob, layer, from, x_stride, rows, to, y_stride);
  for (int row = 0; row < rows; ++row) {
    std::memcpy(y + row * y_stride, to + row * y_stride, size_t(out_features) * sizeof(Value));
    if (row < rows - 1) check_untouched(to + row * y_stride + out_features, y_stride - out_features);
  }
}

template <class T, class Value, class Blocks>
void blocks(Blocks kernel, const uint8_t* blob, const LayerRecord* layer, const T* x, int64_t x_stride, int64_t rows,
            Value* y, int64_t y_stride) {
  const int64_t length = quad_count(layer->in_features) * QUAD, out_features = padded(layer->out_features);
  CHECK(length <= x_stride || rows == 1, "rows of x overlap");
  CHECK(out_features <= y_stride || rows == 1, "rows overlap");
  T* from = fresh<T>(0, (rows - 1) * x_stride + length);
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(from + row * x_stride, x + row * x_stride, size_t(length) * sizeof(T));
  Value* to = fresh<Value>(1, (rows - 1) * y_stride + out_features);
  kernel(blob, layer, from, x_stride, rows, to, y_stride);
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(y + row * y_stride, to + row * y_stride, size_t(out_features) * sizeof(Value));
    if (row < rows - 1) check_untouched(to + row * y_stride + out_features, y_stride - out_features);
  }
}

inline void transpose_f32(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                          int64_t to_stride) {
  float* source = fresh<float>(2, (rows - 1) * from_stride + columns);
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(source + r * from_stride, from + r * from_stride, size_t(columns) * sizeof(float));
  float* target = fresh<float>(3, (columns - 1) * to_stride + rows);
  state().isa->transpose_f32(source, from_stride, rows, columns, target, to_stride);
  for (int64_t c = 0; c < columns; ++c) {
    std::memcpy(to + c * to_stride, target + c * to_stride, size_t(rows) * sizeof(float));
    if (c < columns - 1) check_untouched(target + c * to_stride + rows, to_stride - rows);
  }
}

template <class Line, class T, class Kernel>
void line(Kernel kernel, const float* a, const float* b, const float* bias, int64_t count, int has_relu, T* line) {
  T* to = fresh<T>(5, Line::length(count));
  kernel(copied(2, a, count), copied(3, b, count), copied(4, bias, count), count, has_relu, to);
  std::memcpy(line, to, size_t(Line::length(count)) * sizeof(T));
}

// The kernels of `isa`, guarded.
inline Isa wrap(const Isa* isa, bool is_at_end) {
  state().isa = isa;
  state().is_at_end = is_at_end;
  Isa wrapped = *isa;
  wrapped.slices_f32 = [](const uint8_t* blob, const LayerRecord* layer, const float* x, float* y, int lanes) {
    slices(state().isa->slices_f32, blob, layer, x, y, lanes);
  };
  if (isa->slices_bf16)
    wrapped.slices_bf16 = [](const uint8_t* blob, const LayerRecord* layer, const uint16_t* x, float* y, int lanes) {
      slices(state().isa->slices_bf16, blob, layer, x, y, lanes);
    };
  if (isa->slices_widened_bf16)
    wrapped.slices_widened_bf16 = [](const uint8_t* blob, const LayerRecord* layer, const float* x, float* y,
                                     int lanes) {
      slices(state().isa->slices_widened_bf16, blob, layer, x, y, lanes);
    };
  wrapped.table_f32 = [](const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride, int rows,
                         float* y, int64_t y_stride) {
    table<LineF32>(state().isa->table_f32, blob, layer, x, x_stride, rows, y, y_stride);
  };
  wrapped.table_bf16 = [](const uint8_t* blob, const LayerRecord* layer, const uint16_t* x, int64_t x_stride, int rows,
                          float* y, int64_t y_stride) {
    table<LineBf16>(state().isa->table_bf16, blob, layer, x, x_stride, rows, y, y_stride);
  };
  wrapped.table_s8 = [](const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride, int rows,
                        int32_t* y, int64_t y_stride) {
    table<LineS8>(state().isa->table_s8, blob, layer, x, x_stride, rows, y, y_stride);
  };
  wrapped.blocks_f32 = [](const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride, int64_t rows,
                          float* y, int64_t y_stride) {
    blocks(state().isa->blocks_f32, blob, layer, x, x_stride, rows, y, y_stride);
  };
  if (isa->blocks_bf16)
    wrapped.blocks_bf16 = [](const uint8_t* blob, const LayerRecord* layer, const uint16_t* x, int64_t x_stride,
                             int64_t rows, float* y, int64_t y_stride) {
      blocks(state().isa->blocks_bf16, blob, layer, x, x_stride, rows, y, y_stride);
    };
  if (isa->blocks_widened_bf16)
    wrapped.blocks_widened_bf16 = [](const uint8_t* blob, const LayerRecord* layer, const float* x, int64_t x_stride,
                                     int64_t rows, float* y, int64_t y_stride) {
      blocks(state().isa->blocks_widened_bf16, blob, layer, x, x_stride, rows, y, y_stride);
    };
  wrapped.blocks_s8 = [](const uint8_t* blob, const LayerRecord* layer, const uint8_t* x, int64_t x_stride,
                         int64_t rows, int32_t* y, int64_t y_stride) {
    blocks(state().isa->blocks_s8, blob, layer, x, x_stride, rows, y, y_stride);
  };
  wrapped.transpose_f32 = transpose_f32;
  wrapped.widen_bf16 = [](const uint16_t* from, int64_t count, float* to) {
    float* target = fresh<float>(5, count);
    state().isa->widen_bf16(copied(2, from, count), count, target);
    std::memcpy(to, target, size_t(count) * sizeof(float));
  };
  wrapped.round_bf16 = [](const float* from, int64_t count, uint16_t* to) {
    uint16_t* target = fresh<uint16_t>(5, count);
    state().isa->round_bf16(copied(2, from, count), count, target);
    std::memcpy(to, target, size_t(count) * sizeof(uint16_t));
  };
  wrapped.round_widened_bf16 = [](const float* from, int64_t count, float* to) {
    float* target = fresh<float>(5, count);
    state().isa->round_widened_bf16(copied(2, from, count), count, target);
    std::memcpy(to, target, size_t(count) * sizeof(float));
  };
  wrapped.codes_u8 = [](const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* to) {
    uint8_t* target = fresh<uint8_t>(5, count);
    const int has_nan = state().isa->codes_u8(copied(2, from, count), count, inverse_scale, zero_point, target);
    std::memcpy(to, target, size_t(count));
    return has_nan;
  };
  wrapped.recode_s32 = [](const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                          int has_relu, float inverse_scale, int32_t zero_point, uint8_t* to) {
    uint8_t* target = fresh<uint8_t>(5, count);
    state().isa->recode_s32(copied(1, a, count), copied(2, b, count), copied(3, scale, count), copied(4, bias, count),
                            count, has_relu, inverse_scale, zero_point, target);
    std::memcpy(to, target, size_t(count));
  };
  wrapped.add_f32 = [](const float* a, const float* b, const float* bias, int64_t count, int has_relu, float* to) {
    float* target = fresh<float>(5, count);
    state().isa->add_f32(copied(2, a, count), copied(3, b, count), copied(4, bias, count), count, has_relu, target);
    std::memcpy(to, target, size_t(count) * sizeof(float));
  };
  wrapped.add_s32 = [](const int32_t* a, const int32_t* b, int64_t count, int32_t* to) {
    int32_t* target = fresh<int32_t>(5, count);
    state().isa->add_s32(copied(2, a, count), copied(3, b, count), count, target);
    std::memcpy(to, target, size_t(count) * sizeof(int32_t));
  };
  wrapped.activate = [](uint32_t activation, float slope, float* values, int64_t count) {
    float* target = const_cast<float*>(copied(5, values, count));
    state().isa->activate(activation, slope, target, count);
    std::memcpy(values, target, size_t(count) * sizeof(float));
  };
  wrapped.leaky_relu = [](const float* slopes, float* values, int64_t count) {
    float* target = const_cast<float*>(copied(5, values, count));
    state().isa->leaky_relu(copied(2, slopes, count), target, count);
    std::memcpy(values, target, size_t(count) * sizeof(float));
  };
  wrapped.dice = [](const float* constants, int64_t stride, int is_one, float* values, int64_t count) {
    float* target = const_cast<float*>(copied(5, values, count));
    state().isa->dice(copied(2, constants, 2 * stride + (is_one ? 1 : count)), stride, is_one, target, count);
    std::memcpy(values, target, size_t(count) * sizeof(float));
  };
  wrapped.line_f32 = [](const float* a, const float* b, const float* bias, int64_t count, int has_relu, float* to) {
    line<LineF32>(state().isa->line_f32, a, b, bias, count, has_relu, to);
  };
  wrapped.line_bf16 = [](const float* a, const float* b, const float* bias, int64_t count, int has_relu, uint16_t* to) {
    line<LineBf16>(state().isa->line_bf16, a, b, bias, count, has_relu, to);
  };
  wrapped.dequantize_s32 = [](const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                              float* to) {
    float* target = fresh<float>(5, count);
    state().isa->dequantize_s32(copied(1, a, count), copied(2, b, count), copied(3, scale, count),
                                copied(4, bias, count), count, target);
    std::memcpy(to, target, size_t(count) * sizeof(float));
  };
  wrapped.line_u8 = [](const float* from, int64_t count, float inverse_scale, int32_t zero_point, uint8_t* to) {
    uint8_t* target = fresh<uint8_t>(5, LineS8::length(count));
    const int has_nan = state().isa->line_u8(copied(2, from, count), count, inverse_scale, zero_point, target);
    std::memcpy(to, target, size_t(LineS8::length(count)));
    return has_nan;
  };
  wrapped.requantize_s32 = [](const int32_t* a, const int32_t* b, const float* scale, const float* bias, int64_t count,
                              int has_relu, float inverse_scale, int32_t zero_point, uint8_t* to) {
    uint8_t* target = fresh<uint8_t>(5, LineS8::length(count));
    state().isa->requantize_s32(copied(1, a, count), copied(2, b, count), copied(3, scale, count),
                                copied(4, bias, count), count, has_relu, inverse_scale, zero_point, target);
    std::memcpy(to, target, size_t(LineS8::length(count)));
  };
  return wrapped;
}

}  // namespace guarded

#endif
