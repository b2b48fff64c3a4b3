// The call: cuts the batch into tiles, spreads them over threads, and takes each tile through every task's layers.
#include <omp.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "engine.h"

namespace {

struct Call {
  const Isa* isa;
  const uint8_t* blob;
  const BlobHeader* header;
  const float* x;
  int64_t batch, x_stride;
  float* out;
  int64_t out_stride;
};

// One thread's memory: the transposed input, which every task reads, and two tiles that the layers fill in turn.
class Scratch {
 public:
  Scratch(const BlobHeader& header, int lanes) {
    const int64_t row_bytes = lane_stride(lanes) * int64_t{sizeof(float)};  // a multiple of 64: rows stay aligned
    const int64_t input_bytes = tile_rows(header.in_features) * row_bytes, hidden_bytes = header.hidden_rows * row_bytes;
    memory_ = static_cast<char*>(std::aligned_alloc(64, size_t(input_bytes + 2 * hidden_bytes)));
    input = reinterpret_cast<float*>(memory_);
    hidden[0] = reinterpret_cast<float*>(memory_ + input_bytes);
    hidden[1] = reinterpret_cast<float*>(memory_ + input_bytes + hidden_bytes);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool is_allocated() const { return memory_ != nullptr; }

  float* input;
  float* hidden[2];

 private:
  char* memory_;
};

// Rows [begin, begin + rows) of x -> a tile. Lanes past `rows` become zeros: they are computed and dropped, and
// whatever stood there before might be denormal, which is slow.
void load_tile(const Call& call, int64_t begin, int64_t rows, int lanes, float* tile) {
  const int64_t in_features = call.header->in_features, stride = lane_stride(lanes);
  if (rows < lanes) std::memset(tile, 0, size_t(tile_rows(in_features) * stride) * sizeof(float));
  for (int64_t feature = 0; feature < in_features; feature += BLOCK_FEATURES) {
    float* first = tile + tile_row(feature) * stride;
    const int64_t columns = block_features(in_features, feature);
    std::memset(first - stride, 0, size_t(stride) * sizeof(float));
    call.isa->transpose_f32(call.x + begin * call.x_stride + feature, call.x_stride, rows, columns, first, stride);
  }
}

// A head's tile -> rows [begin, begin + rows) of out, from `column` on.
void store_tile(const Call& call, int64_t begin, int64_t rows, int lanes, const LayerRecord& head, int64_t column,
                const float* tile) {
  const int64_t out_features = head.out_features, stride = lane_stride(lanes);
  for (int64_t feature = 0; feature < out_features; feature += BLOCK_FEATURES) {
    const int64_t features = block_features(out_features, feature);
    call.isa->transpose_f32(tile + tile_row(feature) * stride, stride, features, rows,
                            call.out + begin * call.out_stride + column + feature, call.out_stride);
  }
}

// In place, features only: the rows of zeros must stay zeros. Where exp overflows the quotient is 0, as it should be.
void apply_sigmoid(const LayerRecord& layer, int64_t rows, int lanes, float* tile) {
  for (int64_t feature = 0; feature < layer.out_features; ++feature) {
    float* row = tile + tile_row(feature) * lane_stride(lanes);
    for (int64_t lane = 0; lane < rows; ++lane) row[lane] = 1 / (1 + std::exp(-row[lane]));
  }
}

void run_tile(const Call& call, int64_t begin, int64_t rows, int lanes, const Scratch& scratch) {
  const auto* layers = reinterpret_cast<const LayerRecord*>(call.header + 1);
  load_tile(call, begin, rows, lanes, scratch.input);
  const float* input = scratch.input;
  int64_t column = 0;
  for (uint32_t i = 0; i < call.header->layers; ++i) {
    const LayerRecord& layer = layers[i];
    float* y = scratch.hidden[i % 2];
    call.isa->layer_f32(call.blob, &layer, input, y, lanes);
    if (layer.activation == ACTIVATION_SIGMOID) apply_sigmoid(layer, rows, lanes, y);
    input = y;
    if (layer.is_head) {
      store_tile(call, begin, rows, lanes, layer, column, y);
      column += layer.out_features;
      input = scratch.input;
    }
  }
}

// How wide a tile can be, and its measured time, in quarters of a 16-lane tile's: wide tiles are cheap, for they fetch
// each weight and offset once for more rows.
struct Width {
  int lanes, cost;
};
constexpr Width kWidths[] = {{8, 4}, {16, 4}, {32, 6}, {64, 10}};

const Width& narrowest_for(int64_t rows) {
  const Width* width = kWidths;
  while (width->lanes < rows) ++width;
  return *width;
}

// The lanes of all tiles but the last, which takes no more than it needs: those for which the busiest thread is done
// first. Wide tiles leave threads idle in a small batch.
int choose_lanes(int64_t batch, int64_t threads) {
  int best = 0;
  int64_t best_cost = INT64_MAX;
  for (const Width& width : kWidths) {
    const int64_t full = batch / width.lanes, rest = batch % width.lanes;
    const int64_t last = full % threads ? width.cost : rest ? narrowest_for(rest).cost : 0;
    const int64_t cost = full / threads * width.cost + last;
    if (cost <= best_cost) best = width.lanes, best_cost = cost;
  }
  return batch < best ? narrowest_for(batch).lanes : best;
}

// How many threads to take of those offered. Half a million products take some 20 us, as long as waking a team may.
// More threads than processors only wait for each other, and libgomp ends the process where it cannot start one.
int64_t choose_threads(const BlobHeader& header, int64_t batch, int64_t offered) {
  if (offered == 1 || int64_t(header.stored) * batch < 500'000) return 1;
  const int64_t processors = omp_get_num_procs();
  return offered < processors ? offered : processors;
}

}  // namespace

extern "C" int lt4rec_check_blob(const uint8_t* blob, int64_t bytes) {
  if (blob == nullptr || bytes < int64_t{sizeof(BlobHeader)} || reinterpret_cast<uintptr_t>(blob) % 8 != 0)
    return STATUS_BAD_BLOB;
  const auto* header = reinterpret_cast<const BlobHeader*>(blob);
  const bool is_ours = header->magic == BLOB_MAGIC && header->version == BLOB_VERSION;
  return is_ours && header->bytes == uint64_t(bytes) ? STATUS_OK : STATUS_BAD_BLOB;
}

extern "C" int lt4rec_sparse_mlp_f32(const Isa* isa, const uint8_t* blob, int64_t bytes, const float* x, int64_t batch,
                                     int64_t in_features, int64_t x_stride, float* out, int64_t outputs,
                                     int64_t out_stride, int64_t threads) {
  if (const int status = lt4rec_check_blob(blob, bytes)) return status;
  const auto* header = reinterpret_cast<const BlobHeader*>(blob);
  if (in_features != header->in_features || outputs != header->outputs) return STATUS_BAD_SHAPE;
  if (batch == 0) return STATUS_OK;

  const Call call{isa, blob, header, x, batch, x_stride, out, out_stride};
  threads = choose_threads(*header, batch, threads);
  const int lanes = choose_lanes(batch, threads);
  const int64_t tiles = (batch + lanes - 1) / lanes;
  const auto run = [&](int64_t tile, const Scratch& scratch) {
    const int64_t begin = tile * lanes, rows = batch - begin < lanes ? batch - begin : lanes;
    run_tile(call, begin, rows, narrowest_for(rows).lanes, scratch);
  };

  if (threads == 1 || tiles == 1) {
    const Scratch scratch(*header, lanes);
    if (!scratch.is_allocated()) return STATUS_NO_MEMORY;
    for (int64_t tile = 0; tile < tiles; ++tile) run(tile, scratch);
    return STATUS_OK;
  }
  std::atomic<int> status{STATUS_OK};
#pragma omp parallel num_threads(int(tiles < threads ? tiles : threads))
  {
    const Scratch scratch(*header, lanes);
    if (!scratch.is_allocated()) status = STATUS_NO_MEMORY;
    // Every thread must meet the loop, with memory or without.
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; ++tile)
      if (scratch.is_allocated()) run(tile, scratch);
  }
  return status;
}
