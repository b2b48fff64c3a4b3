// The call: cuts the batch into pieces, spreads them over threads, and takes each through every task's layers.
#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "engine.h"

namespace {

#include "call.h"
#include "table_path.h"
#include "slice_path.h"
#include "block_path.h"

// How wide a tile can be, and its measured time, in quarters of a 16-lane tile's: wide tiles are cheap, for they fetch
// each weight and offset once for more rows.
struct Width {
  int lanes, cost;
};
constexpr Width kWidths[] = {{1, 2}, {8, 4}, {16, 4}, {32, 6}, {64, 10}};
constexpr const Width* kWidest = kWidths + 4;

const Width& narrowest_for(int64_t rows, const Width* narrowest) {
  const Width* width = narrowest;
  while (width->lanes < rows) ++width;
  return *width;
}

// The lanes of all tiles but the last, which takes no more than it needs: those for which the busiest thread is done
// first. Wide tiles leave threads idle in a small batch.
int choose_lanes(int64_t batch, int64_t threads, const Width* narrowest) {
  int best = 0;
  int64_t best_cost = INT64_MAX;
  for (const Width* width = narrowest; width <= kWidest; ++width) {
    const int64_t full = batch / width->lanes, rest = batch % width->lanes;
    const int64_t last = full % threads ? width->cost : rest ? narrowest_for(rest, narrowest).cost : 0;
    const int64_t cost = full / threads * width->cost + last;
    if (cost <= best_cost) best = width->lanes, best_cost = cost;
  }
  return batch < best ? narrowest_for(batch, narrowest).lanes : best;
}

// Multiply-adds that take some 20 us, as long as waking a team may.
constexpr int64_t kWorthATeam = 500'000, kWorthATeamS8 = 4 * kWorthATeam;

// A forked child has none of its parent's threads, which libgomp would wait for without end.
bool is_forked = false;
const int kWatchingForks = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

// How many threads to take of those offered. More threads than processors only wait for each other, and libgomp ends the
// process where it cannot start one.
int64_t choose_threads(const BlobHeader& header, const SparseMlpCall& call, int64_t enough) {
  if (int64_t(header.multiply_adds) * call.batch < enough) return 1;
  return lt4rec_usable_threads(call.threads);
}

// Runs `piece(i, path)` for i < pieces, each thread with a path and scratch memory of its own.
template <class Path, class MakePath, class Piece>
int for_each_piece(int64_t pieces, int64_t threads, int64_t scratch_bytes, bool flushes, MakePath make, Piece piece) {
  if (threads == 1 || pieces == 1) {
    const FlushedDenormals flushed(flushes);
    Arena& arena = Arena::of_this_thread();
    if (!arena.reset(scratch_bytes)) return STATUS_NO_MEMORY;
    Path path = make(arena);
    for (int64_t i = 0; i < pieces; ++i) piece(i, path);
    return STATUS_OK;
  }
  std::atomic<int> status{STATUS_OK};
#pragma omp parallel num_threads(int(pieces < threads ? pieces : threads))
  {
    const FlushedDenormals flushed(flushes);
    Arena& arena = Arena::of_this_thread();
    const bool has_memory = arena.reset(scratch_bytes);
    if (!has_memory) status = STATUS_NO_MEMORY;
    Path path = make(arena);  // of null pointers where there is no memory
    // Every thread must meet the loop, with memory or without.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < pieces; ++i)
      if (has_memory) piece(i, path);
  }
  return status;
}

template <class Lines>
int run_tables(const Network& net, const SparseMlpCall& call, bool flushes) {
  const bool is_s8 = net.header->precision == PRECISION_S8;
  const int64_t threads = choose_threads(*net.header, call, is_s8 ? kWorthATeamS8 : kWorthATeam);
  // As many rows at a time as there are, in equal parts for the threads.
  int64_t rows = (call.batch + threads - 1) / threads;
  if (rows > MAX_ROWS) rows = MAX_ROWS;
  const auto make = [&](Arena& arena) { return TablePath<Lines>(net, arena); };
  return for_each_piece<TablePath<Lines>>(
      (call.batch + rows - 1) / rows, threads, TablePath<Lines>::scratch_bytes(*net.header), flushes, make,
      [&](int64_t i, TablePath<Lines>& path) {
        const int64_t begin = i * rows, left = call.batch - begin;
        path.run(call, begin, int(left < rows ? left : rows));
      });
}

template <class Tiles>
int run_slices(const Network& net, const SparseMlpCall& call, bool flushes) {
  const int64_t threads = choose_threads(*net.header, call, kWorthATeam);
  // A register of bfloat16 holds 32 lanes.
  const Width* narrowest = sizeof(typename Tiles::Activation) == sizeof(float) ? kWidths : kWidths + 3;
  const int lanes = choose_lanes(call.batch, threads, narrowest);
  const auto make = [&](Arena& arena) { return SlicePath<Tiles>(net, arena, lanes); };
  return for_each_piece<SlicePath<Tiles>>(
      (call.batch + lanes - 1) / lanes, threads, SlicePath<Tiles>::scratch_bytes(*net.header, lanes), flushes, make,
      [&](int64_t i, SlicePath<Tiles>& path) {
        const int64_t begin = i * lanes, left = call.batch - begin, rows = left < lanes ? left : lanes;
        path.run(call, begin, rows, narrowest_for(rows, narrowest).lanes);
      });
}

template <class Rows>
int run_blocks(const Network& net, const SparseMlpCall& call, bool flushes) {
  const bool is_s8 = net.header->precision == PRECISION_S8;
  const int64_t threads = choose_threads(*net.header, call, is_s8 ? kWorthATeamS8 : kWorthATeam);
  // Equal parts for the threads.
  const int64_t most = BlockPath<Rows>::kMostRows * threads;
  const int64_t parts = (call.batch + most - 1) / most * threads, rows = (call.batch + parts - 1) / parts;
  const auto make = [&](Arena& arena) { return BlockPath<Rows>(net, arena, rows); };
  return for_each_piece<BlockPath<Rows>>(
      (call.batch + rows - 1) / rows, threads, BlockPath<Rows>::scratch_bytes(*net.header, rows), flushes, make,
      [&](int64_t i, BlockPath<Rows>& path) {
        const int64_t begin = i * rows, left = call.batch - begin;
        path.run(call, begin, left < rows ? left : rows);
      });
}

int run_blocks(const Network& net, const SparseMlpCall& call) {
  if (net.is_filled)
    return net.header->precision == PRECISION_F32 ? run_blocks<RowsF32>(net, call, false)
                                                  : run_blocks<RowsFilledBf16>(net, call, true);
  switch (net.header->precision) {
    case PRECISION_F32: return run_blocks<RowsF32>(net, call, false);
    case PRECISION_BF16:
      return net.isa->blocks_bf16 ? run_blocks<RowsBf16>(net, call, true)
                                  : run_blocks<RowsWidenedBf16>(net, call, true);
    default: return run_blocks<RowsS8>(net, call, false);
  }
}

}  // namespace

