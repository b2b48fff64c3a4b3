// Panels of the batch through the layers and back. See training.h.
#include "training.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

using std::size_t;

// Whole lines of the cache: a register's load across two of them takes twice as long.
struct Aligned {
  static constexpr std::align_val_t kLine{64};
  void operator()(float* floats) const { ::operator delete(floats, kLine); }
};
using Floats = std::unique_ptr<float[], Aligned>;
Floats floats(int64_t count) {
  return Floats(static_cast<float*>(::operator new(size_t(count) * sizeof(float), Aligned::kLine)));
}

const TrainingKernels& kernels_of(const Isa* isa) {
#if defined(__x86_64__)
  if (std::strncmp(isa->name, "avx512", 6) == 0) return lt4rec_training_avx512;
  if (std::strncmp(isa->name, "avx2", 4) == 0) return lt4rec_training_avx2;
#endif
  (void)isa;
  return lt4rec_training_scalar;
}

int64_t whole_groups(int64_t features) { return (features + GROUP - 1) / GROUP * GROUP; }
int64_t panels_of(int64_t batch) { return (batch + PANEL_ROWS - 1) / PANEL_ROWS; }
int64_t rows_of(int64_t batch, int64_t panel) { return std::min<int64_t>(PANEL_ROWS, batch - panel * PANEL_ROWS); }
int64_t panel_floats(int64_t features) { return whole_groups(features) * PANEL_ROWS; }
int64_t block_floats(const TrainingLayer& layer) { return layer.is_blocks ? GROUP * QUAD : 1; }

// The features that a panel has beyond those of its layer are zeros.
void clear_rest(int64_t features, float* panel) {
  std::fill(panel + features * PANEL_ROWS, panel + panel_floats(features), 0.0f);
}

// Rows of a batch as a panel: zeros where it has none.
void to_panel(const Isa* isa, const float* from, int64_t stride, int64_t rows, int64_t features, float* panel) {
  const int64_t at_once = kernels_of(isa).rows_at_once;
  if (rows < PANEL_ROWS) std::fill(panel, panel + features * PANEL_ROWS, 0.0f);
  clear_rest(features, panel);
  for (int64_t row = 0; row < rows; row += at_once)
    isa->transpose_f32(from + row * stride, stride, std::min(at_once, rows - row), features, panel + row, PANEL_ROWS);
}

void from_panel(const Isa* isa, const float* panel, int64_t rows, int64_t features, float* to, int64_t stride) {
  isa->transpose_f32(panel, PANEL_ROWS, features, rows, to, stride);
}

// Calls function(i) for i < count, on several threads; no exception leaves the team.
template <class Function>
bool in_parallel(int64_t count, int64_t threads, const Function& function) {
  std::atomic<bool> has_memory{true};
  threads = std::min(count, lt4rec_usable_threads(threads));
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(std::max<int64_t>(threads, 1))) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) try {
      function(i);
    } catch (const std::bad_alloc&) {
      has_memory = false;
    }
  return has_memory;
}

// Where each layer's outputs begin among the panels that `forward` leaves; the first are those of x.
std::vector<int64_t> places(const TrainingLayer* layers, int64_t count, int64_t batch) {
  std::vector<int64_t> begins{0, panels_of(batch) * panel_floats(layers[0].in_features)};
  for (int64_t l = 0; l < count; ++l)
    begins.push_back(begins.back() + panels_of(batch) * panel_floats(layers[l].out_features));
  return begins;
}

// The rows of weights that make up a piece of work, of about as many weights each: enough of them for all threads, and
// the same whatever their number.
std::vector<int64_t> pieces(const TrainingLayer& layer, int64_t rows) {
  constexpr int64_t kPieces = 16;
  const auto* begins = reinterpret_cast<const uint32_t*>(layer.row_begins);
  std::vector<int64_t> ends{0};
  for (int64_t row = 1; row <= rows; ++row) {
    const int64_t wanted = layer.count * int64_t(ends.size()) / kPieces;
    if (row == rows || int64_t{begins[row]} >= std::max<int64_t>(wanted, 1)) ends.push_back(row);
  }
  return ends;
}

void weight_gradients(const Isa* isa, const TrainingLayer& layer, const float* dz, const float* x, int64_t batch,
                      int64_t threads, bool* has_memory) {
  const TrainingKernels& kernels = kernels_of(isa);
  const int64_t out = layer.out_features, rows = layer.is_blocks ? whole_groups(out) / GROUP : out;
  const auto* begins = reinterpret_cast<const uint32_t*>(layer.row_begins);
  auto* gradient = reinterpret_cast<float*>(layer.value_gradient);
  auto* bias_gradient = reinterpret_cast<float*>(layer.bias_gradient);
  const std::vector<int64_t> ends = pieces(layer, rows);
  const auto add = layer.is_blocks ? kernels.weights_blocks : kernels.weights_weights;
  *has_memory &= in_parallel(int64_t(ends.size()) - 1, threads, [&](int64_t piece) {
    const int64_t first = ends[size_t(piece)], last = ends[size_t(piece) + 1];
    const int64_t begin = int64_t{begins[first]} * block_floats(layer);
    const int64_t end = int64_t{begins[layer.column_tiles * rows + last - 1]} * block_floats(layer);
    std::vector<float> of_bias(size_t(whole_groups(out)));
    const Floats of_blocks = floats(layer.is_blocks ? end - begin : 0);
    float* to = layer.is_blocks ? of_blocks.get() - begin : gradient;
    std::fill(to + begin, to + end, 0.0f);
    for (int64_t panel = 0; panel < panels_of(batch); ++panel)
      add(isa, &layer, first, last, dz + panel * panel_floats(out), x + panel * panel_floats(layer.in_features), to,
          of_bias.data());
    for (int64_t at = begin; layer.is_blocks && at < end; at += GROUP * QUAD)
      isa->transpose_f32(to + at, GROUP, QUAD, GROUP, gradient + at, QUAD);
    const int64_t width = layer.is_blocks ? GROUP : 1;
    for (int64_t o = first * width; bias_gradient && o < std::min(last * width, out); ++o)
      bias_gradient[o] = of_bias[size_t(o)];
  });
}

}  // namespace

