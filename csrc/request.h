// A ranker made ready, and the inputs of one request on their way through it. See ranker.h.
#ifndef LT4REC_SPARSE_REQUEST_H
#define LT4REC_SPARSE_REQUEST_H

#include <atomic>
#include <cstddef>
#include <vector>

#include "tables.h"

namespace lt4rec {

using std::size_t;

// What a request gives of one field.
struct FieldIds {
  int64_t rows = 0;             // 1 holds for all candidates
  std::vector<int64_t> ids;     // of each row, or of all bags one after the other
  std::vector<int64_t> ends;    // of bags: where each row's ends
  const float* given = nullptr; // [rows, dim] in place of ids
};

// Memory that stays with its thread from one request to the next, but for that of very large ones.
struct Request {
  std::vector<FieldIds> fields;
  std::vector<float> common_x, own_x, biases;    // of one piece of the candidates
  std::vector<float> transposed, common_inputs;  // of fields that are given once

  static Request& of_this_thread();

  // Forgets what was given.
  void begin(int64_t field_count);
};

// A network in the layouts that requests have needed so far; each blob lives as long as the ranker.
class Network {
 public:
  // The blob of the path that `batch` rows take; null where it is not here yet: then `path` says which.
  const uint8_t* blob_for(const Isa* isa, int64_t batch, int64_t* path) const;
  void add(int64_t path, const uint8_t* blob) { blobs_[path].store(blob, std::memory_order_release); }

 private:
  std::atomic<const uint8_t*> blobs_[PATH_FILLED + 1] = {};
};

class Ranker {
 public:
  explicit Ranker(const RankerSpec& spec);

  int64_t field_count() const { return int64_t(fields_.size()); }
  const FieldSpec& field(int64_t i) const { return fields_[size_t(i)]; }
  const Table& table_of(int64_t field) const { return tables_[size_t(fields_[size_t(field)].table)]; }
  int64_t dim() const { return spec_.dim; }
  bool has_rows(int64_t field) const { return first_rows_[size_t(field)] >= 0; }

  Network common, own;  // `common` is unused where no field is common

  // The rows of a request, or -1 where they do not agree or a field has nothing to be looked up in.
  int64_t rows_of(const Request& request) const;

  // Whether a request's common fields hold for all candidates: the network `common` then reads one row.
  bool is_given_once(const Request& request) const;

  // The candidates that are scored at a time, which bounds memory: blobs are those of the paths that so many rows take.
  static constexpr int64_t kPiece = 2048;

  // Every task's scores of all candidates into out [batch, outputs]. Without common fields `common_blob` is not read.
  int score(const Isa* isa, Request& request, const uint8_t* common_blob, const uint8_t* own_blob, int64_t batch,
            int64_t threads, float* out, int64_t out_stride) const;

  // The inputs of the network `own` into x [batch, own_width()]; without common fields they are all.
  void own_inputs(const Isa* isa, Request& request, int64_t batch, int64_t threads, float* x, int64_t stride) const;

  int64_t common_width() const { return spec_.common_count; }
  int64_t own_width() const { return spec_.own_count; }

 private:
  struct Run {
    int32_t to, from, count;
  };
  struct Move {
    int32_t to, from;
  };
  // How x is put together: runs of a group of vectors, and dot products.
  struct Columns {
    std::vector<Run> runs;
    std::vector<Move> dots;
    std::vector<Move> common;  // of `own`: inputs of common fields that stand among its columns, from a row of them
  };

  void load_row(const Isa* isa, int64_t row, float* to) const;
  void load_vector(const Isa* isa, const Request& request, int64_t field, int64_t candidate, float* to) const;
  void load_common(const Isa* isa, const Request& request, int64_t candidate, float* transposed, float* inputs) const;
  void begin_inputs(const Isa* isa, Request& request, bool is_once) const;
  void fill(const Isa* isa, const Request& request, int64_t first, int64_t last, bool is_once, float* own_x,
            int64_t own_stride, float* common_x) const;
  void embed(const Isa* isa, const Request& request, int64_t first, int64_t last, bool is_once, int64_t threads,
             float* own_x, int64_t own_stride, float* common_x) const;
  static void put(const Columns& columns, const float* vectors, const float* dots, const float* common, float* x);

  RankerSpec spec_;
  std::vector<Table> tables_;
  std::vector<FieldSpec> fields_;
  std::vector<int64_t> first_rows_;  // of each field's table
  std::vector<int32_t> common_fields_, own_fields_;
  Columns common_columns_, own_columns_;
  int64_t width_ = 0;        // of a row of dot products: common fields, then own ones, up to whole vectors
  int64_t common_size_ = 0;  // of a row of common inputs: vectors, then dot products
};

}  // namespace lt4rec
#endif