extern "C" int64_t lt4rec_usable_threads(int64_t threads) {
  if (threads == 1 || is_forked) return 1;
  const int64_t processors = omp_get_num_procs();
  return threads < processors ? threads : processors;
}

extern "C" int lt4rec_check_blob(const uint8_t* blob, int64_t bytes) {
  if (blob == nullptr || bytes < int64_t{sizeof(BlobHeader)} || reinterpret_cast<uintptr_t>(blob) % 8 != 0)
    return STATUS_BAD_BLOB;
  const auto* header = reinterpret_cast<const BlobHeader*>(blob);
  const bool is_ours = header->magic == BLOB_MAGIC && header->version == BLOB_VERSION;
  return is_ours && header->bytes == uint64_t(bytes) ? STATUS_OK : STATUS_BAD_BLOB;
}

extern "C" int64_t lt4rec_path(const Isa* isa, const BlobHeader* header, int64_t batch) {
  if (header->layouts & LAYOUT_BLOCKS) return PATH_BLOCKS;
  const int64_t precision = header->precision;
  if (batch == 0) batch = 1;
  if (precision == PRECISION_S8)
    return batch >= isa->slices_from_s8 && header->largest_sum <= LARGEST_EXACT_FLOAT ? PATH_SLICES : PATH_TABLES;
  // An instruction for bfloat16 takes two products at a time; filled blocks are of float32.
  const auto kept = float(header->multiply_adds), filled = float(header->filled_multiply_adds);
  const bool can_fill = filled > 0 && (precision == PRECISION_F32 || isa->slices_bf16 == nullptr);
  const bool is_cached = filled * sizeof(float) <= CACHED_BYTES;
  const bool has_slices = batch >= (precision == PRECISION_F32 ? isa->slices_from_f32 : isa->slices_from_bf16);
  const float filled_from = batch <= FEW_ROWS ? (is_cached ? isa->filled_from_few_cached : isa->filled_from_few)
                            : has_slices      ? isa->filled_from_many
                                              : isa->filled_from_some;
  if (can_fill && kept >= filled_from * filled) return PATH_FILLED;
  return has_slices ? PATH_SLICES : PATH_TABLES;
}

