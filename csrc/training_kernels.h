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
        for (uint32_t block = begins[g]; block < begins[groups + g]; ++block) {
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
      for (uint32_t item = begins[q]; item < begins[quads + q]; ++item) {
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

// Blocks of one group share its gradients: kBlocks at a time, since the four sums of one alone would wait. The inputs of
// those after them, at `next`, are fetched meanwhile, a line of the cache per row.
template <class V, int kBlocks>
inline void add_block_gradients(const float* by_row, const float* const* x, const float* const* next, float* gradient) {
  constexpr int kLines = QUAD * PANEL_ROWS / 16;  // of one block's inputs
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
    if (row < kBlocks * kLines) __builtin_prefetch(next[row / kLines] + row % kLines * 16);
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
  const uint32_t* ends = begins + (layer->out_features + GROUP - 1) / GROUP;
  alignas(64) float by_row[PANEL_ROWS * GROUP];
  for (int64_t g = first; g < last; ++g) {
    const float* of_group = dz + g * GROUP * PANEL_ROWS;
    for (int64_t o = 0; o < GROUP; ++o)
      bias_gradient[g * GROUP + o] += V::sum(Sixteen<V>::of(of_group + o * PANEL_ROWS).part);
    isa->transpose_f32(of_group, PANEL_ROWS, GROUP, PANEL_ROWS, by_row, GROUP);
    const auto inputs = [&](uint32_t block, const float** to) {
      for (uint32_t b = 0; b < kBlocks; ++b)
        to[b] = x + int64_t{quads[block + b < ends[g] ? block + b : ends[g] - 1]} * QUAD * PANEL_ROWS;
    };
    const float *now[kBlocks] = {}, *next[kBlocks];
    uint32_t block = begins[g];
    if (block < ends[g]) inputs(block, now);
    for (; block + kBlocks <= ends[g]; block += kBlocks) {
      inputs(block + kBlocks, next);
      add_block_gradients<V, kBlocks>(by_row, now, next, gradient + int64_t{block} * GROUP * QUAD);
      for (int b = 0; b < kBlocks; ++b) now[b] = next[b];
    }
    for (int b = 0; block < ends[g]; ++block, ++b)
      add_block_gradients<V, 1>(by_row, now + b, now + b, gradient + int64_t{block} * GROUP * QUAD);
  }
}

struct Product {
  uint32_t other;      // the feature that is multiplied
  const float* value;  // by this weight
};

// Adds the products of kLines rows or columns of weights, of one tile, to the sums in `to`: as many sums are under
// way. All take turns while the last has some left.
template <class V, int kLines, class Item>
inline void add_lines(const uint32_t* begins, const uint32_t* ends, const Item& item, const float* from, bool has_relu,
                      float* to) {
  constexpr int kRegisters = PANEL_ROWS / V::kWidth;
  constexpr int kAtOnce = kRegisters < 4 ? kRegisters : 4;
  uint32_t common = ends[0] - begins[0];
#pragma GCC unroll 4
  for (int l = 1; l < kLines; ++l) common = ends[l] - begins[l] < common ? ends[l] - begins[l] : common;
  for (int64_t row = 0; row < PANEL_ROWS; row += kAtOnce * V::kWidth) {
    typename V::Type sum[kLines][kAtOnce];
#pragma GCC unroll 4
    for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r) sum[l][r] = V::load(to + l * PANEL_ROWS + row + r * V::kWidth);
    const auto add = [&](int l, uint32_t place) __attribute__((always_inline)) {
      const auto [other, value] = item(place);
      const typename V::Type w = V::broadcast(value);
      const float* of_rows = from + int64_t{other} * PANEL_ROWS + row;
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r) sum[l][r] = V::fma(w, V::load(of_rows + r * V::kWidth), sum[l][r]);
    };
    for (uint32_t i = 0; i < common; ++i) {
#pragma GCC unroll 4
      for (int l = 0; l < kLines; ++l) add(l, begins[l] + i);
    }
#pragma GCC unroll 4
    for (int l = 0; l < kLines; ++l) {
      for (uint32_t place = begins[l] + common; place < ends[l]; ++place) add(l, place);
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r)
        V::store(to + l * PANEL_ROWS + row + r * V::kWidth, has_relu ? V::relu(sum[l][r]) : sum[l][r]);
    }
  }
}

