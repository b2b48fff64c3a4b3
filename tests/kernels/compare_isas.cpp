// Compares every ISA that this machine runs with the scalar definition, bit by bit: random networks on every path, and
// each of the functions between layers. Plain C++, so that it also runs without Python: under an emulator, or on a
// board.
//
//   compare_isas [networks = 240]
//
// Prints a checksum of all results, which is the same on every processor. The first difference ends it with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "engine.h"

namespace {

// The same numbers with every standard library.
class Draw {
 public:
  explicit Draw(uint32_t seed) : engine_(seed) {}
  int64_t below(int64_t bound) { return int64_t(engine_()) % bound; }
  int64_t between(int64_t least, int64_t most) { return least + below(most - least + 1); }
  float of_unit() { return float(below(2'000'001) - 1'000'000) / 1'000'000; }
  // Every kind of float: denormals, infinities, NaN.
  float of_any_bits() {
    const uint32_t bits = uint32_t(below(int64_t{1} << 32));
    float v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  }

 private:
  std::mt19937 engine_;
};

// A NaN's sign and payload are the processor's choice.
bool is_same(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b)); }
bool is_same(int32_t a, int32_t b) { return a == b; }
bool is_same(uint8_t a, uint8_t b) { return a == b; }
bool is_same(uint16_t a, uint16_t b) {
  constexpr uint16_t kMagnitude = 0x7fff, kInfinity = 0x7f80;
  return a == b || ((a & kMagnitude) > kInfinity && (b & kMagnitude) > kInfinity);
}

[[noreturn]] void fail(const char* isa, const char* what, long long seed, size_t at) {
  std::printf("%s: %s of seed %lld differs from the scalar one at %zu\n", isa, what, seed, at);
  std::exit(1);
}

template <class T>
void compare(const char* isa, const char* what, int64_t seed, const std::vector<T>& got, const std::vector<T>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i)
    if (!is_same(got[i], wanted[i])) fail(isa, what, seed, i);
}

// Fillers leave a zero's sign open.
std::vector<float> with_unsigned_zeros(std::vector<float> values) {
  for (float& v : values) v += 0.0f;
  return values;
}

class Checksum {
 public:
  void add(float v) {
    uint32_t bits = 0;
    if (!std::isnan(v)) std::memcpy(&bits, &v, sizeof(v));
    sum_ = (sum_ ^ bits) * 0x100000001b3;
  }
  unsigned long long value() const { return sum_; }

 private:
  uint64_t sum_ = 0xcbf29ce484222325;
};

// --- The functions between layers ---------------------------------------------------------------------------------

constexpr size_t kRoom = 24 * 24;

// Compares the first `count` values that `function` writes; the memory holds `untouched` before.
template <class T, class Function>
void compare_function(const Isa& isa, const char* what, int64_t seed, size_t count, T untouched, Function function) {
  std::vector<T> got(kRoom, untouched), wanted(kRoom, untouched);
  function(isa, got.data());
  function(lt4rec_isa_scalar, wanted.data());
  wanted.resize(count);
  compare(isa.name, what, seed, got, wanted);
}

