// The call: cuts the batch into pieces, spreads them over threads, and takes each through every task's layers.
#include <omp.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "engine.h"

namespace {

struct Network {
  const Isa* isa;
  const uint8_t* blob;
  const BlobHeader* header;
  const LayerRecord* layers;

  const float* floats(uint64_t section) const { return reinterpret_cast<const float*>(blob + section); }
  const uint32_t* parts(const LayerRecord& layer) const {
    return reinterpret_cast<const uint32_t*>(blob + layer.parts);
  }
  // Sums of tables hold the bias already; what is combined from parts lacks it.
  const float* missing_bias(const LayerRecord& layer) const {
    return layer.kind == LAYER_COMBINED ? floats(layer.bias) : nullptr;
  }
};

// While it lives, denormals count as zero, as bfloat16 arithmetic is defined. Other processors' kernels see to it
// themselves.
class FlushedDenormals {
 public:
  explicit FlushedDenormals(bool is_wanted) : before_(control()) {
    if (is_wanted) set_control(before_ | kFlush);
  }
  ~FlushedDenormals() { set_control(before_); }
  FlushedDenormals(const FlushedDenormals&) = delete;
  FlushedDenormals& operator=(const FlushedDenormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8000 | 0x0040;  // results, operands
  static uint64_t control() { return _mm_getcsr(); }
  static void set_control(uint64_t bits) { _mm_setcsr(unsigned(bits)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = 1 << 24;  // FZ: results and operands
  static uint64_t control() {
    uint64_t bits;
    asm volatile("mrs %0, fpcr" : "=r"(bits));
    return bits;
  }
  // "memory": neither a load nor a store moves past it.
  static void set_control(uint64_t bits) { asm volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t control() { return 0; }
  static void set_control(uint64_t) {}
#endif

  uint64_t before_;
};

// Aligned pieces of one thread's scratch memory, which stays with the thread: to get as much from the system and give
// it back takes longer than a small call does. Its contents mean nothing from one call to the next.
class Arena {
 public:
  static Arena& of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }
  ~Arena() { std::free(memory_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Takes all pieces back; false where there is no memory.
  bool reset(int64_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      memory_ = static_cast<char*>(std::aligned_alloc(64, size_t(rounded(bytes))));
      bytes_ = memory_ ? bytes : 0;
    }
    free_ = memory_;
    return memory_ != nullptr;
  }
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(free_);
    free_ += rounded(count * int64_t{sizeof(T)});
    return piece;
  }

 private:
  Arena() = default;
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  char *memory_ = nullptr, *free_ = nullptr;
  int64_t bytes_ = 0;
};

// Where exp overflows the quotient is 0, as it should be.
float sigmoid(float v) { return 1 / (1 + std::exp(-v)); }

// --- Tables: up to MAX_ROWS rows of the batch, each in a line of its own -------------------------------------------

// What tables need to know of a precision. A layer's `Value`s become the next one's `Activation`s.
struct LinesF32 {
  using Activation = float;
  using Value = float;
  static constexpr int64_t kWindow = WINDOW_F32;
  static int64_t positions(int64_t features) { return line_position(features, GAP_F32) + 1; }

  static bool load(const Network& net, const LayerRecord&, const float* x, int64_t count, float* line) {
    net.isa->line_f32(x, nullptr, nullptr, count, false, line);
    return false;
  }
  static void multiply(const Network& net, const LayerRecord& layer, const float* x, int64_t x_stride, int rows,
                       float* y, int64_t y_stride) {
    net.isa->table_f32(net.blob, &layer, x, x_stride, rows, y, y_stride);
  }
  static void next(const Network& net, const LayerRecord& layer, const float* a, const float* b, const LayerRecord&,
                   float* line) {
    const float* bias = net.missing_bias(layer);
    net.isa->line_f32(a, b, bias, padded(layer.out_features), layer.activation == ACTIVATION_RELU, line);
  }
  static void head(const Network& net, const LayerRecord& layer, const float* a, const float* b, float* to) {
    const float* bias = net.missing_bias(layer);
    net.isa->add_f32(a, b, bias, layer.out_features, layer.activation == ACTIVATION_RELU, to);
  }
  static void add(const Network& net, const float* a, const float* b, int64_t count, float* to) {
    net.isa->add_f32(a, b, nullptr, count, false, to);
  }
};

struct LinesBf16 : LinesF32 {
  using Activation = uint16_t;
  static constexpr int64_t kWindow = WINDOW_BF16;
  static int64_t positions(int64_t features) { return line_position(features, GAP_BF16) + 1; }

  static bool load(const Network& net, const LayerRecord&, const float* x, int64_t count, uint16_t* line) {
    net.isa->line_bf16(x, nullptr, nullptr, count, false, line);
    return false;
  }
  static void multiply(const Network& net, const LayerRecord& layer, const uint16_t* x, int64_t x_stride, int rows,
                       float* y, int64_t y_stride) {
    net.isa->table_bf16(net.blob, &layer, x, x_stride, rows, y, y_stride);
  }
  static void next(const Network& net, const LayerRecord& layer, const float* a, const float* b, const LayerRecord&,
                   uint16_t* line) {
    const float* bias = net.missing_bias(layer);
    net.isa->line_bf16(a, b, bias, padded(layer.out_features), layer.activation == ACTIVATION_RELU, line);
  }
};

struct LinesS8 {
  using Activation = uint8_t;
  using Value = int32_t;
  static constexpr int64_t kWindow = WINDOW_S8;
  static int64_t positions(int64_t features) { return 2 * (features + HALF_S8); }

  static bool load(const Network& net, const LayerRecord& layer, const float* x, int64_t count, uint8_t* line) {
    return net.isa->line_u8(x, count, layer.inverse_scale, layer.zero_point, line);
  }
  static void multiply(const Network& net, const LayerRecord& layer, const uint8_t* x, int64_t x_stride, int rows,
                       int32_t* y, int64_t y_stride) {
    net.isa->table_s8(net.blob, &layer, x, x_stride, rows, y, y_stride);
  }
  static void next(const Network& net, const LayerRecord& layer, const int32_t* a, const int32_t* b,
                   const LayerRecord& following, uint8_t* line) {
    net.isa->requantize_s32(a, b, net.floats(layer.scale), net.floats(layer.bias), padded(layer.out_features),
                            layer.activation == ACTIVATION_RELU, following.inverse_scale, following.zero_point, line);
  }
  static void head(const Network& net, const LayerRecord& layer, const int32_t* a, const int32_t* b, float* to) {
    net.isa->dequantize_s32(a, b, net.floats(layer.scale), net.floats(layer.bias), layer.out_features, to);
    if (layer.activation == ACTIVATION_RELU) net.isa->add_f32(to, nullptr, nullptr, layer.out_features, true, to);
  }
  static void add(const Network&, const int32_t* a, const int32_t* b, int64_t count, int32_t* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = a[i] + b[i];
  }
};

template <class Lines>
class TablePath {
  using Activation = typename Lines::Activation;
  using Value = typename Lines::Value;

 public:
  // A line, its gaps, and the window that may hang over its end; a multiple of 64 bytes.
  static int64_t line_length(int64_t features) {
    return (Lines::positions(features) + Lines::kWindow + 63) / 64 * 64;
  }
  static int64_t scratch_bytes(const BlobHeader& header) {
    const int64_t lines = line_length(header.in_features) + 2 * line_length(header.hidden_features);
    const int64_t values = header.hidden_features + header.shared_features;
    return MAX_ROWS * (lines * int64_t{sizeof(Activation)} + values * int64_t{sizeof(Value)}) +
           (header.in_features + header.hidden_features + 64) * int64_t{sizeof(float)} + 6 * 64;
  }

  TablePath(const Network& net, Arena& arena)
      : net_(net), input_stride_(line_length(net.header->in_features)),
        hidden_stride_(line_length(net.header->hidden_features)) {
    input_ = arena.take<Activation>(MAX_ROWS * input_stride_);
    hidden_[0] = arena.take<Activation>(MAX_ROWS * hidden_stride_);
    hidden_[1] = arena.take<Activation>(MAX_ROWS * hidden_stride_);
    values_ = arena.take<Value>(MAX_ROWS * int64_t{net.header->hidden_features});
    shared_ = arena.take<Value>(MAX_ROWS * int64_t{net.header->shared_features});
    real_ = arena.take<float>(net.header->in_features + net.header->hidden_features);
  }

  // Rows [begin, begin + rows) of the batch, at most MAX_ROWS of them.
  void run(const SparseMlpCall& call, int64_t begin, int rows) {
    bool has_nan[MAX_ROWS];
    for (int r = 0; r < rows; ++r) has_nan[r] = load(call, begin + r, input_ + r * input_stride_);
    const Activation* x = input_;
    int64_t x_stride = input_stride_, column = 0;
    for (uint32_t i = 0; i < net_.header->layers; ++i) {
      const LayerRecord& layer = net_.layers[i];
      if (layer.kind == LAYER_SHARED) {
        Lines::multiply(net_, layer, x, x_stride, rows, shared_, net_.header->shared_features);
        continue;
      }
      if (layer.kind == LAYER_LINEAR)
        Lines::multiply(net_, layer, x, x_stride, rows, values_, net_.header->hidden_features);
      for (int r = 0; r < rows; ++r) {
        const Value *a = values_ + r * int64_t{net_.header->hidden_features}, *b = nullptr;
        if (layer.kind == LAYER_COMBINED) combine(layer, r, a, b);
        Activation* line = hidden_[i % 2] + r * hidden_stride_;
        if (!layer.is_head && layer.activation == ACTIVATION_SIGMOID) {
          Lines::head(net_, layer, a, b, real_);
          for (uint32_t j = 0; j < layer.out_features; ++j) real_[j] = sigmoid(real_[j]);
          Lines::load(net_, net_.layers[i + 1], real_, layer.out_features, line);
        } else if (!layer.is_head) {
          Lines::next(net_, layer, a, b, net_.layers[i + 1], line);
        } else {
          float* to = call.out + (begin + r) * call.out_stride + column;
          Lines::head(net_, layer, a, b, to);
          for (uint32_t j = 0; j < layer.out_features; ++j) {
            if (layer.activation == ACTIVATION_SIGMOID) to[j] = sigmoid(to[j]);
            if (has_nan[r]) to[j] = std::numeric_limits<float>::quiet_NaN();  // int8 codes have none
          }
        }
      }
      x = layer.is_head ? input_ : hidden_[i % 2];
      x_stride = layer.is_head ? input_stride_ : hidden_stride_;
      if (layer.is_head) column += layer.out_features;
    }
  }

 private:
  bool load(const SparseMlpCall& call, int64_t row, Activation* line) {
    const int64_t count = call.in_features;
    const float* x = static_cast<const float*>(call.x) + row * call.x_stride;
    if (call.is_bf16) {
      net_.isa->widen_bf16(static_cast<const uint16_t*>(call.x) + row * call.x_stride, count, real_);
      x = real_;
    }
    return Lines::load(net_, net_.layers[0], x, count, line);
  }

  // The parts of one row as a sum of two, or one.
  void combine(const LayerRecord& layer, int row, const Value*& a, const Value*& b) const {
    const Value* parts = shared_ + row * int64_t{net_.header->shared_features};
    const auto part = [&](uint32_t p) { return parts + int64_t{net_.parts(layer)[p]} * layer.part_features; };
    Value* sum = values_ + row * int64_t{net_.header->hidden_features};
    a = part(0);
    for (uint32_t p = 1; p + 1 < layer.part_count; ++p) {
      Lines::add(net_, a, part(p), layer.part_features, sum);
      a = sum;
    }
    if (layer.part_count > 1) b = part(layer.part_count - 1);
  }

  const Network& net_;
  int64_t input_stride_, hidden_stride_;
  Activation *input_, *hidden_[2];
  Value *values_, *shared_;
  float* real_;  // one row of float32 on its way
};

// --- Slices: tiles of rows of the batch, transposed ----------------------------------------------------------------

struct TilesF32 {
  using Activation = float;
  static constexpr bool kIsRounded = false;
  static const float* rounded(const Network&, const float* tile, int64_t, float*) { return tile; }
  static void multiply(const Network& net, const LayerRecord& layer, const float* x, float* y, int lanes) {
    net.isa->slices_f32(net.blob, &layer, x, y, lanes);
  }
};
template <class T, auto kKernel, auto kRound>
struct TilesRounded {
  using Activation = T;
  static constexpr bool kIsRounded = true;
  static const T* rounded(const Network& net, const float* tile, int64_t count, T* to) {
    (net.isa->*kRound)(tile, count, to);
    return to;
  }
  static void multiply(const Network& net, const LayerRecord& layer, const T* x, float* y, int lanes) {
    (net.isa->*kKernel)(net.blob, &layer, x, y, lanes);
  }
};
using TilesBf16 = TilesRounded<uint16_t, &Isa::slices_bf16, &Isa::round_bf16>;
using TilesWidenedBf16 = TilesRounded<float, &Isa::slices_widened_bf16, &Isa::round_widened_bf16>;

template <class Tiles>
class SlicePath {
  using Activation = typename Tiles::Activation;

 public:
  static int64_t scratch_bytes(const BlobHeader& header, int lanes) {
    const int64_t stride = lane_stride(lanes), input = tile_rows(header.in_features) * stride;
    const int64_t hidden = tile_rows(header.hidden_features) * stride;
    const int64_t shared = tile_rows(header.shared_features) * stride;
    return (input + 2 * hidden + shared) * int64_t{sizeof(float)} + (input + hidden) * int64_t{sizeof(Activation)} +
           MAX_ROWS * header.in_features * int64_t{sizeof(float)} + 8 * 64;
  }

  SlicePath(const Network& net, Arena& arena, int lanes) : net_(net) {
    const BlobHeader& header = *net.header;
    const int64_t stride = lane_stride(lanes);
    input_ = arena.take<float>(tile_rows(header.in_features) * stride);
    for (float*& hidden : hidden_) hidden = arena.take<float>(tile_rows(header.hidden_features) * stride);
    shared_ = arena.take<float>(tile_rows(header.shared_features) * stride);
    widened_ = arena.take<float>(MAX_ROWS * int64_t{header.in_features});
    if (!Tiles::kIsRounded) return;
    rounded_input_ = arena.take<Activation>(tile_rows(header.in_features) * stride);
    rounded_hidden_ = arena.take<Activation>(tile_rows(header.hidden_features) * stride);
  }

  // Rows [begin, begin + rows) of the batch, at most `lanes` of them.
  void run(const SparseMlpCall& call, int64_t begin, int64_t rows, int lanes) {
    load(call, begin, rows, lanes);
    const Activation* input =
        Tiles::rounded(net_, input_, tile_rows(call.in_features) * lane_stride(lanes), rounded_input_);
    const Activation* x = input;
    int64_t column = 0;
    for (uint32_t i = 0; i < net_.header->layers; ++i) {
      const LayerRecord& layer = net_.layers[i];
      if (layer.kind == LAYER_SHARED) {
        Tiles::multiply(net_, layer, x, shared_, lanes);
        continue;
      }
      float* y = hidden_[i % 2];
      if (layer.kind == LAYER_LINEAR)
        Tiles::multiply(net_, layer, x, y, lanes);
      else
        combine(layer, y, lanes);
      if (layer.activation == ACTIVATION_SIGMOID) apply_sigmoid(layer, rows, lanes, y);
      if (layer.is_head) {
        store(call, begin, rows, lanes, layer, column, y);
        column += layer.out_features;
        x = input;
      } else {
        x = Tiles::rounded(net_, y, tile_rows(layer.out_features) * lane_stride(lanes), rounded_hidden_);
      }
    }
  }

 private:
  // Rows of x -> a tile. Lanes past `rows` become zeros: they are computed and dropped, and whatever stood there
  // before might be denormal, which is slow.
  void load(const SparseMlpCall& call, int64_t begin, int64_t rows, int lanes) {
    const int64_t in_features = call.in_features, stride = lane_stride(lanes);
    if (rows < lanes) std::memset(input_, 0, size_t(tile_rows(in_features) * stride) * sizeof(float));
    // MAX_ROWS rows at a time, for bfloat16 is widened on the way.
    for (int64_t first = 0; first < rows; first += MAX_ROWS) {
      const int64_t count = rows - first < MAX_ROWS ? rows - first : int64_t{MAX_ROWS};
      const float* from = static_cast<const float*>(call.x) + (begin + first) * call.x_stride;
      int64_t from_stride = call.x_stride;
      if (call.is_bf16) {
        const uint16_t* x = static_cast<const uint16_t*>(call.x) + (begin + first) * call.x_stride;
        for (int64_t r = 0; r < count; ++r)
          net_.isa->widen_bf16(x + r * call.x_stride, in_features, widened_ + r * in_features);
        from = widened_;
        from_stride = in_features;
      }
      for (int64_t feature = 0; feature < in_features; feature += BLOCK_FEATURES) {
        float* to = input_ + tile_row(feature) * stride;
        std::memset(to - stride, 0, size_t(stride) * sizeof(float));
        net_.isa->transpose_f32(from + feature, from_stride, count, block_features(in_features, feature), to + first,
                                stride);
      }
    }
  }

  // A head's tile -> rows [begin, begin + rows) of out, from `column` on.
  void store(const SparseMlpCall& call, int64_t begin, int64_t rows, int lanes, const LayerRecord& head, int64_t column,
             const float* tile) const {
    const int64_t out_features = head.out_features, stride = lane_stride(lanes);
    for (int64_t feature = 0; feature < out_features; feature += BLOCK_FEATURES) {
      const int64_t features = block_features(out_features, feature);
      net_.isa->transpose_f32(tile + tile_row(feature) * stride, stride, features, rows,
                              call.out + begin * call.out_stride + column + feature, call.out_stride);
    }
  }

  // In place, features only: the rows of zeros must stay zeros.
  static void apply_sigmoid(const LayerRecord& layer, int64_t rows, int lanes, float* tile) {
    for (int64_t feature = 0; feature < layer.out_features; ++feature) {
      float* row = tile + tile_row(feature) * lane_stride(lanes);
      for (int64_t lane = 0; lane < rows; ++lane) row[lane] = sigmoid(row[lane]);
    }
  }

  // The sum of the parts, lane by lane; the bias is the same for all of them.
  void combine(const LayerRecord& layer, float* y, int lanes) const {
    const int64_t stride = lane_stride(lanes);
    const float* bias = net_.floats(layer.bias);
    const uint32_t *parts = net_.parts(layer), last = layer.part_count - 1;
    for (int64_t row = 0; row < tile_rows(layer.out_features); row += BLOCK_FEATURES + 1)
      std::memset(y + row * stride, 0, size_t(stride) * sizeof(float));
    for (int64_t feature = 0; feature < layer.out_features; ++feature) {
      const auto part = [&](uint32_t p) {
        return shared_ + tile_row(int64_t{parts[p]} * layer.part_features + feature) * stride;
      };
      float biases[64];
      for (int lane = 0; lane < lanes; ++lane) biases[lane] = bias[feature];
      float* to = y + tile_row(feature) * stride;
      const float* sum = part(0);
      for (uint32_t p = 1; p < last; ++p) {
        net_.isa->add_f32(sum, part(p), nullptr, lanes, false, to);
        sum = to;
      }
      net_.isa->add_f32(sum, last ? part(last) : nullptr, biases, lanes, layer.activation == ACTIVATION_RELU, to);
    }
  }

  const Network& net_;
  float *input_, *hidden_[2], *shared_, *widened_;
  Activation *rounded_input_ = nullptr, *rounded_hidden_ = nullptr;
};

// --- Blocks: rows of the batch as they come ------------------------------------------------------------------------

// What blocks need to know of a precision. A layer's `Value`s are floats with its activation applied, or int8's sums;
// they become the next layer's `Activation`s, row by row.
struct RowsF32 {
  using Activation = float;
  using Value = float;
  static constexpr bool kReadsX = true, kReadsValues = true;  // as they stand in memory

  static bool load(const Network&, const LayerRecord&, const float* x, int64_t count, float* line) {
    std::memcpy(line, x, size_t(count) * sizeof(float));
    return false;
  }
  static void multiply(const Network& net, const LayerRecord& layer, const float* x, int64_t x_stride, int64_t rows,
                       float* y, int64_t y_stride) {
    net.isa->blocks_f32(net.blob, &layer, x, x_stride, rows, y, y_stride);
  }
  static void next(const Network&, const LayerRecord&, const float*, const LayerRecord&, float*) {}
  static void add(const Network& net, const LayerRecord& layer, const float* a, const float* b, bool is_sum,
                  float* to) {
    net.isa->add_f32(a, b, is_sum ? net.floats(layer.bias) : nullptr, layer.part_features,
                     is_sum && layer.activation == ACTIVATION_RELU, to);
  }
  static void real(const Network&, const LayerRecord& layer, const float* y, float* to) {
    std::memcpy(to, y, layer.out_features * sizeof(float));
  }
};

template <class T, auto kKernel, auto kRound>
struct RowsRounded : RowsF32 {
  using Activation = T;
  static constexpr bool kReadsX = false, kReadsValues = false;

  static bool load(const Network& net, const LayerRecord&, const float* x, int64_t count, T* line) {
    (net.isa->*kRound)(x, count, line);
    return false;
  }
  static void multiply(const Network& net, const LayerRecord& layer, const T* x, int64_t x_stride, int64_t rows,
                       float* y, int64_t y_stride) {
    (net.isa->*kKernel)(net.blob, &layer, x, x_stride, rows, y, y_stride);
  }
  static void next(const Network& net, const LayerRecord& layer, const float* y, const LayerRecord&, T* line) {
    (net.isa->*kRound)(y, layer.out_features, line);
  }
};
using RowsBf16 = RowsRounded<uint16_t, &Isa::blocks_bf16, &Isa::round_bf16>;
using RowsWidenedBf16 = RowsRounded<float, &Isa::blocks_widened_bf16, &Isa::round_widened_bf16>;

struct RowsS8 {
  using Activation = uint8_t;
  using Value = int32_t;
  static constexpr bool kReadsX = false, kReadsValues = false;

  static bool load(const Network& net, const LayerRecord& layer, const float* x, int64_t count, uint8_t* line) {
    return net.isa->codes_u8(x, count, layer.inverse_scale, layer.zero_point, line);
  }
  static void multiply(const Network& net, const LayerRecord& layer, const uint8_t* x, int64_t x_stride, int64_t rows,
                       int32_t* y, int64_t y_stride) {
    net.isa->blocks_s8(net.blob, &layer, x, x_stride, rows, y, y_stride);
  }
  static void next(const Network& net, const LayerRecord& layer, const int32_t* y, const LayerRecord& following,
                   uint8_t* line) {
    net.isa->recode_s32(y, nullptr, net.floats(layer.scale), net.floats(layer.bias), layer.out_features,
                        layer.activation == ACTIVATION_RELU, following.inverse_scale, following.zero_point, line);
  }
  static void add(const Network&, const LayerRecord& layer, const int32_t* a, const int32_t* b, bool, int32_t* to) {
    for (uint32_t i = 0; i < layer.part_features; ++i) to[i] = b ? a[i] + b[i] : a[i];
  }
  static void real(const Network& net, const LayerRecord& layer, const int32_t* y, float* to) {
    net.isa->dequantize_s32(y, nullptr, net.floats(layer.scale), net.floats(layer.bias), layer.out_features, to);
    if (layer.activation == ACTIVATION_RELU) net.isa->add_f32(to, nullptr, nullptr, layer.out_features, true, to);
  }
};

template <class Rows>
class BlockPath {
  using Activation = typename Rows::Activation;
  using Value = typename Rows::Value;

 public:
  // So many rows' activations fit the second cache beside a piece of the weights.
  static constexpr int64_t kMostRows = 48;
  static constexpr int64_t kCachedBytes = 4 << 20;  // of x: most processors' last cache has as many per core

  static int64_t scratch_bytes(const BlobHeader& header, int64_t rows) {
    const int64_t lines = line_length(header.in_features) + line_length(header.hidden_features);
    const int64_t values = 2 * line_length(header.hidden_features) + line_length(header.shared_features);
    return rows * (lines * int64_t{sizeof(Activation)} + values * int64_t{sizeof(Value)}) +
           (header.in_features + header.hidden_features + 64) * int64_t{sizeof(float)} + 6 * 64;
  }

  BlockPath(const Network& net, Arena& arena, int64_t rows)
      : net_(net), input_stride_(line_length(net.header->in_features)),
        hidden_stride_(line_length(net.header->hidden_features)),
        shared_stride_(line_length(net.header->shared_features)) {
    input_ = arena.take<Activation>(rows * input_stride_);
    hidden_ = arena.take<Activation>(rows * hidden_stride_);
    for (Value*& values : values_) values = arena.take<Value>(rows * hidden_stride_);
    shared_ = arena.take<Value>(rows * shared_stride_);
    real_ = arena.take<float>(net.header->in_features + net.header->hidden_features);
  }

  // Rows [begin, begin + rows) of the batch.
  void run(const SparseMlpCall& call, int64_t begin, int64_t rows) {
    bool has_nan[kMostRows] = {};
    const Activation* input = input_;
    int64_t input_stride = input_stride_;
    // Beyond the caches rows are copied first, one after the other: blocks would fetch them from memory here and there.
    const bool is_cached = call.batch * call.in_features * int64_t{sizeof(float)} <= kCachedBytes;
    if (Rows::kReadsX && !call.is_bf16 && call.in_features % QUAD == 0 && is_cached) {
      input = static_cast<const Activation*>(call.x) + begin * call.x_stride;
      input_stride = call.x_stride;
    } else {
      for (int64_t r = 0; r < rows; ++r) has_nan[r] = load(call, begin + r, input_ + r * input_stride_);
    }
    const Activation* x = input;
    int64_t x_stride = input_stride, column = 0;
    for (uint32_t i = 0; i < net_.header->layers; ++i) {
      const LayerRecord& layer = net_.layers[i];
      if (layer.kind == LAYER_SHARED) {
        Rows::multiply(net_, layer, x, x_stride, rows, shared_, shared_stride_);
        continue;
      }
      Value* y = values_[i % 2];
      if (layer.kind == LAYER_LINEAR) Rows::multiply(net_, layer, x, x_stride, rows, y, hidden_stride_);
      for (int64_t r = 0; r < rows; ++r) {
        Value* of_row = y + r * hidden_stride_;
        if (layer.kind == LAYER_COMBINED) combine(layer, shared_ + r * shared_stride_, of_row);
        if (layer.is_head) {
          float* to = call.out + (begin + r) * call.out_stride + column;
          Rows::real(net_, layer, of_row, to);
          if (layer.activation == ACTIVATION_SIGMOID) apply_sigmoid(layer, to);
          if (has_nan[r])  // int8 codes have none
            for (uint32_t j = 0; j < layer.out_features; ++j) to[j] = std::numeric_limits<float>::quiet_NaN();
        } else {
          pass_on(layer, net_.layers[i + 1], of_row, hidden_ + r * hidden_stride_);
        }
      }
      x = layer.is_head ? input : next_input(y);
      x_stride = layer.is_head ? input_stride : hidden_stride_;
      if (layer.is_head) column += layer.out_features;
    }
  }

 private:
  // A row's features, in whole groups. Lines of a power of two bytes would meet in the same few places of the cache.
  static int64_t line_length(int64_t features) { return padded(features) + 64; }

  const Activation* next_input(const Value* y) const {
    if constexpr (Rows::kReadsValues) return y;
    return hidden_;
  }

  bool load(const SparseMlpCall& call, int64_t row, Activation* line) {
    const int64_t count = call.in_features;
    const float* x = static_cast<const float*>(call.x) + row * call.x_stride;
    if (call.is_bf16) {
      net_.isa->widen_bf16(static_cast<const uint16_t*>(call.x) + row * call.x_stride, count, real_);
      x = real_;
    }
    clear_edge(count, line);
    return Rows::load(net_, net_.layers[0], x, count, line);
  }

  void pass_on(const LayerRecord& layer, const LayerRecord& following, Value* y, Activation* line) {
    if (layer.activation == ACTIVATION_SIGMOID) {
      Rows::real(net_, layer, y, real_);
      apply_sigmoid(layer, real_);
      if constexpr (Rows::kReadsValues)
        std::memcpy(y, real_, layer.out_features * sizeof(float));
      else
        Rows::load(net_, following, real_, layer.out_features, line);
    } else {
      Rows::next(net_, layer, y, following, line);
    }
    if constexpr (Rows::kReadsValues)
      clear_edge(layer.out_features, y);
    else
      clear_edge(layer.out_features, line);
  }

  // Activations beyond the last feature of a quad meet weights of 0, and must not be Inf or NaN.
  static void clear_edge(int64_t features, Activation* line) {
    for (int64_t i = features; i < quad_count(features) * QUAD; ++i) line[i] = 0;
  }

  static void apply_sigmoid(const LayerRecord& layer, float* values) {
    for (uint32_t j = 0; j < layer.out_features; ++j) values[j] = sigmoid(values[j]);
  }

  void combine(const LayerRecord& layer, const Value* shared, Value* to) const {
    const auto part = [&](uint32_t p) { return shared + int64_t{net_.parts(layer)[p]} * layer.part_features; };
    const Value* sum = part(0);
    for (uint32_t p = 1; p + 1 < layer.part_count; ++p) {
      Rows::add(net_, layer, sum, part(p), false, to);
      sum = to;
    }
    Rows::add(net_, layer, sum, layer.part_count > 1 ? part(layer.part_count - 1) : nullptr, true, to);
  }

  const Network& net_;
  int64_t input_stride_, hidden_stride_, shared_stride_;
  Activation *input_, *hidden_;
  Value *values_[2], *shared_;
  float* real_;  // one row of float32 on its way
};

// --- The plan of a call ----------------------------------------------------------------------------------------------

// How wide a tile can be, and its measured time, in quarters of a 16-lane tile's: wide tiles are cheap, for they fetch
// each weight and offset once for more rows.
struct Width {
  int lanes, cost;
};
constexpr Width kWidths[] = {{1, 2}, {8, 4}, {16, 4}, {32, 6}, {64, 10}};
constexpr const Width* kWidest = kWidths + 4;

const Width& narrowest_for(int64_t rows, const Width* narrowest) {
  const Width* width = narrowest;
  while (width->lanes < rows) ++width;
  return *width;
}

// The lanes of all tiles but the last, which takes no more than it needs: those for which the busiest thread is done
// first. Wide tiles leave threads idle in a small batch.
int choose_lanes(int64_t batch, int64_t threads, const Width* narrowest) {
  int best = 0;
  int64_t best_cost = INT64_MAX;
  for (const Width* width = narrowest; width <= kWidest; ++width) {
    const int64_t full = batch / width->lanes, rest = batch % width->lanes;
    const int64_t last = full % threads ? width->cost : rest ? narrowest_for(rest, narrowest).cost : 0;
    const int64_t cost = full / threads * width->cost + last;
    if (cost <= best_cost) best = width->lanes, best_cost = cost;
  }
  return batch < best ? narrowest_for(batch, narrowest).lanes : best;
}

// How many threads to take of those offered. Half a million multiply-adds of float32 take some 20 us, as long as waking
// a team may; int8 is four times as fast. More threads than processors only wait for each other, and libgomp ends the
// process where it cannot start one.
int64_t choose_threads(const BlobHeader& header, const SparseMlpCall& call) {
  const int64_t enough = header.precision == PRECISION_S8 ? 2'000'000 : 500'000;
  if (call.threads == 1 || int64_t(header.multiply_adds) * call.batch < enough) return 1;
  const int64_t processors = omp_get_num_procs();
  return call.threads < processors ? call.threads : processors;
}

// Runs `piece(i, path)` for i < pieces, each thread with a path and scratch memory of its own.
template <class Path, class MakePath, class Piece>
int for_each_piece(int64_t pieces, int64_t threads, int64_t scratch_bytes, bool flushes, MakePath make, Piece piece) {
  if (threads == 1 || pieces == 1) {
    const FlushedDenormals flushed(flushes);
    Arena& arena = Arena::of_this_thread();
    if (!arena.reset(scratch_bytes)) return STATUS_NO_MEMORY;
    Path path = make(arena);
    for (int64_t i = 0; i < pieces; ++i) piece(i, path);
    return STATUS_OK;
  }
  std::atomic<int> status{STATUS_OK};
#pragma omp parallel num_threads(int(pieces < threads ? pieces : threads))
  {
    const FlushedDenormals flushed(flushes);
    Arena& arena = Arena::of_this_thread();
    const bool has_memory = arena.reset(scratch_bytes);
    if (!has_memory) status = STATUS_NO_MEMORY;
    Path path = make(arena);  // of null pointers where there is no memory
    // Every thread must meet the loop, with memory or without.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < pieces; ++i)
      if (has_memory) piece(i, path);
  }
  return status;
}

template <class Lines>
int run_tables(const Network& net, const SparseMlpCall& call, bool flushes) {
  const int64_t threads = choose_threads(*net.header, call);
  // As many rows at a time as there are, in equal parts for the threads.
  int64_t rows = (call.batch + threads - 1) / threads;
  if (rows > MAX_ROWS) rows = MAX_ROWS;
  const auto make = [&](Arena& arena) { return TablePath<Lines>(net, arena); };
  return for_each_piece<TablePath<Lines>>(
      (call.batch + rows - 1) / rows, threads, TablePath<Lines>::scratch_bytes(*net.header), flushes, make,
      [&](int64_t i, TablePath<Lines>& path) {
        const int64_t begin = i * rows, left = call.batch - begin;
        path.run(call, begin, int(left < rows ? left : rows));
      });
}

template <class Tiles>
int run_slices(const Network& net, const SparseMlpCall& call, bool flushes) {
  const int64_t threads = choose_threads(*net.header, call);
  // A register of bfloat16 holds 32 lanes.
  const Width* narrowest = sizeof(typename Tiles::Activation) == sizeof(float) ? kWidths : kWidths + 3;
  const int lanes = choose_lanes(call.batch, threads, narrowest);
  const auto make = [&](Arena& arena) { return SlicePath<Tiles>(net, arena, lanes); };
  return for_each_piece<SlicePath<Tiles>>(
      (call.batch + lanes - 1) / lanes, threads, SlicePath<Tiles>::scratch_bytes(*net.header, lanes), flushes, make,
      [&](int64_t i, SlicePath<Tiles>& path) {
        const int64_t begin = i * lanes, left = call.batch - begin, rows = left < lanes ? left : lanes;
        path.run(call, begin, rows, narrowest_for(rows, narrowest).lanes);
      });
}

template <class Rows>
int run_blocks(const Network& net, const SparseMlpCall& call, bool flushes) {
  const int64_t threads = choose_threads(*net.header, call);
  // Equal parts for the threads.
  const int64_t most = BlockPath<Rows>::kMostRows * threads;
  const int64_t parts = (call.batch + most - 1) / most * threads, rows = (call.batch + parts - 1) / parts;
  const auto make = [&](Arena& arena) { return BlockPath<Rows>(net, arena, rows); };
  return for_each_piece<BlockPath<Rows>>(
      (call.batch + rows - 1) / rows, threads, BlockPath<Rows>::scratch_bytes(*net.header, rows), flushes, make,
      [&](int64_t i, BlockPath<Rows>& path) {
        const int64_t begin = i * rows, left = call.batch - begin;
        path.run(call, begin, left < rows ? left : rows);
      });
}

int run_blocks(const Network& net, const SparseMlpCall& call) {
  switch (net.header->precision) {
    case PRECISION_F32: return run_blocks<RowsF32>(net, call, false);
    case PRECISION_BF16:
      return net.isa->blocks_bf16 ? run_blocks<RowsBf16>(net, call, true)
                                  : run_blocks<RowsWidenedBf16>(net, call, true);
    default: return run_blocks<RowsS8>(net, call, false);
  }
}

}  // namespace

extern "C" int lt4rec_check_blob(const uint8_t* blob, int64_t bytes) {
  if (blob == nullptr || bytes < int64_t{sizeof(BlobHeader)} || reinterpret_cast<uintptr_t>(blob) % 8 != 0)
    return STATUS_BAD_BLOB;
  const auto* header = reinterpret_cast<const BlobHeader*>(blob);
  const bool is_ours = header->magic == BLOB_MAGIC && header->version == BLOB_VERSION;
  return is_ours && header->bytes == uint64_t(bytes) ? STATUS_OK : STATUS_BAD_BLOB;
}

extern "C" int64_t lt4rec_path(const Isa* isa, int64_t precision, int64_t batch) {
  if (precision == PRECISION_S8) return PATH_TABLES;
  const int from = precision == PRECISION_F32 ? isa->slices_from_f32 : isa->slices_from_bf16;
  return batch >= from ? PATH_SLICES : PATH_TABLES;
}

extern "C" int lt4rec_sparse_mlp(const Isa* isa, const uint8_t* blob, int64_t bytes, const SparseMlpCall* call) {
  if (const int status = lt4rec_check_blob(blob, bytes)) return status;
  const auto* header = reinterpret_cast<const BlobHeader*>(blob);
  if (call->in_features != header->in_features || call->outputs != header->outputs) return STATUS_BAD_SHAPE;
  const bool has_slices = header->layouts & LAYOUT_SLICES, has_tables = header->layouts & LAYOUT_TABLES;
  const bool has_blocks = header->layouts & LAYOUT_BLOCKS;
  const bool is_chosen = call->path == PATH_TABLES || call->path == PATH_SLICES || call->path == PATH_BLOCKS;
  const int64_t faster = has_blocks ? int64_t{PATH_BLOCKS} : lt4rec_path(isa, header->precision, call->batch);
  const int64_t wanted = is_chosen ? call->path : faster;
  if (call->path != PATH_AUTO) {
    if (wanted == PATH_BLOCKS && !has_blocks) return STATUS_NO_LAYOUT;
    if (wanted == PATH_TABLES && !has_tables) return STATUS_NO_LAYOUT;
    if (wanted == PATH_SLICES && !has_slices && (header->precision != PRECISION_S8 || has_blocks))
      return STATUS_NO_LAYOUT;
  }
  if (call->batch == 0) return STATUS_OK;
  const bool uses_slices = has_slices && (wanted == PATH_SLICES || !has_tables);

  const Network net{isa, blob, header, reinterpret_cast<const LayerRecord*>(header + 1)};
  if (has_blocks) return run_blocks(net, *call);
  switch (header->precision) {
    case PRECISION_F32:
      return uses_slices ? run_slices<TilesF32>(net, *call, false) : run_tables<LinesF32>(net, *call, false);
    case PRECISION_BF16:
      if (!uses_slices) return run_tables<LinesBf16>(net, *call, true);
      return isa->slices_bf16 ? run_slices<TilesBf16>(net, *call, true)
                              : run_slices<TilesWidenedBf16>(net, *call, true);
    default: return run_tables<LinesS8>(net, *call, false);
  }
}