extern "C" int64_t lt4rec_training_floats(const TrainingLayer* layers, int64_t count, int64_t batch) {
  return places(layers, count, batch).back();
}

extern "C" int lt4rec_training_forward(const Isa* isa, const TrainingLayer* layers, int64_t count, const float* x,
                                       int64_t x_stride, int64_t batch, int64_t threads, float* panels, float* h,
                                       int64_t h_stride) try {
  const TrainingKernels& kernels = kernels_of(isa);
  const std::vector<int64_t> begins = places(layers, count, batch);
  std::vector<std::vector<float>> biases;
  for (int64_t l = 0; l < count; ++l) {
    biases.emplace_back(size_t(whole_groups(layers[l].out_features)));
    if (layers[l].bias)
      std::copy_n(reinterpret_cast<const float*>(layers[l].bias), layers[l].out_features, biases.back().begin());
  }
  const bool has_memory = in_parallel(panels_of(batch), threads, [&](int64_t panel) {
    const int64_t first = panel * PANEL_ROWS, rows = rows_of(batch, panel), in = layers[0].in_features;
    float* from = panels + panel * panel_floats(in);
    to_panel(isa, x + first * x_stride, x_stride, rows, in, from);
    for (int64_t l = 0; l < count; ++l) {
      const TrainingLayer& layer = layers[l];
      const int64_t out = layer.out_features;
      float* to = panels + begins[size_t(l) + 1] + panel * panel_floats(out);
      if (!layer.is_blocks) clear_rest(out, to);
      (layer.is_blocks ? kernels.forward_blocks : kernels.forward_weights)(&layer, biases[size_t(l)].data(), from, to);
      from = to;
    }
    from_panel(isa, from, rows, layers[count - 1].out_features, h + first * h_stride, h_stride);
  });
  return has_memory ? STATUS_OK : STATUS_NO_MEMORY;
} catch (const std::bad_alloc&) {
  return STATUS_NO_MEMORY;
}

extern "C" int lt4rec_training_backward(const Isa* isa, const TrainingLayer* layers, int64_t count,
                                        const float* panels, const float* dh, int64_t dh_stride, int64_t batch,
                                        int64_t threads, float* dx, int64_t dx_stride) try {
  const TrainingKernels& kernels = kernels_of(isa);
  const std::vector<int64_t> begins = places(layers, count, batch);
  const int64_t panel_count = panels_of(batch);
  bool has_memory = true;
  Floats dz = floats(panel_count * panel_floats(layers[count - 1].out_features)), before;
  has_memory &= in_parallel(panel_count, threads, [&](int64_t panel) {
    const TrainingLayer& last = layers[count - 1];
    const int64_t size = panel_floats(last.out_features);
    float* to = dz.get() + panel * size;
    to_panel(isa, dh + panel * PANEL_ROWS * dh_stride, dh_stride, rows_of(batch, panel), last.out_features, to);
    if (last.has_relu) kernels.gate(panels + begins[size_t(count)] + panel * size, size, to);
  });
  for (int64_t l = count - 1; l >= 0; --l) {
    const TrainingLayer& layer = layers[l];
    const float* x = panels + begins[size_t(l)];
    weight_gradients(isa, layer, dz.get(), x, batch, threads, &has_memory);
    if (l == 0 && !dx) break;
    const int64_t size = panel_floats(layer.in_features), of_outputs = panel_floats(layer.out_features);
    if (l > 0) before = floats(panel_count * size);
    const Floats by_column = floats(layer.is_blocks ? 0 : layer.count);
    for (int64_t i = 0; !layer.is_blocks && i < layer.count; ++i)
      by_column[size_t(i)] = reinterpret_cast<const float*>(
          layer.values)[reinterpret_cast<const uint32_t*>(layer.column_places)[i]];
    has_memory &= in_parallel(panel_count, threads, [&](int64_t panel) {
      const Floats own = floats(l > 0 ? 0 : size);
      float* to = l > 0 ? before.get() + panel * size : own.get();
      const float* of_panel = dz.get() + panel * of_outputs;
      if (layer.is_blocks)
        kernels.inputs_blocks(&layer, of_panel, to);
      else
        kernels.inputs_weights(&layer, by_column.get(), of_panel, to);
      if (l == 0)
        return from_panel(isa, to, rows_of(batch, panel), layer.in_features, dx + panel * PANEL_ROWS * dx_stride,
                          dx_stride);
      clear_rest(layer.in_features, to);
      if (layers[l - 1].has_relu) kernels.gate(x + panel * size, size, to);
    });
    dz.swap(before);
  }
  return has_memory ? STATUS_OK : STATUS_NO_MEMORY;
} catch (const std::bad_alloc&) {
  return STATUS_NO_MEMORY;
}
