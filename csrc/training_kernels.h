// The kernels of training.h, written once for registers of any width; included by the ISA files within a namespace.
//
// `V` gives: Type, kWidth, load, store, broadcast, fma(a, b, c) = a b + c, add, relu, gate(h, v): 0 where h is at most 0, else v; zero,
// and fold(low lanes ..., high lanes ...), see `Sixteen`. Tiles: kOutputs x kRowRegisters sums of `forward_blocks`,
// kInputRegisters rows of `inputs_blocks`, kBlocks at a time of `weights_blocks`.

template <class T>
inline const T* at(int64_t address) {
  return reinterpret_cast<const T*>(address);
}

template <class V, int kOutputs, int kRowRegisters>
void forward_blocks(const TrainingLayer* layer, const float* bias, const float* x, float* h) {
  const auto *begins = at<uint32_t>(layer->row_begins), *quads = at<uint32_t>(layer->columns);
  const auto* values = at<float>(layer->values);
  const int64_t groups = (layer->out_features + GROUP - 1) / GROUP;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t row = 0; row < PANEL_ROWS; row += V::kWidth * kRowRegisters)
      for (int64_t output = 0; output < GROUP; output += kOutputs) {
        typename V::Type sum[kOutputs][kRowRegisters];
#pragma GCC unroll 16
        for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 4
          for (int r = 0; r < kRowRegisters; ++r) sum[o][r] = V::broadcast(bias + g * GROUP + output + o);
        for (uint32_t block = begins[g]; block < begins[g + 1]; ++block) {
          const float* from = x + int64_t{quads[block]} * QUAD * PANEL_ROWS + row;
          const float* weight = values + int64_t{block} * GROUP * QUAD + output * QUAD;
#pragma GCC unroll 4
          for (int k = 0; k < QUAD; ++k) {
            typename V::Type of_rows[kRowRegisters];
#pragma GCC unroll 4
            for (int r = 0; r < kRowRegisters; ++r) of_rows[r] = V::load(from + k * PANEL_ROWS + r * V::kWidth);
#pragma GCC unroll 16
            for (int o = 0; o < kOutputs; ++o) {
              const typename V::Type w = V::broadcast(weight + o * QUAD + k);
#pragma GCC unroll 4
              for (int r = 0; r < kRowRegisters; ++r) sum[o][r] = V::fma(w, of_rows[r], sum[o][r]);
            }
          }
        }
        float* to = h + (g * GROUP + output) * PANEL_ROWS + row;
#pragma GCC unroll 16
        for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 4
          for (int r = 0; r < kRowRegisters; ++r)
            V::store(to + o * PANEL_ROWS + r * V::kWidth, layer->has_relu ? V::relu(sum[o][r]) : sum[o][r]);
      }
}

template <class V, int kRowRegisters>
void inputs_blocks(const TrainingLayer* layer, const float* dz, float* dx) {
  const auto *begins = at<uint32_t>(layer->column_begins), *places = at<uint32_t>(layer->column_places);
  const auto *rows = at<uint32_t>(layer->column_rows);
  const auto* values = at<float>(layer->values);
  const int64_t quads = (layer->in_features + QUAD - 1) / QUAD;
  for (int64_t q = 0; q < quads; ++q)
    for (int64_t row = 0; row < PANEL_ROWS; row += V::kWidth * kRowRegisters) {
      typename V::Type sum[QUAD][kRowRegisters];
#pragma GCC unroll 4
      for (int k = 0; k < QUAD; ++k)
#pragma GCC unroll 4
        for (int r = 0; r < kRowRegisters; ++r) sum[k][r] = V::zero();
      for (uint32_t item = begins[q]; item < begins[q + 1]; ++item) {
        const float* from = dz + int64_t{rows[item]} * GROUP * PANEL_ROWS + row;
        const float* weight = values + int64_t{places[item]} * GROUP * QUAD;
#pragma GCC unroll 4
        for (int o = 0; o < GROUP; ++o) {
          typename V::Type of_rows[kRowRegisters];
#pragma GCC unroll 4
          for (int r = 0; r < kRowRegisters; ++r) of_rows[r] = V::load(from + o * PANEL_ROWS + r * V::kWidth);
#pragma GCC unroll 4
          for (int k = 0; k < QUAD; ++k) {
            const typename V::Type w = V::broadcast(weight + o * QUAD + k);
#pragma GCC unroll 4
            for (int r = 0; r < kRowRegisters; ++r) sum[k][r] = V::fma(w, of_rows[r], sum[k][r]);
          }
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < QUAD; ++k)
#pragma GCC unroll 4
        for (int r = 0; r < kRowRegisters; ++r)
          V::store(dx + (q * QUAD + k) * PANEL_ROWS + row + r * V::kWidth, sum[k][r]);
    }
}

// Blocks of one group share its gradients: kBlocks at a time, since the four sums of one alone would wait.
template <class V, int kBlocks>
inline void add_block_gradients(const float* by_row, const float* const* x, float* gradient) {
  constexpr int kParts = GROUP / V::kWidth;
  typename V::Type sum[kBlocks][QUAD][kParts];
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
    for (int k = 0; k < QUAD; ++k)
#pragma GCC unroll 16
      for (int p = 0; p < kParts; ++p) sum[b][k][p] = V::zero();
  for (int64_t row = 0; row < PANEL_ROWS; ++row) {
    typename V::Type dz[kParts];
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) dz[p] = V::load(by_row + row * GROUP + p * V::kWidth);
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
      for (int k = 0; k < QUAD; ++k) {
        const typename V::Type of_input = V::broadcast(x[b] + k * PANEL_ROWS + row);
#pragma GCC unroll 16
        for (int p = 0; p < kParts; ++p) sum[b][k][p] = V::fma(dz[p], of_input, sum[b][k][p]);
      }
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b)
#pragma GCC unroll 4
    for (int k = 0; k < QUAD; ++k)
#pragma GCC unroll 16
      for (int p = 0; p < kParts; ++p) {
        float* to = gradient + (b * QUAD + k) * GROUP + p * V::kWidth;
        V::store(to, V::add(V::load(to), sum[b][k][p]));
      }
}