extern "C" int lt4rec_sparse_mlp(const Isa* isa, const uint8_t* blob, int64_t bytes, const SparseMlpCall* call) {
  if (const int status = lt4rec_check_blob(blob, bytes)) return status;
  const auto* header = reinterpret_cast<const BlobHeader*>(blob);
  if (call->in_features != header->in_features || call->outputs != header->outputs) return STATUS_BAD_SHAPE;
  if (call->bias_features != header->bias_features || (call->bias_features && !call->bias)) return STATUS_BAD_SHAPE;
  const bool has_slices = header->layouts & LAYOUT_SLICES, has_tables = header->layouts & LAYOUT_TABLES;
  const bool has_blocks = header->layouts & LAYOUT_BLOCKS, has_filled = header->layouts & LAYOUT_FILLED;
  const bool is_chosen = call->path >= PATH_TABLES && call->path <= PATH_FILLED;
  const int64_t wanted = is_chosen ? call->path : lt4rec_path(isa, header, call->batch);
  if (call->path != PATH_AUTO) {
    if (wanted == PATH_BLOCKS && !has_blocks) return STATUS_NO_LAYOUT;
    if (wanted == PATH_FILLED && !has_filled) return STATUS_NO_LAYOUT;
    if (wanted == PATH_TABLES && !has_tables) return STATUS_NO_LAYOUT;
    if (wanted == PATH_SLICES && !has_slices) return STATUS_NO_LAYOUT;
  }
  if (call->batch == 0) return STATUS_OK;
  const bool uses_filled = has_filled && (wanted == PATH_FILLED || !(has_slices || has_tables));
  const bool uses_slices = has_slices && (wanted == PATH_SLICES || !has_tables);

  const Network net{isa, blob, header, reinterpret_cast<const LayerRecord*>(header + 1), uses_filled};
  if (has_blocks || uses_filled) return run_blocks(net, *call);
  switch (header->precision) {
    case PRECISION_F32:
      return uses_slices ? run_slices<TilesF32>(net, *call, false) : run_tables<LinesF32>(net, *call, false);
    case PRECISION_BF16:
      if (!uses_slices) return run_tables<LinesBf16>(net, *call, true);
      return isa->slices_bf16 ? run_slices<TilesBf16>(net, *call, true)
                              : run_slices<TilesWidenedBf16>(net, *call, true);
    default: return uses_slices ? run_slices<TilesS8>(net, *call, false) : run_tables<LinesS8>(net, *call, false);
  }
}