void compare_functions(const Isa& isa, uint32_t seed) {
  Draw draw(seed);
  const int64_t count = draw.between(0, 130), rows = draw.between(0, 20), columns = draw.between(0, 20);
  const auto line_f32 = size_t(line_position(count, GAP_F32)), line_bf16 = size_t(line_position(count, GAP_BF16));
  std::vector<float> a(kRoom), b(kRoom), c(kRoom);
  std::vector<uint16_t> halves(kRoom);
  std::vector<int32_t> sums(kRoom), others(kRoom);
  for (size_t i = 0; i < kRoom; ++i) {
    a[i] = draw.below(2) ? draw.of_unit() : draw.of_any_bits();
    b[i] = draw.below(8) ? draw.of_unit() : draw.of_any_bits();
    c[i] = draw.below(8) ? draw.of_unit() : draw.of_any_bits();
    halves[i] = uint16_t(draw.below(0x10000));
    sums[i] = int32_t(draw.between(-1'000'000'000, 1'000'000'000));
    others[i] = int32_t(draw.between(-1'000'000'000, 1'000'000'000));
  }
  const float* more = draw.below(2) ? b.data() : nullptr;
  const float* bias = draw.below(2) ? c.data() : nullptr;
  const int32_t* other = draw.below(2) ? others.data() : nullptr;
  const int has_relu = int(draw.below(2));
  const int64_t vectors = draw.between(0, 9);

  compare_function(isa, "transpose_f32", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.transpose_f32(a.data(), 22, rows, columns, to, 23);
  });
  compare_function(isa, "widen_bf16", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.widen_bf16(halves.data(), count, to);
  });
  compare_function(isa, "round_bf16", seed, kRoom, uint16_t{7}, [&](const Isa& on, uint16_t* to) {
    on.round_bf16(a.data(), count, to);
  });
  compare_function(isa, "round_widened_bf16", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.round_widened_bf16(a.data(), count, to);
  });
  compare_function(isa, "add_f32", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.add_f32(a.data(), more, bias, count, has_relu, to);
  });
  compare_function(isa, "add_s32", seed, kRoom, int32_t{7}, [&](const Isa& on, int32_t* to) {
    on.add_s32(sums.data(), others.data(), count, to);
  });
  compare_function(isa, "line_f32", seed, line_f32, 7.0f, [&](const Isa& on, float* to) {
    on.line_f32(a.data(), more, bias, count, has_relu, to);
  });
  compare_function(isa, "line_bf16", seed, line_bf16, uint16_t{7}, [&](const Isa& on, uint16_t* to) {
    on.line_bf16(a.data(), more, bias, count, has_relu, to);
  });
  compare_function(isa, "dequantize_s32", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.dequantize_s32(sums.data(), other, b.data(), c.data(), count, to);
  });
  const float inverse_scale = float(1 + draw.below(300)) / 2;
  const auto zero_point = int32_t(draw.below(256));
  compare_function(isa, "codes_f32", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    to[kRoom - 1] = float(on.codes_f32(a.data(), count, inverse_scale, zero_point, to));
  });
  compare_function(isa, "recode_f32", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.recode_f32(a.data(), count, b[0], c.data(), has_relu, inverse_scale, zero_point, to);
  });
  compare_function(isa, "dequantize_f32", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.dequantize_f32(a.data(), count, b[0], c.data(), has_relu, to);
  });
  const auto activation = uint32_t(draw.between(ACTIVATION_SIGMOID, ACTIVATION_ELU));
  compare_function(isa, "activate", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = 30 * c[i];
    on.activate(activation, b[0], to, count);
  });
  compare_function(isa, "leaky_relu", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    std::copy_n(c.data(), count, to);
    on.leaky_relu(a.data(), to, count);
  });
  const int is_one = int(draw.below(2));
  compare_function(isa, "dice", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = 30 * c[i];
    on.dice(a.data(), kRoom / 4, is_one, to, std::min<int64_t>(count, kRoom / 4));
  });
  compare_function(isa, "widen_f16", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.widen_f16(halves.data(), count, to);
  });
  compare_function(isa, "widen_s8", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.widen_s8(reinterpret_cast<const int8_t*>(sums.data()), count, b[0], to);
  });
  const int64_t dim = draw.between(0, 9), width = draw.between(1, 2) * GROUP, stride = width + draw.below(20);
  compare_function(isa, "cross", seed, kRoom, 7.0f, [&](const Isa& on, float* to) {
    on.cross(a.data(), vectors, b.data(), stride, dim, width, to, width + 3);
  });
  compare_function(isa, "codes_u8", seed, kRoom, uint8_t{7}, [&](const Isa& on, uint8_t* to) {
    to[kRoom - 1] = uint8_t(on.codes_u8(a.data(), count, inverse_scale, zero_point, to));
  });
  compare_function(isa, "recode_s32", seed, kRoom, uint8_t{7}, [&](const Isa& on, uint8_t* to) {
    on.recode_s32(sums.data(), other, b.data(), c.data(), count, has_relu, inverse_scale, zero_point, to);
  });
}

// --- Networks -----------------------------------------------------------------------------------------------------

// The values of a union, and a bit plane for each task that shares it: of weights, or of blocks.
struct Weight {
  int64_t tasks;
  std::vector<uint8_t> planes;
  std::vector<float> values;

