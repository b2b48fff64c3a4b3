// The path through tables: up to MAX_ROWS rows of the batch, each in a line of its own. Included once, by
// sparse_mlp.cpp, in its anonymous namespace.

// What tables need to know of a precision. A layer's `Value`s become the next one's `Activation`s.
struct LinesF32 {
  using Activation = float;
  using Value = float;
  static constexpr bool kSumsHoldBias = true;  // but for those that are combined from parts
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
  static void next(const Network& net, const LayerRecord& layer, const float* a, const float* b, const float* bias,
                   const LayerRecord&, float* line) {
    net.isa->line_f32(a, b, bias, padded(layer.out_features), layer.activation == ACTIVATION_RELU, line);
  }
  static void head(const Network& net, const LayerRecord& layer, const float* a, const float* b, const float* bias,
                   float* to) {
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
  static void next(const Network& net, const LayerRecord& layer, const float* a, const float* b, const float* bias,
                   const LayerRecord&, uint16_t* line) {
    net.isa->line_bf16(a, b, bias, padded(layer.out_features), layer.activation == ACTIVATION_RELU, line);
  }
};

struct LinesS8 {
  using Activation = uint8_t;
  using Value = int32_t;
  static constexpr bool kSumsHoldBias = false;
  static constexpr int64_t kWindow = WINDOW_S8;
  static int64_t positions(int64_t features) { return 2 * (features + HALF_S8); }

  static bool load(const Network& net, const LayerRecord& layer, const float* x, int64_t count, uint8_t* line) {
    return net.isa->line_u8(x, count, layer.inverse_scale, layer.zero_point, line);
  }
  static void multiply(const Network& net, const LayerRecord& layer, const uint8_t* x, int64_t x_stride, int rows,
                       int32_t* y, int64_t y_stride) {
    net.isa->table_s8(net.blob, &layer, x, x_stride, rows, y, y_stride);
  }
  static void next(const Network& net, const LayerRecord& layer, const int32_t* a, const int32_t* b, const float* bias,
                   const LayerRecord& following, uint8_t* line) {
    net.isa->requantize_s32(a, b, net.floats(layer.scale), bias, padded(layer.out_features),
                            layer.activation == ACTIVATION_RELU, following.inverse_scale, following.zero_point, line);
  }
  static void head(const Network& net, const LayerRecord& layer, const int32_t* a, const int32_t* b, const float* bias,
                   float* to) {
    net.isa->dequantize_s32(a, b, net.floats(layer.scale), bias, layer.out_features, to);
    if (layer.activation == ACTIVATION_RELU) net.isa->add_f32(to, nullptr, nullptr, layer.out_features, true, to);
  }
  static void add(const Network& net, const int32_t* a, const int32_t* b, int64_t count, int32_t* to) {
    net.isa->add_s32(a, b, count, to);
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
           (header.in_features + 2 * header.hidden_features + 64) * int64_t{sizeof(float)} + 7 * 64;
  }

  TablePath(const Network& net, Arena& arena)
      : net_(net), given_(net, arena.take<float>(net.header->hidden_features)), input_stride_(line_length(net.header->in_features)),
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
        const float* bias = Lines::kSumsHoldBias && layer.kind == LAYER_LINEAR ? nullptr : net_.floats(layer.bias);
        if (layer.takes_bias) {
          bias = given_.of_row(call, layer, begin + r, r == 0);
          if (!Lines::kSumsHoldBias) has_nan[r] |= ::has_nan(bias, layer.out_features);
        }
        Activation* line = hidden_[i % 2] + r * hidden_stride_;
        if (!layer.is_head && is_left(layer)) {
          Lines::head(net_, layer, a, b, bias, real_);
          activate(net_, layer, real_, layer.out_features);
          Lines::load(net_, net_.layers[i + 1], real_, layer.out_features, line);
        } else if (!layer.is_head) {
          Lines::next(net_, layer, a, b, bias, net_.layers[i + 1], line);
        } else {
          float* to = call.out + (begin + r) * call.out_stride + column;
          Lines::head(net_, layer, a, b, bias, to);
          if (is_left(layer)) activate(net_, layer, to, layer.out_features);
          for (uint32_t j = 0; has_nan[r] && j < layer.out_features; ++j)
            to[j] = std::numeric_limits<float>::quiet_NaN();  // int8 codes have none
        }
      }
      x = layer.is_head ? input_ : hidden_[i % 2];
      x_stride = layer.is_head ? input_stride_ : hidden_stride_;
      if (layer.is_head) column += layer.out_features;
    }
  }

 private:
  bool load(const SparseMlpCall& call, int64_t row, Activation* line) {
    return Lines::load(net_, net_.layers[0], float_row(net_, call, row, real_), call.in_features, line);
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
  GivenBias given_;
  int64_t input_stride_, hidden_stride_;
  Activation *input_, *hidden_[2];
  Value *values_, *shared_;
  float* real_;  // one row of float32 on its way
};
