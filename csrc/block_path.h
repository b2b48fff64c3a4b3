// The path through blocks: rows of the batch as they come. Included as table_path.h is.

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
  static void next(const Network&, const LayerRecord&, const float*, const float*, const LayerRecord&, float*) {}
  // With a bias the sum is done. `to` may be `a`.
  static void add(const Network& net, const LayerRecord& layer, const float* a, const float* b, const float* bias,
                  int64_t count, float* to) {
    net.isa->add_f32(a, b, bias, count, bias && layer.activation == ACTIVATION_RELU, to);
  }
  static void real(const Network&, const LayerRecord& layer, const float* y, const float*, float* to) {
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
  static void next(const Network& net, const LayerRecord& layer, const float* y, const float*, const LayerRecord&,
                   T* line) {
    (net.isa->*kRound)(y, layer.out_features, line);
  }
};
using RowsBf16 = RowsRounded<uint16_t, &Isa::blocks_bf16, &Isa::round_bf16>;
using RowsWidenedBf16 = RowsRounded<float, &Isa::blocks_widened_bf16, &Isa::round_widened_bf16>;
using RowsFilledBf16 = RowsRounded<float, &Isa::blocks_f32, &Isa::round_widened_bf16>;

inline bool is_filler(float weight) { return weight == 0 && std::signbit(weight); }

// What Isa::blocks_f32 computes for one row, without the fillers.
inline void add_without_fillers(const Network& net, const LayerRecord& layer, const float* x, float* y) {
  const int64_t groups = padded(layer.out_features) / GROUP, panels = panel_count(layer.in_features, false);
  const auto* order = reinterpret_cast<const uint32_t*>(net.blob + layer.block_groups);
  const auto* begins = reinterpret_cast<const uint32_t*>(net.blob + layer.group_blocks);
  const auto* quads = reinterpret_cast<const uint32_t*>(net.blob + layer.block_quads);
  const float* weights = net.floats(layer.block_weights);
  std::memcpy(y, net.floats(layer.bias), size_t(groups) * GROUP * sizeof(float));
  for (int64_t p = 0; p < panels; ++p, order += groups, begins += groups + 1)
    for (int64_t g = 0; g < groups; ++g)
      for (uint32_t block = begins[g]; block < begins[g + 1]; ++block)
        for (int64_t i = 0; i < QUAD * GROUP; ++i) {
          const float weight = weights[int64_t{block} * QUAD * GROUP + i];
          float& sum = y[int64_t{order[g]} * GROUP + i % GROUP];
          if (!is_filler(weight)) sum = std::fma(weight, x[quads[block] * QUAD + i / GROUP], sum);
        }
  if (layer.activation != ACTIVATION_RELU) return;
  for (int64_t i = 0; i < groups * GROUP; ++i) y[i] = y[i] < 0 ? 0 : y[i];  // NaN stays
}

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
  static void next(const Network& net, const LayerRecord& layer, const int32_t* y, const float* bias,
                   const LayerRecord& following, uint8_t* line) {
    net.isa->recode_s32(y, nullptr, net.floats(layer.scale), bias, layer.out_features,
                        layer.activation == ACTIVATION_RELU, following.inverse_scale, following.zero_point, line);
  }
  static void add(const Network& net, const LayerRecord&, const int32_t* a, const int32_t* b, const float*,
                  int64_t count, int32_t* to) {
    if (b)
      net.isa->add_s32(a, b, count, to);
    else
      std::memcpy(to, a, size_t(count) * sizeof(int32_t));
  }
  static void real(const Network& net, const LayerRecord& layer, const int32_t* y, const float* bias, float* to) {
    net.isa->dequantize_s32(y, nullptr, net.floats(layer.scale), bias, layer.out_features, to);
    if (layer.activation == ACTIVATION_RELU) net.isa->add_f32(to, nullptr, nullptr, layer.out_features, true, to);
  }
};

template <class Rows>
class BlockPath {
  using Activation = typename Rows::Activation;
  using Value = typename Rows::Value;
  static constexpr bool kIsS8 = std::is_same_v<Value, int32_t>;

 public:
  // So many rows' activations fit the second cache beside a piece of the weights.
  static constexpr int64_t kMostRows = 48;
  static constexpr int64_t kCachedBytes = 2 << 20;  // of x: what of a last cache is left beside the weights

  static int64_t scratch_bytes(const BlobHeader& header, int64_t rows) {
    const int64_t lines = line_length(header.in_features) + line_length(header.hidden_features);
    const int64_t values = 2 * line_length(header.hidden_features) + line_length(header.shared_features);
    return rows * (lines * int64_t{sizeof(Activation)} + values * int64_t{sizeof(Value)}) +
           (header.in_features + 2 * header.hidden_features + 64) * int64_t{sizeof(float)} + 7 * 64;
  }