// All lines, tile by tile; the last one's sums are done.
template <class V, int kLines, class Item>
inline void add_tiles(const uint32_t* begins, int64_t tiles, int64_t lines, const Item& item, const float* from,
                      bool has_relu, float* to) {
  for (int64_t tile = 0; tile < tiles; ++tile, begins += lines) {
    const bool is_last = has_relu && tile == tiles - 1;
    int64_t line = 0;
    for (; line + kLines <= lines; line += kLines)
      add_lines<V, kLines>(begins + line, begins + lines + line, item, from, is_last, to + line * PANEL_ROWS);
    for (; line < lines; ++line)
      add_lines<V, 1>(begins + line, begins + lines + line, item, from, is_last, to + line * PANEL_ROWS);
  }
}

template <class V, int kLines>
void forward_weights(const TrainingLayer* layer, const float* bias, const float* x, float* h) {
  const auto* columns = at<uint32_t>(layer->columns);
  const auto* values = at<float>(layer->values);
  for (int64_t o = 0; o < layer->out_features; ++o) {
    const typename V::Type start = V::broadcast(bias + o);
    for (int64_t row = 0; row < PANEL_ROWS; row += V::kWidth) V::store(h + o * PANEL_ROWS + row, start);
  }
  const auto item = [&](uint32_t place) { return Product{columns[place], values + place}; };
  add_tiles<V, kLines>(at<uint32_t>(layer->row_begins), layer->column_tiles, layer->out_features, item, x,
                       layer->has_relu, h);
}

template <class V, int kLines>
void inputs_weights(const TrainingLayer* layer, const float* values, const float* dz, float* dx) {
  const auto* rows = at<uint32_t>(layer->column_rows);
  for (int64_t i = 0; i < layer->in_features * PANEL_ROWS; i += V::kWidth) V::store(dx + i, V::zero());
  const auto item = [&](uint32_t place) { return Product{rows[place], values + place}; };
  add_tiles<V, kLines>(at<uint32_t>(layer->column_begins), layer->row_tiles, layer->in_features, item, dz, false, dx);
}

template <class V, int kWeights>
void weights_weights(const Isa*, const TrainingLayer* layer, int64_t first, int64_t last, const float* dz,
                     const float* x, float* gradient, float* bias_gradient) {
  constexpr int kRegisters = PANEL_ROWS / V::kWidth, kParts = Sixteen<V>::kParts;
  const auto* columns = at<uint32_t>(layer->columns);
  for (int64_t o = first; o < last; ++o)
    bias_gradient[o] += V::sum(Sixteen<V>::of(dz + o * PANEL_ROWS).part);
  for (int64_t tile = 0; tile < layer->column_tiles; ++tile) {
    const uint32_t* begins = at<uint32_t>(layer->row_begins) + tile * layer->out_features;
    for (int64_t o = first; o < last; ++o) {
      typename V::Type of_output[kRegisters];
#pragma GCC unroll 16
      for (int r = 0; r < kRegisters; ++r) of_output[r] = V::load(dz + o * PANEL_ROWS + r * V::kWidth);
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
      const uint32_t end = begins[layer->out_features + o];
      for (; place + kWeights <= end; place += kWeights) {
        Sixteen<V> sums[kWeights];
#pragma GCC unroll 4
        for (int w = 0; w < kWeights; ++w) sums[w] = sum_of(place + uint32_t(w));
        V::add_sums(sums, gradient + place);
      }
      for (; place < end; ++place) gradient[place] += V::sum(sum_of(place).part);
    }
  }
}

template <class V>
void gate(const float* h, int64_t count, float* dz) {
  for (int64_t i = 0; i < count; i += V::kWidth) V::store(dz + i, V::gate(V::load(h + i), V::load(dz + i)));
}
