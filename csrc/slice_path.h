// The path through slices: tiles of rows of the batch, transposed. Included as table_path.h is.

// What slices need to know of a precision: `taken` is what a layer reads of a tile of values.
struct TilesF32 {
  using Activation = float;
  static constexpr bool kIsRounded = false, kIsQuantized = false;
  static const float* taken(const Network&, const LayerRecord&, const float* tile, int64_t, float*) { return tile; }
  static void multiply(const Network& net, const LayerRecord& layer, const float* x, float* y, int lanes) {
    net.isa->slices_f32(net.blob, &layer, x, y, lanes);
  }
};
template <class T, auto kKernel, auto kRound>
struct TilesRounded {
  using Activation = T;
  static constexpr bool kIsRounded = true, kIsQuantized = false;
  static const T* taken(const Network& net, const LayerRecord&, const float* tile, int64_t count, T* to) {
    (net.isa->*kRound)(tile, count, to);
    return to;
  }
  static bool take_row(const Network& net, const LayerRecord&, const float* row, int64_t count, T* to) {
    (net.isa->*kRound)(row, count, to);
    return false;
  }
  static void multiply(const Network& net, const LayerRecord& layer, const T* x, float* y, int lanes) {
    (net.isa->*kKernel)(net.blob, &layer, x, y, lanes);
  }
};
using TilesBf16 = TilesRounded<uint16_t, &Isa::slices_bf16, &Isa::round_bf16>;
using TilesWidenedBf16 = TilesRounded<float, &Isa::slices_widened_bf16, &Isa::round_widened_bf16>;

// Codes and integer weights as floats, whose sums are exact.
struct TilesS8 {
  using Activation = float;
  static constexpr bool kIsRounded = true, kIsQuantized = true;
  static const float* taken(const Network& net, const LayerRecord& layer, const float* tile, int64_t count,
                            float* to) {
    take_row(net, layer, tile, count, to);
    return to;
  }
  static bool take_row(const Network& net, const LayerRecord& layer, const float* row, int64_t count, float* to) {
    return net.isa->codes_f32(row, count, layer.inverse_scale, layer.zero_point, to);
  }
  // Sums: the activation is applied when they are values again.
  static void multiply(const Network& net, const LayerRecord& layer, const float* x, float* y, int lanes) {
    const LayerRecord sums = without_activation(layer);
    net.isa->slices_f32(net.blob, &sums, x, y, lanes);
  }
};

template <class Tiles>
class SlicePath {
  using Activation = typename Tiles::Activation;
  // Rows of x become what layers read before they are transposed, while they are in the first cache.
  static constexpr bool kTakesRows = Tiles::kIsRounded && std::is_same_v<Activation, float>;

 public:
  static int64_t scratch_bytes(const BlobHeader& header, int lanes) {
    const int64_t stride = lane_stride(lanes), input = tile_rows(header.in_features) * stride;
    const int64_t hidden = tile_rows(header.hidden_features) * stride;
    const int64_t shared = tile_rows(header.shared_features) * stride;
    return (input + 2 * hidden + shared) * int64_t{sizeof(float)} +
           ((kTakesRows ? 0 : input) + hidden) * int64_t{sizeof(Activation)} +
           (MAX_ROWS * header.in_features + header.hidden_features) * int64_t{sizeof(float)} + 9 * 64;
  }

  SlicePath(const Network& net, Arena& arena, int lanes)
      : net_(net), given_(net, arena.take<float>(net.header->hidden_features)) {
    const BlobHeader& header = *net.header;
    const int64_t stride = lane_stride(lanes);
    input_ = arena.take<float>(tile_rows(header.in_features) * stride);
    for (float*& hidden : hidden_) hidden = arena.take<float>(tile_rows(header.hidden_features) * stride);
    shared_ = arena.take<float>(tile_rows(header.shared_features) * stride);
    widened_ = arena.take<float>(MAX_ROWS * int64_t{header.in_features});
    if (!Tiles::kIsRounded) return;
    if (!kTakesRows) rounded_input_ = arena.take<Activation>(tile_rows(header.in_features) * stride);
    rounded_hidden_ = arena.take<Activation>(tile_rows(header.hidden_features) * stride);
  }