// Sixteen sums of the rows of a panel, as many registers as that takes.
template <class V>
struct Sixteen {
  static constexpr int kParts = 16 / V::kWidth;
  typename V::Type part[kParts];

  static Sixteen of(const float* v) {
    Sixteen sum;
#pragma GCC unroll 16
    for (int p = 0; p < kParts; ++p) sum.part[p] = V::load(v + p * V::kWidth);
#pragma GCC unroll 4
    for (int i = 16; i < PANEL_ROWS; i += 16)
#pragma GCC unroll 16
      for (int p = 0; p < kParts; ++p) sum.part[p] = V::add(sum.part[p], V::load(v + i + p * V::kWidth));
    return sum;
  }
};

template <class V, int kBlocks>
void weights_blocks(const Isa* isa, const TrainingLayer* layer, int64_t first, int64_t last, const float* dz,
                    const float* x, float* gradient, float* bias_gradient) {
  const auto *begins = at<uint32_t>(layer->row_begins), *quads = at<uint32_t>(layer->columns);
  alignas(64) float by_row[PANEL_ROWS * GROUP];
  for (int64_t g = first; g < last; ++g) {
    const float* of_group = dz + g * GROUP * PANEL_ROWS;
    for (int64_t o = 0; o < GROUP; ++o)
      bias_gradient[g * GROUP + o] += V::sum(Sixteen<V>::of(of_group + o * PANEL_ROWS).part);
    isa->transpose_f32(of_group, PANEL_ROWS, GROUP, PANEL_ROWS, by_row, GROUP);
    const float* of_blocks[kBlocks];
    uint32_t block = begins[g];
    for (; block + kBlocks <= begins[g + 1]; block += kBlocks) {
      for (int b = 0; b < kBlocks; ++b) of_blocks[b] = x + int64_t{quads[block + uint32_t(b)]} * QUAD * PANEL_ROWS;
      add_block_gradients<V, kBlocks>(by_row, of_blocks, gradient + int64_t{block} * GROUP * QUAD);
    }
    if constexpr (kBlocks > 2)
      for (; block + 2 <= begins[g + 1]; block += 2) {
        for (int b = 0; b < 2; ++b) of_blocks[b] = x + int64_t{quads[block + uint32_t(b)]} * QUAD * PANEL_ROWS;
        add_block_gradients<V, 2>(by_row, of_blocks, gradient + int64_t{block} * GROUP * QUAD);
      }
    for (; block < begins[g + 1]; ++block) {
      of_blocks[0] = x + int64_t{quads[block]} * QUAD * PANEL_ROWS;
      add_block_gradients<V, 1>(by_row, of_blocks, gradient + int64_t{block} * GROUP * QUAD);
    }
  }
}

// A panel's rows of kLines sparse lines in turn, whose products are added while all have some left.
template <class V, int kLines, class Item>
inline void add_lines(const uint32_t* begins, const Item& item, const float* from, const float* start, bool has_relu,
                      float* to) {
  constexpr int kRegisters = PANEL_ROWS / V::kWidth;
  constexpr int kAtOnce = kRegisters < 4 ? kRegisters : 4;
  for (int64_t row = 0; row < PANEL_ROWS; row += kAtOnce * V::kWidth) {
    typename V::Type sum[kLines][kAtOnce];
#pragma GCC unroll 4
    for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r) sum[l][r] = start ? V::broadcast(start + l) : V::zero();
    const auto add = [&](int l, uint32_t place) __attribute__((always_inline)) {
      const auto [other, value] = item(place);
      const typename V::Type w = V::broadcast(value);
      const float* of_rows = from + int64_t{other} * PANEL_ROWS + row;
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r) sum[l][r] = V::fma(w, V::load(of_rows + r * V::kWidth), sum[l][r]);
    };
    uint32_t common = begins[1] - begins[0];