  Weight(Draw& draw, int64_t tasks, int64_t in_features, int64_t out_features, float scale, bool is_blocks)
      : tasks(tasks) {
    const int64_t wide = in_features, high = out_features;
    if (is_blocks) in_features = quad_count(in_features), out_features = padded(out_features) / GROUP;
    const int64_t percents[] = {0, 5, 30, 60, 100}, percent = percents[draw.below(5)];
    const int64_t left_out = draw.below(2) ? 5 : 40;  // percent of the union, by each of several tasks
    const int64_t row_bytes = (in_features + 7) / 8;
    planes.resize(size_t(tasks * out_features * row_bytes));
    for (int64_t row = 0; row < out_features; ++row) {
      for (int64_t column = 0; column < in_features; ++column) {
        if (draw.below(100) >= percent) continue;
        bool is_kept = false;
        for (int64_t task = 0; task < tasks; ++task) {
          if (tasks > 1 && draw.below(100) < left_out) continue;
          planes[size_t((task * out_features + row) * row_bytes + column / 8)] |= uint8_t(1 << (column % 8));
          is_kept = true;
        }
        if (!is_kept) continue;
        for (int64_t i = 0; i < (is_blocks ? GROUP * QUAD : 1); ++i) {
          const bool is_within = row * GROUP + i / QUAD < high && column * QUAD + i % QUAD < wide;
          values.push_back(!is_blocks || is_within ? draw.of_unit() * scale : 0);
        }
      }
    }
  }
};

struct Network {
  std::vector<Weight> weights;
  std::vector<std::vector<float>> biases, slopes;  // of each layer
  std::vector<CanonicalLayer> layers;
  int64_t in_features, outputs = 0, bias_features = 0;
  bool takes_bias;  // the first layers, from the call
  float scale;      // of x and the first layers

  Network(Draw& draw, int64_t precision, bool is_blocks) : in_features(draw.between(1, is_blocks ? 1400 : 280)) {
    // The product of two tiny values is denormal, or nearly so. In int8 all of them would be quantised alike.
    scale = precision != PRECISION_S8 && draw.below(3) == 0 ? 0x1p-63f : 1;
    const bool is_shared = draw.below(2);
    takes_bias = draw.below(2);
    const int64_t tasks = draw.between(1, draw.below(4) ? 3 : 12), first_features = draw.between(1, 70);
    std::vector<size_t> weight_of;
    if (is_shared) weights.emplace_back(draw, tasks, in_features, first_features, scale, is_blocks);
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t depth = draw.between(1, 3);
      int64_t in = in_features;
      for (int64_t i = 0; i < depth; ++i) {
        const bool is_first = i == 0, is_head = i == depth - 1, is_of_union = is_first && is_shared;
        const int64_t out = is_of_union ? first_features : draw.between(1, is_head ? 20 : 150);
        if (!is_of_union) weights.emplace_back(draw, 1, in, out, is_first ? scale : 1, is_blocks);
        weight_of.push_back(is_of_union ? 0 : weights.size() - 1);
        const float bias_scale = is_first ? scale * scale : 1;
        std::vector<float>& bias = biases.emplace_back();
        if (is_first && takes_bias)
          bias_features += out;
        else if (draw.below(4))
          for (int64_t row = 0; row < out; ++row) bias.push_back(draw.of_unit() * bias_scale);
        CanonicalLayer layer{};
        layer.is_blocks = is_blocks;
        layer.task = is_of_union ? task : 0;
        layer.in_features = in;
        layer.out_features = out;
        layer.activation = draw.below(2) ? draw.below(2) : draw.below(ACTIVATION_DICE + 1);
        layer.slope = double(draw.below(100)) / 50 - 0.5;
        std::vector<float>& of_layer = slopes.emplace_back();
        if (layer.activation == ACTIVATION_DICE || draw.below(2))
          for (int64_t i = 0; i < slope_rows(layer.activation) * out; ++i) of_layer.push_back(2 * draw.of_unit());
        layer.is_head = is_head;
        layer.takes_bias = is_first && takes_bias;
        layer.input_scale = is_first ? 0.01 : (1 + double(draw.below(100))) / 2000;
        layer.input_zero_point = is_first ? 128 : draw.below(256);
        layers.push_back(layer);
        if (is_head) outputs += out;
        in = out;
      }
    }
    for (size_t i = 0; i < layers.size(); ++i) {  // addresses, now that nothing moves any more
      const Weight& weight = weights[weight_of[i]];
      layers[i].values = reinterpret_cast<int64_t>(weight.values.data());
      layers[i].planes = reinterpret_cast<int64_t>(weight.planes.data());
      layers[i].tasks = weight.tasks;
      layers[i].nnz = int64_t(weight.values.size()) / (layers[i].is_blocks ? GROUP * QUAD : 1);
      layers[i].slopes = slopes[i].empty() ? 0 : reinterpret_cast<int64_t>(slopes[i].data());
      layers[i].bias = biases[i].empty() ? 0 : reinterpret_cast<int64_t>(biases[i].data());
    }
  }
};