  BlockPath(const Network& net, Arena& arena, int64_t rows)
      : net_(net), given_(net, arena.take<float>(net.header->hidden_features)), input_stride_(line_length(net.header->in_features)),
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
        multiply(layer, x, x_stride, rows, shared_, shared_stride_);
        continue;
      }
      Value* y = values_[i % 2];
      if (layer.kind == LAYER_LINEAR) multiply(layer, x, x_stride, rows, y, hidden_stride_);
      for (int64_t r = 0; r < rows; ++r) {
        Value* of_row = y + r * hidden_stride_;
        const float* bias = net_.floats(layer.bias);
        if (layer.takes_bias) {
          bias = given_.of_row(call, layer, begin + r, r == 0);
          if (kIsS8) has_nan[r] |= ::has_nan(bias, layer.out_features);
        }
        if (layer.kind == LAYER_COMBINED)
          combine(layer, shared_ + r * shared_stride_, bias, of_row);
        else if (layer.takes_bias && !kIsS8)
          Rows::add(net_, layer, of_row, nullptr, bias, layer.out_features, of_row);
        if (layer.is_head) {
          float* to = call.out + (begin + r) * call.out_stride + column;
          Rows::real(net_, layer, of_row, bias, to);
          if (is_left(layer)) activate(net_, layer, to, layer.out_features);
          if (has_nan[r])  // int8 codes have none
            for (uint32_t j = 0; j < layer.out_features; ++j) to[j] = std::numeric_limits<float>::quiet_NaN();
        } else {
          pass_on(layer, net_.layers[i + 1], of_row, bias, hidden_ + r * hidden_stride_);
        }
      }
      x = layer.is_head ? input : next_input(y);
      x_stride = layer.is_head ? input_stride : hidden_stride_;
      if (layer.is_head) column += layer.out_features;
    }
  }

 private:
  void multiply(const LayerRecord& layer, const Activation* x, int64_t x_stride, int64_t rows, Value* y,
                int64_t y_stride) const {
    const LayerRecord sums = layer.takes_bias ? without_activation(layer) : layer;
    Rows::multiply(net_, sums, x, x_stride, rows, y, y_stride);
    if constexpr (std::is_same_v<Activation, float>)
      for (int64_t r = 0; net_.is_filled && r < rows; ++r)
        if (::has_nan(y + r * y_stride, layer.out_features))  // as each sum in which a filler met Inf or NaN
          add_without_fillers(net_, sums, x + r * x_stride, y + r * y_stride);
  }

  // A row's features, in whole groups. Lines of a power of two bytes would meet in the same few places of the cache.
  static int64_t line_length(int64_t features) { return padded(features) + 64; }

  const Activation* next_input(const Value* y) const {
    if constexpr (Rows::kReadsValues) return y;
    return hidden_;
  }

  bool load(const SparseMlpCall& call, int64_t row, Activation* line) {
    clear_edge(call.in_features, line);
    return Rows::load(net_, net_.layers[0], float_row(net_, call, row, real_), call.in_features, line);
  }

  void pass_on(const LayerRecord& layer, const LayerRecord& following, Value* y, const float* bias,
               Activation* line) {
    if (is_left(layer)) {
      Rows::real(net_, layer, y, bias, real_);
      activate(net_, layer, real_, layer.out_features);
      if constexpr (Rows::kReadsValues)
        std::memcpy(y, real_, layer.out_features * sizeof(float));
      else
        Rows::load(net_, following, real_, layer.out_features, line);
    } else {
      Rows::next(net_, layer, y, bias, following, line);
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

  void combine(const LayerRecord& layer, const Value* shared, const float* bias, Value* to) const {
    const auto part = [&](uint32_t p) { return shared + int64_t{net_.parts(layer)[p]} * layer.part_features; };
    const Value* sum = part(0);
    for (uint32_t p = 1; p + 1 < layer.part_count; ++p) {
      Rows::add(net_, layer, sum, part(p), nullptr, layer.part_features, to);
      sum = to;
    }
    const Value* last = layer.part_count > 1 ? part(layer.part_count - 1) : nullptr;
    Rows::add(net_, layer, sum, last, bias, layer.part_features, to);
  }

  const Network& net_;
  GivenBias given_;
  int64_t input_stride_, hidden_stride_, shared_stride_;
  Activation *input_, *hidden_;
  Value *values_[2], *shared_;
  float* real_;  // one row of float32 on its way
};