#pragma GCC unroll 4
    for (int l = 1; l < kLines; ++l)
      common = begins[l + 1] - begins[l] < common ? begins[l + 1] - begins[l] : common;
    for (uint32_t i = 0; i < common; ++i) {
#pragma GCC unroll 4
      for (int l = 0; l < kLines; ++l) add(l, begins[l] + i);
    }
#pragma GCC unroll 4
    for (int l = 0; l < kLines; ++l) {
      for (uint32_t place = begins[l] + common; place < begins[l + 1]; ++place) add(l, place);
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r)
        V::store(to + l * PANEL_ROWS + row + r * V::kWidth, has_relu ? V::relu(sum[l][r]) : sum[l][r]);
    }
  }
}

struct Product {
  uint32_t other;      // the feature that is multiplied
  const float* value;  // by this weight
};

template <class V, int kLines>
void forward_weights(const TrainingLayer* layer, const float* bias, const float* x, float* h) {
  const auto *begins = at<uint32_t>(layer->row_begins), *columns = at<uint32_t>(layer->columns);
  const auto* values = at<float>(layer->values);
  const auto item = [&](uint32_t place) { return Product{columns[place], values + place}; };
  int64_t o = 0;
  for (; o + kLines <= layer->out_features; o += kLines)
    add_lines<V, kLines>(begins + o, item, x, bias + o, layer->has_relu, h + o * PANEL_ROWS);
  for (; o < layer->out_features; ++o)
    add_lines<V, 1>(begins + o, item, x, bias + o, layer->has_relu, h + o * PANEL_ROWS);
}

template <class V, int kLines>
void inputs_weights(const TrainingLayer* layer, const float* dz, float* dx) {
  const auto *begins = at<uint32_t>(layer->column_begins), *places = at<uint32_t>(layer->column_places);
  const auto *rows = at<uint32_t>(layer->column_rows);
  const auto* values = at<float>(layer->values);
  const auto item = [&](uint32_t place) { return Product{rows[place], values + places[place]}; };
  int64_t i = 0;
  for (; i + kLines <= layer->in_features; i += kLines)
    add_lines<V, kLines>(begins + i, item, dz, nullptr, false, dx + i * PANEL_ROWS);
  for (; i < layer->in_features; ++i)
    add_lines<V, 1>(begins + i, item, dz, nullptr, false, dx + i * PANEL_ROWS);
}

template <class V, int kWeights>
void weights_weights(const Isa*, const TrainingLayer* layer, int64_t first, int64_t last, const float* dz,
                     const float* x, float* gradient, float* bias_gradient) {
  constexpr int kRegisters = PANEL_ROWS / V::kWidth, kParts = Sixteen<V>::kParts;
  const auto *begins = at<uint32_t>(layer->row_begins), *columns = at<uint32_t>(layer->columns);
  for (int64_t o = first; o < last; ++o) {
    typename V::Type of_output[kRegisters];
#pragma GCC unroll 16
    for (int r = 0; r < kRegisters; ++r) of_output[r] = V::load(dz + o * PANEL_ROWS + r * V::kWidth);
    bias_gradient[o] += V::sum(Sixteen<V>::of(dz + o * PANEL_ROWS).part);
    const auto sum_of = [&](uint32_t place) __attribute__((always_inline)) {
      const float* of_input = x + int64_t{columns[place]} * PANEL_ROWS;
      Sixteen<V> sum;
#pragma GCC unroll 16
      for (int p = 0; p < kParts; ++p) sum.part[p] = V::zero();
#pragma GCC unroll 16
      for (int r = 0; r < kRegisters; ++r)
        sum.part[r % kParts] = V::fma(of_output[r], V::load(of_input + r * V::kWidth), sum.part[r % kParts]);
      return sum;
    };
    uint32_t place = begins[o];
    for (; place + kWeights <= begins[o + 1]; place += kWeights) {
      Sixteen<V> sums[kWeights];
#pragma GCC unroll 4
      for (int w = 0; w < kWeights; ++w) sums[w] = sum_of(place + uint32_t(w));
      V::add_sums(sums, gradient + place);
    }
    for (; place < begins[o + 1]; ++place) gradient[place] += V::sum(sum_of(place).part);
  }
}

template <class V>
void gate(const float* h, int64_t count, float* dz) {
  for (int64_t i = 0; i < count; i += V::kWidth) V::store(dz + i, V::gate(V::load(h + i), V::load(dz + i)));
}
