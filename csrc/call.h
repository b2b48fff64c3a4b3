// What every path of a call has: the network, memory of a thread's own, and how denormals count. Included as
// table_path.h is.

struct Network {
  const Isa* isa;
  const uint8_t* blob;
  const BlobHeader* header;
  const LayerRecord* layers;
  bool is_filled;  // the call takes filled blocks

  const float* floats(uint64_t section) const { return reinterpret_cast<const float*>(blob + section); }
  const uint32_t* parts(const LayerRecord& layer) const {
    return reinterpret_cast<const uint32_t*>(blob + layer.parts);
  }
};

// The biases that come with a call, one layer at a time.
class GivenBias {
 public:
  // `memory` holds hidden_features floats.
  GivenBias(const Network& net, float* memory) : net_(net), memory_(memory) {}

  // Those of one row of the batch in the layer's order, zeros up to whole groups. Where all rows have the same ones,
  // `first` says that the layer's are not here yet.
  const float* of_row(const SparseMlpCall& call, const LayerRecord& layer, int64_t row, bool is_first) {
    if (call.bias_stride == 0 && !is_first) return memory_;
    const float* given = call.bias + row * call.bias_stride + layer.bias_column;
    if (layer.bias_order == 0) {
      std::memcpy(memory_, given, layer.out_features * sizeof(float));
    } else {
      const auto* order = reinterpret_cast<const uint32_t*>(net_.blob + layer.bias_order);
      for (uint32_t i = 0; i < layer.out_features; ++i) memory_[i] = given[order[i]];
    }
    for (int64_t i = layer.out_features; i < padded(layer.out_features); ++i) memory_[i] = 0;
    return memory_;
  }

 private:
  const Network& net_;
  float* memory_;
};

// A layer whose kernel leaves the activation: its sums are not done yet.
LayerRecord without_activation(const LayerRecord& layer) {
  LayerRecord sums = layer;
  sums.activation = ACTIVATION_NONE;
  return sums;
}

inline bool has_nan(const float* values, int64_t count) {
  int nans = 0;
  for (int64_t i = 0; i < count; ++i) nans |= values[i] != values[i];
  return nans;
}

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

// A row of x as float32: where it stands, or widened to `widened`.
const float* float_row(const Network& net, const SparseMlpCall& call, int64_t row, float* widened) {
  if (!call.is_bf16) return static_cast<const float*>(call.x) + row * call.x_stride;
  net.isa->widen_bf16(static_cast<const uint16_t*>(call.x) + row * call.x_stride, call.in_features, widened);
  return widened;
}

// Whether the layer's activation is left to its path.
bool is_left(const LayerRecord& layer) { return layer.activation > ACTIVATION_RELU; }

// Applies an activation that was left. A score has the bits that it had in version 0.1: those of libm's exp. Where that
// overflows the quotient is 0, as it should be.
void activate(const Network& net, const LayerRecord& layer, float* values, int64_t count) {
  if (layer.activation == ACTIVATION_DICE)
    return net.isa->dice(net.floats(layer.slopes), layer.out_features, false, values, count);
  if (layer.slopes) return net.isa->leaky_relu(net.floats(layer.slopes), values, count);
  if (layer.activation != ACTIVATION_SIGMOID || !layer.is_head)
    return net.isa->activate(layer.activation, layer.slope, values, count);
  for (int64_t i = 0; i < count; ++i) values[i] = 1 / (1 + std::exp(-values[i]));
}
