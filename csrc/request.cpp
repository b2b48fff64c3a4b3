// Ids -> the networks' inputs -> scores.
#include "request.h"

#include <omp.h>

#include <algorithm>
#include <new>

namespace lt4rec {
namespace {

// Candidates that one thread takes at a time, and those that are worth waking a team for.
constexpr int64_t kChunk = 32, kWorthATeam = 128;

constexpr size_t kKeptIds = 1 << 16;  // of a field, from one request to the next

template <class T>
const T* address(int64_t value) {
  return reinterpret_cast<const T*>(value);
}

// The usual width without a call.
void copy(const float* from, int64_t count, float* to) {
  if (count == 16)
    std::memcpy(to, from, 16 * sizeof(float));
  else
    std::memcpy(to, from, size_t(count) * sizeof(float));
}

}  // namespace

Request& Request::of_this_thread() {
  static thread_local Request request;
  return request;
}

void Request::begin(int64_t field_count) {
  fields.resize(size_t(field_count));
  for (FieldIds& field : fields) {
    if (field.ids.capacity() > kKeptIds) field = {};
    field.rows = 0;
    field.ids.clear();
    field.ends.clear();
    field.given = nullptr;
  }
}

const uint8_t* Network::blob_for(const Isa* isa, int64_t batch, int64_t* path) const {
  for (const auto& any : blobs_) {
    const uint8_t* blob = any.load(std::memory_order_acquire);
    if (blob == nullptr) continue;
    *path = lt4rec_path(isa, reinterpret_cast<const BlobHeader*>(blob), batch);
    return blobs_[*path].load(std::memory_order_acquire);
  }
  *path = PATH_AUTO;
  return nullptr;
}

Ranker::Ranker(const RankerSpec& spec) : spec_(spec) {
  const auto* tables = address<TableSpec>(spec.tables);
  for (int64_t i = 0; i < spec.table_count; ++i) tables_.emplace_back(tables[i]);
  const auto* fields = address<FieldSpec>(spec.fields);
  fields_.assign(fields, fields + spec.field_count);
  const int64_t n = spec.field_count, dim = spec.dim;
  std::vector<int32_t> slot_of(static_cast<size_t>(n));  // within its group of fields
  for (int64_t i = 0; i < n; ++i) {
    first_rows_.push_back(tables[fields[i].table].first_row);
    std::vector<int32_t>& group = fields[i].is_common ? common_fields_ : own_fields_;
    slot_of[size_t(i)] = int32_t(group.size());
    group.push_back(int32_t(i));
  }
  const auto count = int64_t(common_fields_.size());
  width_ = padded(n);
  common_size_ = count * (dim + width_);

  // The pair that each dot product is of.
  std::vector<std::pair<int32_t, int32_t>> pairs;
  for (int32_t i = 0; i < n; ++i)
    for (int32_t j = i + 1; j < n; ++j) pairs.emplace_back(i, j);
  // A column of the dot products of common fields' vectors with all, or of own fields' with all.
  const auto place = [&](int64_t field) {
    return fields_[size_t(field)].is_common ? slot_of[size_t(field)] : int32_t(count) + slot_of[size_t(field)];
  };
  const auto arrange = [&](const int64_t* columns, int64_t column_count, bool is_common, Columns& to) {
    for (int64_t at = 0; at < column_count; ++at) {
      const int64_t input = columns[at];
      const auto column = int32_t(at);
      const bool is_dot = input >= n * dim;
      const auto [i, j] = is_dot ? pairs[size_t(input - n * dim)]
                                 : std::pair<int32_t, int32_t>(int32_t(input / dim), int32_t(input / dim));
      const bool all_common = fields_[size_t(i)].is_common && fields_[size_t(j)].is_common;
      // Rows of dot products belong to fields of the group at hand: to the first such one of the two.
      const int32_t of = all_common || !fields_[size_t(i)].is_common ? i : j, with = of == i ? j : i;
      const int32_t element = int32_t(input % dim), slot = slot_of[size_t(of)];
      const int32_t dot = int32_t(slot * width_) + place(with);
      if (all_common && !is_common) {
        to.common.push_back({column, is_dot ? int32_t(count * dim) + dot : int32_t(slot * dim) + element});
      } else if (is_dot) {
        to.dots.push_back({column, dot});
      } else {
        const int32_t from = int32_t(slot * dim) + element;
        if (!to.runs.empty() && to.runs.back().to + to.runs.back().count == column &&
            to.runs.back().from + to.runs.back().count == from)
          ++to.runs.back().count;
        else
          to.runs.push_back({column, from, 1});
      }
    }
  };
  arrange(address<int64_t>(spec.common_columns), spec.common_count, true, common_columns_);
  arrange(address<int64_t>(spec.own_columns), spec.own_count, false, own_columns_);
}

int64_t Ranker::rows_of(const Request& request) const {
  int64_t rows = 1;
  for (int64_t i = 0; i < field_count(); ++i) {
    const FieldIds& field = request.fields[size_t(i)];
    if (!field.given && !has_rows(i)) return -1;
    if (field.rows == 1) continue;
    if (rows != 1 && rows != field.rows) return -1;
    rows = field.rows;
    if (rows == 0) break;
  }
  for (const FieldIds& field : request.fields)
    if (field.rows != 1 && field.rows != rows) return -1;
  return rows;
}

bool Ranker::is_given_once(const Request& request) const {
  return std::all_of(common_fields_.begin(), common_fields_.end(),
                     [&](int32_t field) { return request.fields[size_t(field)].rows == 1; });
}

void Ranker::load_row(const Isa* isa, int64_t row, float* to) const {
  const int64_t dim = spec_.dim, at = row * dim;
  switch (spec_.rows_kind) {
    case ROWS_F32: copy(address<float>(spec_.embedding) + at, dim, to); break;
    case ROWS_F16: isa->widen_f16(address<uint16_t>(spec_.embedding) + at, dim, to); break;
    default: isa->widen_s8(address<int8_t>(spec_.embedding) + at, dim, address<float>(spec_.scales)[row], to);
  }
}

// A field's vector for one candidate.
void Ranker::load_vector(const Isa* isa, const Request& request, int64_t field, int64_t candidate, float* to) const {
  const FieldIds& of_field = request.fields[size_t(field)];
  const int64_t dim = spec_.dim, row = of_field.rows == 1 ? 0 : candidate, first = first_rows_[size_t(field)];
  if (of_field.given) return copy(of_field.given + row * dim, dim, to);
  if (!fields_[size_t(field)].is_bag) return load_row(isa, first + of_field.ids[size_t(row)], to);
  const int64_t begin = row == 0 ? 0 : of_field.ends[size_t(row) - 1], end = of_field.ends[size_t(row)];
  static thread_local std::vector<float> value;
  value.resize(size_t(dim));
  for (int64_t d = 0; d < dim; ++d) to[d] = 0;
  for (int64_t i = begin; i < end; ++i) {
    load_row(isa, first + of_field.ids[size_t(i)], value.data());
    for (int64_t d = 0; d < dim; ++d) to[d] += value[size_t(d)];
  }
  if (end - begin > 1)
    for (int64_t d = 0; d < dim; ++d) to[d] /= float(end - begin);
}

// The vectors of common fields for one candidate, also as the first columns of `transposed` [dim, width], and their dot
// products with each other.
void Ranker::load_common(const Isa* isa, const Request& request, int64_t candidate, float* transposed,
                         float* inputs) const {
  const auto count = int64_t(common_fields_.size());
  const int64_t dim = spec_.dim;
  for (int64_t i = 0; i < count; ++i)
    load_vector(isa, request, common_fields_[size_t(i)], candidate, inputs + i * dim);
  isa->transpose_f32(inputs, dim, count, dim, transposed, width_);
  isa->cross(inputs, count, transposed, width_, dim, padded(count), inputs + count * dim, width_);
}

// One row of x of either network.
void Ranker::put(const Columns& columns, const float* vectors, const float* dots, const float* common, float* x) {
  for (const Run& run : columns.runs)
    std::memcpy(x + run.to, vectors + run.from, size_t(run.count) * sizeof(float));
  for (const Move& dot : columns.dots) x[dot.to] = dots[dot.from];
  for (const Move& move : columns.common) x[move.to] = common[move.from];
}

// Candidates [first, last), whose rows of x stand from the pointers on.
void Ranker::fill(const Isa* isa, const Request& request, int64_t first, int64_t last, bool is_once, float* own_x,
                  int64_t own_stride, float* common_x) const {
  static thread_local std::vector<float> vectors, dots, transposed, common_inputs;
  const auto commons = int64_t(common_fields_.size()), owns = int64_t(own_fields_.size());
  const int64_t dim = spec_.dim;
  vectors.resize(size_t(owns * dim));
  dots.resize(size_t(owns * width_));
  if (is_once) {
    transposed = request.transposed;
  } else {
    transposed.assign(size_t(dim * width_), 0.0f);
    common_inputs.resize(size_t(common_size_));
  }
  const float* common = is_once ? request.common_inputs.data() : common_inputs.data();
  for (int64_t candidate = first; candidate < last; ++candidate, own_x += own_stride, common_x += spec_.common_count) {
    if (!is_once) {
      load_common(isa, request, candidate, transposed.data(), common_inputs.data());
      put(common_columns_, common, common + commons * dim, nullptr, common_x);
    }
    for (int64_t i = 0; i < owns; ++i)
      load_vector(isa, request, own_fields_[size_t(i)], candidate, vectors.data() + i * dim);
    isa->transpose_f32(vectors.data(), dim, owns, dim, transposed.data() + commons, width_);
    isa->cross(vectors.data(), owns, transposed.data(), width_, dim, width_, dots.data(), width_);
    put(own_columns_, vectors.data(), dots.data(), common, own_x);
  }
}

// What all candidates share: the inputs of fields that are given once.
void Ranker::begin_inputs(const Isa* isa, Request& request, bool is_once) const {
  if (!is_once) return;
  request.transposed.assign(size_t(spec_.dim * width_), 0.0f);
  request.common_inputs.resize(size_t(common_size_));
  request.common_x.resize(size_t(spec_.common_count));
  load_common(isa, request, 0, request.transposed.data(), request.common_inputs.data());
  const float* common = request.common_inputs.data();
  put(common_columns_, common, common + int64_t(common_fields_.size()) * spec_.dim, nullptr, request.common_x.data());
}

void Ranker::embed(const Isa* isa, const Request& request, int64_t first, int64_t last, bool is_once, int64_t threads,
                   float* own_x, int64_t own_stride, float* common_x) const {
  threads = last - first < kWorthATeam ? 1 : lt4rec_usable_threads(threads);
  if (threads == 1) return fill(isa, request, first, last, is_once, own_x, own_stride, common_x);
  std::atomic<bool> has_memory{true};  // no exception leaves a team
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads))
  for (int64_t begin = first; begin < last; begin += kChunk) try {
      fill(isa, request, begin, std::min(begin + kChunk, last), is_once, own_x + (begin - first) * own_stride,
           own_stride, common_x + (begin - first) * spec_.common_count);
    } catch (const std::bad_alloc&) {
      has_memory = false;
    }
  if (!has_memory) throw std::bad_alloc();
}

