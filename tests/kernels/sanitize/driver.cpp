// Runs the engine under a sanitizer: `driver MODE quick|full`. Prints what it did; any fault ends it.
#include <cstring>
#include <memory>
#include <thread>

#include "guarded.h"
#include "training_cases.h"

namespace {

constexpr const char* kPrecisions[] = {"fp32", "bf16", "int8"};
constexpr int64_t kLayouts[] = {LAYOUT_TABLES, LAYOUT_SLICES, LAYOUT_TABLES | LAYOUT_SLICES, LAYOUT_FILLED,
                                LAYOUT_SLICES | LAYOUT_FILLED, 0};  // 0: the engine's choice
constexpr const char* kPaths[] = {"auto", "tables", "slices", "blocks", "filled"};

bool is_quick = false;
int64_t calls = 0;

// One call; x and out may stand anywhere.
struct Arguments {
  const void* x;
  bool is_bf16;
  int64_t batch, x_stride;
  float* out;
  int64_t out_stride, threads, path;
  const float* bias = nullptr;  // where the network takes it
  int64_t bias_stride = 0;
};

int call(const Isa* isa, const uint8_t* blob, int64_t bytes, const Arguments& a) {
  const auto& header = *reinterpret_cast<const BlobHeader*>(blob);
  const SparseMlpCall whole{a.x,   a.is_bf16,      a.batch,      header.in_features, a.x_stride,
                            a.out, header.outputs, a.out_stride, a.threads,          a.path,
                            a.bias, header.bias_features, a.bias_stride};
  return lt4rec_sparse_mlp(isa, blob, bytes, &whole);
}

std::vector<uint16_t> upper_halves(const std::vector<float>& values) {
  std::vector<uint16_t> halves;
  for (float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    halves.push_back(uint16_t(bits >> 16));
  }
  return halves;
}

// A network, rows of x, and the result for each of them.
struct Case {
  const char* name;
  Prepacked prepacked;
  int64_t precision, rows, in_features, outputs;
  std::vector<float> x, wanted, bias;  // of the first layers, where the call brings it

  Case(const char* name, const Network& network, int64_t precision, int64_t rows, Random& random,
       bool takes_bias = false)
      : name(name),
        prepacked(network, precision, takes_bias),
        precision(precision),
        rows(rows),
        in_features(network.weight(network.layers[0]).in_features),
        outputs(outputs_of(network)),
        wanted(size_t(rows * outputs)) {
    CHECK(prepacked.bytes > 0, "%s: %s", name, prepacked.message.c_str());
    for (size_t i = 0; takes_bias && i < network.layers.size(); ++i) {
      if (i != 0 && !network.layers[i - 1].is_head) continue;
      std::vector<float> of_layer = network.layers[i].bias;
      of_layer.resize(size_t(network.weight(network.layers[i]).out_features));
      bias.insert(bias.end(), of_layer.begin(), of_layer.end());
    }
    CHECK(prepacked.header().bias_features == bias.size(), "%s: %zu biases", name, bias.size());
    for (int64_t i = 0; i < rows * in_features; ++i) x.push_back(float(below(random, 3) - 1));
    for (int64_t row = 0; row < rows; ++row) {
      const std::vector<float> of_row(x.begin() + row * in_features, x.begin() + (row + 1) * in_features);
      float* out = &wanted[size_t(row * outputs)];
      const Arguments arguments{of_row.data(), false, 1, in_features, out, outputs, 1, prepacked.paths()[0],
                                bias.data()};
      CHECK(call(&lt4rec_isa_scalar, prepacked.blob, prepacked.bytes, arguments) == STATUS_OK, "%s", name);
      if (precision == PRECISION_S8) continue;
      const std::vector<float> plain = reference(network, of_row, precision == PRECISION_BF16);
      for (int64_t i = 0; i < outputs; ++i)
        CHECK(out[i] == plain[size_t(i)], "%s %s row %lld output %lld: got %g, wanted %g", name,
              kPrecisions[precision], (long long)row, (long long)i, double(out[i]), double(plain[size_t(i)]));
    }
  }