  // Rows [begin, begin + rows) of the batch, at most `lanes` of them.
  void run(const SparseMlpCall& call, int64_t begin, int64_t rows, int lanes) {
    load(call, begin, rows, lanes);
    const Part part{&call, begin, rows, lanes};
    const Activation* input;
    if constexpr (kTakesRows)
      input = input_;
    else
      input = Tiles::taken(net_, net_.layers[0], input_, tile_rows(call.in_features) * lane_stride(lanes),
                           rounded_input_);
    const Activation* x = input;
    int64_t column = 0;
    for (uint32_t i = 0; i < net_.header->layers; ++i) {
      const LayerRecord& layer = net_.layers[i];
      if (layer.kind == LAYER_SHARED) {
        Tiles::multiply(net_, layer, x, shared_, lanes);
        continue;
      }
      float* y = hidden_[i % 2];
      if (layer.kind == LAYER_COMBINED) {
        combine(layer, part, y);
      } else if (layer.takes_bias) {
        Tiles::multiply(net_, without_activation(layer), x, y, lanes);
        if (!Tiles::kIsQuantized) add_given(layer, part, y);
      } else {
        Tiles::multiply(net_, layer, x, y, lanes);
      }
      if constexpr (Tiles::kIsQuantized) {
        if (layer.takes_bias) note_nans(layer, part);
        if (!layer.is_head && !is_left(layer)) {
          x = recoded(layer, net_.layers[i + 1], part, y);
          continue;
        }
        dequantize(layer, part, y);
      }
      if (is_left(layer)) activate_tile(layer, rows, lanes, y);
      if (layer.is_head) {
        store(call, begin, rows, lanes, layer, column, y);
        column += layer.out_features;
        x = input;
      } else {
        x = Tiles::taken(net_, net_.layers[i + 1], y, tile_rows(layer.out_features) * lane_stride(lanes),
                         rounded_hidden_);
      }
    }
  }

 private:
  // Rows of x -> a tile. Lanes past `rows` become zeros: they are computed and dropped, and whatever stood there
  // before might be denormal, which is slow.
  void load(const SparseMlpCall& call, int64_t begin, int64_t rows, int lanes) {
    const int64_t in_features = call.in_features, stride = lane_stride(lanes);
    if (rows < lanes) std::memset(input_, 0, size_t(tile_rows(in_features) * stride) * sizeof(float));
    // MAX_ROWS rows at a time, for they may change on the way.
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
      if constexpr (kTakesRows) {
        for (int64_t r = 0; r < count; ++r)
          has_nan_[first + r] = Tiles::take_row(net_, net_.layers[0], from + r * from_stride, in_features,
                                                widened_ + r * in_features);
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
    for (int64_t r = 0; Tiles::kIsQuantized && r < rows; ++r)
      for (int64_t i = 0; has_nan_[r] && i < out_features; ++i)  // codes have none
        call.out[(begin + r) * call.out_stride + column + i] = std::numeric_limits<float>::quiet_NaN();
  }

  // Rows [begin, begin + rows) of a call, which are a tile's first lanes.
  struct Part {
    const SparseMlpCall* call;
    int64_t begin, rows;
    int lanes;
  };

  // Calls visit(feature, the bias of each lane) for all features; that of lanes past the rows is 0.
  template <class Visit>
  void each_bias(const LayerRecord& layer, const Part& part, Visit visit) {
    float biases[64] = {};
    const bool is_own = layer.takes_bias && part.call->bias_stride != 0;
    const float* bias = net_.floats(layer.bias);
    if (layer.takes_bias && !is_own) bias = given_.of_row(*part.call, layer, 0, true);
    const auto* order = reinterpret_cast<const uint32_t*>(net_.blob + layer.bias_order);
    for (int64_t feature = 0; feature < layer.out_features; ++feature) {
      if (is_own) {
        const int64_t column = layer.bias_column + (layer.bias_order ? order[feature] : feature);
        const float* of_rows = part.call->bias + part.begin * part.call->bias_stride + column;
        for (int64_t r = 0; r < part.rows; ++r) biases[r] = of_rows[r * part.call->bias_stride];
      } else {
        for (int lane = 0; lane < part.lanes; ++lane) biases[lane] = bias[feature];
      }
      visit(feature, biases);
    }
  }

  void add_given(const LayerRecord& layer, const Part& part, float* tile) {
    each_bias(layer, part, [&](int64_t feature, const float* bias) {
      float* row = tile + tile_row(feature) * lane_stride(part.lanes);
      net_.isa->add_f32(row, nullptr, bias, part.lanes, layer.activation == ACTIVATION_RELU, row);
    });
  }

  // Codes have none.
  void note_nans(const LayerRecord& layer, const Part& part) {
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t of_row = (part.begin + r) * part.call->bias_stride;
      has_nan_[r] |= ::has_nan(part.call->bias + of_row + layer.bias_column, layer.out_features);
    }
  }