void compare_network(uint32_t seed, Checksum& checksum) {
  Draw draw(seed);
  const int64_t precision = seed % 3;
  const bool is_blocks = seed / 3 % 2;
  const Network network(draw, precision, is_blocks);
  char message[MESSAGE_BYTES];
  uint8_t* blob;
  const int64_t layouts = is_blocks ? LAYOUT_BLOCKS : LAYOUT_TABLES | LAYOUT_SLICES | LAYOUT_FILLED;
  const int64_t bytes = lt4rec_prepack(network.layers.data(), int64_t(network.layers.size()), precision, layouts,
                                       &lt4rec_isa_scalar, -1, &blob, message);
  if (bytes < 0) fail("prepack", message, seed, 0);

  const int64_t batch = draw.between(1, 70), x_stride = network.in_features + draw.below(3),
                out_stride = network.outputs + draw.below(3), threads = draw.between(1, 2);
  const int64_t one_poisoned_in = draw.below(2) ? 300 : INT64_MAX;
  std::vector<float> x(size_t(batch * x_stride) + 1);
  std::vector<uint16_t> x_bf16(x.size());
  for (float& v : x) v = draw.below(one_poisoned_in) ? draw.of_unit() * network.scale : draw.of_any_bits();
  lt4rec_isa_scalar.round_bf16(x.data(), int64_t(x.size()), x_bf16.data());
  const int64_t bias_stride = draw.below(2) ? 0 : network.bias_features + draw.below(3);
  std::vector<float> given(size_t((batch - 1) * bias_stride + network.bias_features));
  for (float& v : given)
    v = draw.below(one_poisoned_in) ? draw.of_unit() * network.scale * network.scale : draw.of_any_bits();
  const bool is_bf16 = draw.below(2);
  const void* from = is_bf16 ? static_cast<const void*>(x_bf16.data() + 1) : x.data() + 1;

  const auto run = [&](const Isa& isa, int64_t path) {
    std::vector<float> out(size_t(batch * out_stride), 7.0f);
    const SparseMlpCall call{from,       is_bf16,         batch,      network.in_features,   x_stride,
                             out.data(), network.outputs, out_stride, threads,               path,
                             given.data(), network.bias_features, bias_stride};
    if (lt4rec_sparse_mlp(&isa, blob, bytes, &call) != STATUS_OK) fail(isa.name, "the call", seed, 0);
    return out;
  };
  const std::vector<float> wanted = run(lt4rec_isa_scalar, is_blocks ? PATH_BLOCKS : PATH_TABLES);
  const uint32_t held = reinterpret_cast<const BlobHeader*>(blob)->layouts;
  const bool has_filled = held & LAYOUT_FILLED, has_slices = held & LAYOUT_SLICES;
  if (has_slices) compare("slices", "the result", seed, run(lt4rec_isa_scalar, PATH_SLICES), wanted);
  const auto compare_filled = [&](const Isa& isa) {
    if (has_filled)
      compare(isa.name, "the filled blocks' result", seed, with_unsigned_zeros(run(isa, PATH_FILLED)),
              with_unsigned_zeros(wanted));
  };
  compare_filled(lt4rec_isa_scalar);
  for (float v : wanted) checksum.add(v);
  for (const Isa* const* isa = lt4rec_supported_isas() + 1; *isa; ++isa) {
    if (is_blocks) {
      compare((*isa)->name, "the blocks' result", seed, run(**isa, PATH_BLOCKS), wanted);
    } else {
      compare((*isa)->name, "the tables' result", seed, run(**isa, PATH_TABLES), wanted);
      if (has_slices) compare((*isa)->name, "the slices' result", seed, run(**isa, PATH_SLICES), wanted);
      compare_filled(**isa);
    }
  }
  lt4rec_free(blob);
}

}  // namespace

int main(int argc, char** argv) {
  const auto networks = uint32_t(argc > 1 ? std::atoi(argv[1]) : 240);
  for (const Isa* const* isa = lt4rec_supported_isas() + 1; *isa; ++isa)  // the first is scalar itself
    for (uint32_t seed = 0; seed < 10 * networks; ++seed) compare_functions(**isa, seed);
  Checksum checksum;
  for (uint32_t seed = 0; seed < networks; ++seed) compare_network(seed, checksum);
  for (const Isa* const* isa = lt4rec_supported_isas(); *isa; ++isa) std::printf("%s ", (*isa)->name);
  std::printf("agree on %u networks, checksum %016llx\n", networks, checksum.value());
}