void Ranker::own_inputs(const Isa* isa, Request& request, int64_t batch, int64_t threads, float* x,
                        int64_t stride) const {
  const bool is_once = is_given_once(request);
  begin_inputs(isa, request, is_once);
  if (!is_once) request.common_x.resize(size_t(batch * spec_.common_count));
  embed(isa, request, 0, batch, is_once, threads, x, stride, request.common_x.data());
}

int Ranker::score(const Isa* isa, Request& request, const uint8_t* common_blob, const uint8_t* own_blob, int64_t batch,
                  int64_t threads, float* out, int64_t out_stride) const {
  const auto* own_header = reinterpret_cast<const BlobHeader*>(own_blob);
  const int64_t features = own_header->bias_features;
  const bool is_once = is_given_once(request);
  const auto add_common = [&](int64_t rows) {
    if (features == 0) return int{STATUS_OK};
    const auto* header = reinterpret_cast<const BlobHeader*>(common_blob);
    request.biases.resize(size_t(rows * features));
    const SparseMlpCall call{request.common_x.data(), false, rows, spec_.common_count, spec_.common_count,
                             request.biases.data(), features, features, threads, PATH_AUTO, nullptr, 0, 0};
    return lt4rec_sparse_mlp(isa, common_blob, int64_t(header->bytes), &call);
  };
  begin_inputs(isa, request, is_once);
  if (is_once)
    if (const int status = add_common(1)) return status;
  for (int64_t first = 0; first < batch; first += kPiece) {
    const int64_t last = std::min(first + kPiece, batch), rows = last - first;
    request.own_x.resize(size_t(rows * spec_.own_count));
    if (!is_once) request.common_x.resize(size_t(rows * spec_.common_count));
    embed(isa, request, first, last, is_once, threads, request.own_x.data(), spec_.own_count, request.common_x.data());
    if (!is_once)
      if (const int status = add_common(rows)) return status;
    const SparseMlpCall call{request.own_x.data(), false, rows, spec_.own_count, spec_.own_count,
                             out + first * out_stride, own_header->outputs, out_stride, threads, PATH_AUTO,
                             request.biases.data(), features, is_once ? 0 : features};
    if (const int status = lt4rec_sparse_mlp(isa, own_blob, int64_t(own_header->bytes), &call)) return status;
  }
  return STATUS_OK;
}

}  // namespace lt4rec