  // Sums -> what the next layer reads.
  const float* recoded(const LayerRecord& layer, const LayerRecord& following, const Part& part, const float* sums) {
    const int64_t stride = lane_stride(part.lanes);
    const float* scale = net_.floats(layer.scale);
    for (int64_t row = 0; row < tile_rows(layer.out_features); row += BLOCK_FEATURES + 1)
      std::memset(rounded_hidden_ + row * stride, 0, size_t(stride) * sizeof(float));
    each_bias(layer, part, [&](int64_t feature, const float* bias) {
      net_.isa->recode_f32(sums + tile_row(feature) * stride, part.lanes, scale[feature], bias,
                           layer.activation == ACTIVATION_RELU, following.inverse_scale, following.zero_point,
                           rounded_hidden_ + tile_row(feature) * stride);
    });
    return rounded_hidden_;
  }

  // Sums -> values, in place.
  void dequantize(const LayerRecord& layer, const Part& part, float* tile) {
    const float* scale = net_.floats(layer.scale);
    each_bias(layer, part, [&](int64_t feature, const float* bias) {
      float* row = tile + tile_row(feature) * lane_stride(part.lanes);
      net_.isa->dequantize_f32(row, part.lanes, scale[feature], bias, layer.activation == ACTIVATION_RELU, row);
    });
  }

  // In place, features only: the rows of zeros must stay zeros.
  void activate_tile(const LayerRecord& layer, int64_t rows, int lanes, float* tile) const {
    for (int64_t feature = 0; feature < layer.out_features; ++feature) {
      float* row = tile + tile_row(feature) * lane_stride(lanes);
      if (layer.activation == ACTIVATION_DICE)
        net_.isa->dice(net_.floats(layer.slopes) + feature, layer.out_features, true, row, rows);
      else if (layer.slopes)
        net_.isa->activate(layer.activation, net_.floats(layer.slopes)[feature], row, rows);
      else
        activate(net_, layer, row, rows);
    }
  }

  // The sum of the parts, lane by lane; the bias is the same for all of them. (Quantised values get theirs later.)
  void combine(const LayerRecord& layer, const Part& tile, float* y) {
    const int64_t stride = lane_stride(tile.lanes);
    const uint32_t *parts = net_.parts(layer), last = layer.part_count - 1;
    for (int64_t row = 0; row < tile_rows(layer.out_features); row += BLOCK_FEATURES + 1)
      std::memset(y + row * stride, 0, size_t(stride) * sizeof(float));
    each_bias(layer, tile, [&](int64_t feature, const float* bias) {
      const auto part = [&](uint32_t p) {
        return shared_ + tile_row(int64_t{parts[p]} * layer.part_features + feature) * stride;
      };
      float* to = y + tile_row(feature) * stride;
      const float* sum = part(0);
      for (uint32_t p = 1; p < last; ++p) {
        net_.isa->add_f32(sum, part(p), nullptr, tile.lanes, false, to);
        sum = to;
      }
      net_.isa->add_f32(sum, last ? part(last) : nullptr, Tiles::kIsQuantized ? kNoBias : bias, tile.lanes,
                        layer.activation == ACTIVATION_RELU && !Tiles::kIsQuantized, to);
    });
  }

  static constexpr float kNoBias[64] = {};

  const Network& net_;
  GivenBias given_;
  float *input_, *hidden_[2], *shared_, *widened_;
  Activation *rounded_input_ = nullptr, *rounded_hidden_ = nullptr;
  bool has_nan_[64] = {};  // rows of the batch, where codes are read
};