  // The biases of a batch, each row with its own, or of one row for all.
  std::vector<float> biases(int64_t batch, bool is_own) const {
    std::vector<float> all;
    for (int64_t row = 0; row < (is_own ? batch : 1); ++row) all.insert(all.end(), bias.begin(), bias.end());
    return exactly(all);
  }

  void check(const char* isa, int64_t path, int64_t batch, const float* out, int64_t out_stride) const {
    for (int64_t row = 0; row < batch; ++row)
      for (int64_t i = 0; i < outputs; ++i)
        CHECK(out[row * out_stride + i] == wanted[size_t(row * outputs + i)],
              "%s %s %s %s batch %lld row %lld output %lld: got %g, wanted %g", name, kPrecisions[precision], isa,
              kPaths[path], (long long)batch, (long long)row, (long long)i, double(out[row * out_stride + i]),
              double(wanted[size_t(row * outputs + i)]));
  }
};

struct Shape {
  const char* name;
  std::vector<std::vector<int>> tasks;
  double density;
  double share = 0;    // of the first layer's union that each task keeps; 0: no sharing
  int64_t parts = 0;   // that a task adds at most
};

std::vector<Shape> shapes() {
  if (is_quick)
    return {
        {"odd", {{33, 17, 3}}, 0.4},
        {"several", {{66, 81, 2}, {66, 7}}, 0.3},
        {"shared", {{130, 33, 5}, {130, 33}}, 0.3, 0.9, 2},
        {"shared in pairs", {{150, 17, 2}, {150, 17}, {150, 17, 3}}, 0.9, 0.6, 4},
    };
  return {
      {"one weight", {{1, 1}}, 1},
      {"odd", {{33, 17, 3}}, 0.4},
      {"blocks", {{129, 257, 5}}, 0.15},
      {"several", {{66, 81, 18, 2}, {66, 7}, {66, 40, 1}}, 0.3},
      {"shared", {{130, 33, 5}, {130, 33, 20, 1}, {130, 33}}, 0.3, 0.9, 2},
      {"shared in pairs", {{300, 33, 5}, {300, 33, 20, 1}, {300, 33}}, 0.9, 0.6, 4},
      {"shared by many", {{200, 16, 1}, {200, 16}, {200, 16}, {200, 16}, {200, 16}, {200, 16}, {200, 16}, {200, 16},
                          {200, 16}, {200, 16}}, 0.9, 0.9, 4},
      {"dead", {{70, 9, 3}}, 0},
      {"full", {{65, 64, 16, 15}}, 1},
      {"wide", {{31, 300, 1}}, 0.2},
      {"deep", {{16, 15, 17, 31, 32, 33, 63, 64, 65, 1}}, 0.4},
      {"window edges", {{127, 128, 63, 47}}, 0.1},
      {"shared full", {{64, 65, 5}, {64, 65, 5}, {64, 65, 5}, {64, 65}}, 0.9, 0.9, 2},
      {"long", {{1025, 40, 2}}, 0.05},
  };
}

std::vector<int64_t> batches() {
  if (is_quick) return {1, 3, 8, 9, 16, 17, 33, 65};
  std::vector<int64_t> all;
  for (int64_t batch = 1; batch <= 70; ++batch) all.push_back(batch);
  return all;
}

// Calls `use(case, isa, path, batch)` for every combination.
template <class Use>
void for_all(Use use) {
  Random random(1);
  const std::vector<Shape> of_shapes = shapes();
  for (const bool is_blocks : {false, true})
    for (const Shape& shape : of_shapes) {
      const Network network = random_network(random, shape.tasks, shape.density, shape.share, is_blocks);
      for (int64_t precision = PRECISION_F32; precision <= PRECISION_S8; ++precision) {
        const bool takes_bias = (&shape - &of_shapes[0]) % 2 == 1;
        const Case some(shape.name, network, precision, batches().back(), random, takes_bias);
        const int64_t parts = some.prepacked.most_parts();
        CHECK(is_blocks ? (parts > 0) == (shape.parts > 0) : parts == shape.parts, "%s: %lld", shape.name,
              (long long)parts);
        for (const Isa* const* isa = lt4rec_supported_isas(); *isa; ++isa)
          for (int64_t path : some.prepacked.paths())
            for (int64_t batch : batches()) use(some, *isa, path, batch), ++calls;
      }
    }
}

// Rows with and without gaps, float32 and bfloat16; each array exactly as long as it must be.
void run_cases() {
  for_all([](const Case& some, const Isa* isa, int64_t path, int64_t batch) {
    const int64_t apart = batch % 2 * 3, x_stride = some.in_features + apart, out_stride = some.outputs + apart;
    std::vector<float> x(size_t((batch - 1) * x_stride + some.in_features));
    std::vector<float> out(size_t((batch - 1) * out_stride + some.outputs));
    for (int64_t row = 0; row < batch; ++row)
      std::copy_n(&some.x[size_t(row * some.in_features)], some.in_features, &x[size_t(row * x_stride)]);
    const std::vector<uint16_t> halves = exactly(upper_halves(x));
    const bool is_bf16 = batch % 3 == 0;
    const void* from = is_bf16 ? static_cast<const void*>(halves.data()) : x.data();
    const bool is_own = batch % 4 < 2;
    const std::vector<float> biases = some.biases(batch, is_own);
    const Arguments arguments{from,  is_bf16, batch, x_stride,      out.data(),
                              out_stride, 1, path,  biases.data(), is_own ? int64_t(some.bias.size()) : 0};
    CHECK(call(isa, some.prepacked.blob, some.prepacked.bytes, arguments) == STATUS_OK, "%s", some.name);
    some.check(isa->name, path, batch, out.data(), out_stride);
  });
}

// x, out, the blob and every kernel's arguments between inaccessible pages, at their ends and at their starts.
void run_guarded() {
  GuardedPages blob_pages(1 << 22), x_pages(1 << 20), out_pages(1 << 20), bias_pages(1 << 20);
  for_all([&](const Case& some, const Isa* isa, int64_t path, int64_t batch) {
    for (const bool is_at_end : {true, false}) {
      const int64_t x_count = batch * some.in_features;
      uint8_t* blob = blob_pages.take<uint8_t>(some.prepacked.bytes, is_at_end);
      std::memcpy(blob, some.prepacked.blob, size_t(some.prepacked.bytes));
      float* x = x_pages.take<float>(x_count, is_at_end);
      std::memcpy(x, some.x.data(), size_t(x_count) * sizeof(float));
      float* out = out_pages.take<float>(batch * some.outputs, is_at_end);
      const Isa wrapped = guarded::wrap(isa, is_at_end);
      const bool is_own = batch % 4 < 2;
      const std::vector<float> biases = some.biases(batch, is_own);
      float* bias = bias_pages.take<float>(int64_t(biases.size()), is_at_end);
      std::copy(biases.begin(), biases.end(), bias);
      const Arguments arguments{x, false, batch, some.in_features, out, some.outputs, 1, path,
                                bias, is_own ? int64_t(some.bias.size()) : 0};
      CHECK(call(&wrapped, blob, some.prepacked.bytes, arguments) == STATUS_OK, "%s", some.name);
      some.check(isa->name, path, batch, out, some.outputs);
    }
  });
}

// Several callers at the same time, each with a team of threads, on one blob and one x; some of them also prepack.
void run_threads() {
  Random random(2);
  for (const bool is_blocks : {false, true})
  for (int64_t precision = PRECISION_F32; precision <= PRECISION_S8; ++precision) {
    // Work enough for a team, also in int8.
    const Network network = random_network(random, {{200, 170, 3}, {200, 170}}, 0.9, 0.9, is_blocks);
    const Case some("threads", network, precision, 70, random);
    const auto prepack_again = [&] {
      const Prepacked again(network, precision);
      CHECK(again.bytes == some.prepacked.bytes, "%lld bytes", (long long)again.bytes);
      CHECK(std::memcmp(again.blob, some.prepacked.blob, size_t(again.bytes)) == 0, "prepacked twice");
    };
    for (const Isa* const* isa = lt4rec_supported_isas(); *isa; ++isa) {
      const bool is_first = isa == lt4rec_supported_isas();
      if (is_quick && isa[1] && !is_first) continue;  // the slowest and the fastest
      for (int64_t path : some.prepacked.paths()) {
        std::vector<std::thread> callers;
        for (int64_t threads : {1, 3, 4}) {
          ++calls;
          callers.emplace_back([&, threads] {
            std::vector<float> out(size_t(some.rows * some.outputs));
            const Arguments arguments{some.x.data(), false,        some.rows, some.in_features,
                                      out.data(),    some.outputs, threads,   path};
            CHECK(call(*isa, some.prepacked.blob, some.prepacked.bytes, arguments) == STATUS_OK, "threads");
            some.check((*isa)->name, path, some.rows, out.data(), some.outputs);
            if (is_first && path == some.prepacked.paths()[0] && threads > 1) prepack_again();
          });
        }
        for (std::thread& caller : callers) caller.join();
      }
    }
  }
}

bool is_canonical(const Network& network, const Layer& layer, int64_t precision) {
  const Weight& weight = network.weight(layer);
  int64_t kept = 0;
  for (int64_t row = 0; row < weight.out_features; ++row)
    for (int64_t column = 0; column < weight.in_features; ++column) kept += weight.any_keeps(row, column);
  if (kept != int64_t(weight.values.size())) return false;
  if (!weight.planes.empty()) {
    if (layer.task < 0 || layer.task >= weight.tasks) return false;
    for (int64_t row = 0; row < weight.tasks * weight.out_features; ++row)
      for (int64_t bit = weight.in_features; bit < 8 * weight.row_bytes(); ++bit)
        if (weight.planes[size_t(row * weight.row_bytes() + bit / 8)] >> (bit % 8) & 1) return false;
  }
  if (precision != PRECISION_S8) return true;
  for (float value : weight.values)
    if (!std::isfinite(value)) return false;
  for (float value : layer.bias)
    if (!std::isfinite(value)) return false;
  return layer.input_scale > 0 && std::isfinite(float(1 / layer.input_scale)) && layer.input_scale < 3e38 &&
         layer.input_zero_point >= 0 && layer.input_zero_point <= 255;
}

template <class T>
T& any_of(Random& random, std::vector<T>& values) {
  return values[size_t(below(random, int64_t(values.size())))];
}

// Writes something wrong, or not so wrong, into one layer or its weight.
void mutate(Random& random, Network& network) {
  Layer& layer = any_of(random, network.layers);
  Weight& weight = network.weights[layer.weight];
  const int64_t edges[] = {INT64_MIN, INT32_MIN, -1, 0, 1, weight.tasks - 1, weight.tasks, 256, INT32_MAX, INT64_MAX};
  const int64_t edge = edges[below(random, 10)];
  const uint8_t bytes[] = {0, 1, 0x7f, 0x80, 0xff};
  const float odd[] = {NAN, INFINITY, -INFINITY, 1e-45f, 3e38f, -0.0f, 127.0f, 1e-30f};
  const double scales[] = {0, -1, NAN, INFINITY, 1e-320, 1e-40, 3e-39, 1e-30, 1, 1e30, 2.9e38, 1e300};
  switch (below(random, 9)) {
    case 0:
      if (!weight.planes.empty()) any_of(random, weight.planes) ^= uint8_t(1 << below(random, 8));
      break;
    case 1:
      if (!weight.planes.empty()) any_of(random, weight.planes) = bytes[below(random, 5)];
      break;
    case 2:
      if (!weight.planes.empty()) std::swap(any_of(random, weight.planes), any_of(random, weight.planes));
      break;
    case 3: layer.task = edge; break;
    case 4:
      if (!weight.values.empty()) any_of(random, weight.values) = odd[below(random, 8)];
      break;
    case 5:
      if (!layer.bias.empty()) any_of(random, layer.bias) = odd[below(random, 8)];
      break;
    case 6: layer.input_scale = scales[below(random, 12)]; break;
    case 7: layer.input_zero_point = edge; break;
    default:
      if (weight.values.empty() || chance(random, 0.5)) weight.values.push_back(1);
      else weight.values.pop_back();
  }
}

// Every mutant is refused with a reason, or has the same result on every path that it was prepacked for.
void run_fuzz() {
  Random random(3);
  int64_t refused = 0;
  for (int64_t round = 0; round < (is_quick ? 400 : 15000); ++round, ++calls) {
    const int width = 1 + below(random, 40), hidden = 1 + below(random, 70);
    std::vector<std::vector<int>> tasks(size_t(1 + below(random, 3)), {width, hidden, 1 + below(random, 5)});
    if (chance(random, 0.3)) tasks.push_back({width, 1 + below(random, 70)});
    Network network = random_network(random, tasks, 0.4, chance(random, 0.5) ? 0 : chance(random, 0.5) ? 0.6 : 0.9);
    for (int mutations = below(random, 4); mutations > 0; --mutations) mutate(random, network);
    const int64_t precision = below(random, 3), layouts = kLayouts[below(random, 6)];
    const std::vector<Layer>& layers = network.layers;
    bool is_wanted = true;
    for (const Layer& layer : layers) is_wanted = is_wanted && is_canonical(network, layer, precision);
    if (precision == PRECISION_S8)  // x is quantised once for all tasks
      for (size_t i = 1; i < layers.size(); ++i)
        if (layers[i - 1].is_head)
          is_wanted = is_wanted && layers[i].input_scale == layers[0].input_scale &&
                      layers[i].input_zero_point == layers[0].input_zero_point;
    const Prepacked prepacked(network, precision, layouts);
    if (!is_wanted) {
      ++refused;
      CHECK(prepacked.bytes == -1 && !prepacked.message.empty() && prepacked.blob == nullptr, "round %lld: accepted",
            (long long)round);
      continue;
    }
    CHECK(prepacked.bytes > 0, "round %lld: refused: %s", (long long)round, prepacked.message.c_str());
    const int64_t batch = 1 + below(random, 20), outputs = outputs_of(network);
    std::vector<float> x(size_t(batch * width)), first;
    for (float& value : x) value = float(below(random, 7) - 3);
    for (const Isa* const* isa = lt4rec_supported_isas(); *isa; ++isa)
      for (int64_t path : {PATH_AUTO, PATH_TABLES, PATH_SLICES, PATH_FILLED}) {
        std::vector<float> out(size_t(batch * outputs));
        const Arguments arguments{x.data(), false, batch, width, out.data(), outputs, 1, path};
        const bool has_layout = prepacked.has(path);
        const int status = call(*isa, prepacked.blob, prepacked.bytes, arguments);
        CHECK(status == (has_layout ? STATUS_OK : STATUS_NO_LAYOUT), "round %lld: status %d", (long long)round, status);
        if (!has_layout) continue;
        if (first.empty()) first = out;
        for (size_t i = 0; i < out.size(); ++i)
          CHECK(out[i] == first[i] || (std::isnan(out[i]) && std::isnan(first[i])), "round %lld %s %s: got %g, wanted %g",
                (long long)round, (*isa)->name, kPaths[path], double(out[i]), double(first[i]));
      }
  }
  std::printf("%lld refused, ", (long long)refused);
}

// Sizes that no array has are refused before anything is allocated for them.
void run_huge() {
  for (const int64_t in_features : {int64_t{1} << 31, (int64_t{1} << 32) + 1, int64_t{1} << 62}) {
    Network network;
    network.layers.emplace_back().is_head = 1;
    Weight& dense = network.weights.emplace_back();
    dense.in_features = in_features;
    dense.out_features = 1;
    dense.values = {1};
    for (int64_t precision = PRECISION_F32; precision <= PRECISION_S8; ++precision, ++calls) {
      const Prepacked prepacked(network, precision);
      CHECK(prepacked.bytes == -1, "in_features %lld", (long long)in_features);
    }
  }
}

// A header that asks for more scratch memory than there is.
void run_without_memory() {
  Random random(4);
  const Network network = random_network(random, {{20, 16, 2}}, 0.5, 0);
  std::vector<float> x(64 * 20), out(64 * 2);
  for (int64_t precision = PRECISION_F32; precision <= PRECISION_S8; ++precision) {
    const Prepacked prepacked(network, precision);
    auto& header = *reinterpret_cast<BlobHeader*>(prepacked.blob);
    header.hidden_features = UINT32_MAX / GROUP * GROUP;
    header.multiply_adds = 1'000'000'000;  // enough work for several threads
    for (int64_t path : prepacked.paths())
      for (int64_t threads : {1, 4}) {
        ++calls;
        const Arguments arguments{x.data(), false, 64, 20, out.data(), 2, threads, path};
        const int status = call(&lt4rec_isa_scalar, prepacked.blob, prepacked.bytes, arguments);
        CHECK(status == STATUS_NO_MEMORY, "%s %s: status %d", kPrecisions[precision], kPaths[path], status);
      }
  }
}

// A fault that a sanitizer must find; else its silence elsewhere means nothing.
void run_fault(const std::string& fault) {
  Random random(5);
  const Network network = random_network(random, {{300, 260, 3}}, 0.9, 0);
  const Case some("fault", network, PRECISION_F32, 64, random);
  std::vector<float> out(some.wanted.size());
  const auto run = [&](const float* x, int64_t out_stride, int64_t threads) {
    const Arguments arguments{x, false, some.rows, some.in_features, out.data(), out_stride, threads, PATH_TABLES};
    call(&lt4rec_isa_scalar, some.prepacked.blob, some.prepacked.bytes, arguments);
  };
  if (fault == "overrun") {  // x is one float short
    const std::vector<float> x(some.x.begin(), some.x.end() - 1);
    run(x.data(), some.outputs, 1);
  } else if (fault == "page") {  // the same, and a page comes next
    GuardedPages pages(1 << 20);
    run(pages.take<float>(int64_t(some.x.size()) - 1, true), some.outputs, 1);
  } else if (fault == "misaligned") {
    const std::vector<uint16_t> halves(10);
    const char* odd = reinterpret_cast<const char*>(halves.data()) + 1;
    lt4rec_isa_scalar.widen_bf16(reinterpret_cast<const uint16_t*>(odd), 9, out.data());
  } else if (fault == "race") {  // two callers, one out
    std::thread other(run, some.x.data(), some.outputs, 1);
    run(some.x.data(), some.outputs, 1);
    other.join();
  } else if (fault == "team") {  // one row of out for all of a team
    run(some.x.data(), 0, 4);
  } else {
    CHECK(false, "no such fault: %s", fault.c_str());
  }
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 3, "usage: driver cases|guarded|threads|training|fuzz|huge|memory|overrun|misaligned|page|race|team quick|full");
  const std::string mode = argv[1];
  is_quick = std::string(argv[2]) == "quick";
  if (mode == "cases") run_cases();
  else if (mode == "guarded") run_guarded();
  else if (mode == "threads") run_threads();
  else if (mode == "training") calls += training_cases::run(3, is_quick);
  else if (mode == "fuzz") run_fuzz();
  else if (mode == "huge") run_huge();
  else if (mode == "memory") run_without_memory();
  else run_fault(mode);
  std::printf("%s: %lld calls\n", mode.c_str(), (long long)calls);
}
