// The C API of lt4rec.h over the ranker of request.h.
#include "lt4rec.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>

#include "engine_file.h"
#include "ranking.h"
#include "utf8.h"
#include "values.h"

namespace {

using lt4rec::FieldIds;
using lt4rec::Refused;
using lt4rec::Sink;
using lt4rec::Table;
using std::size_t;

// The instruction set in force; null with its name in `message` where this machine lacks it.
const Isa* isa_in_force(char* message) {
  const char* wanted = std::getenv("LT4REC_SPARSE_ISA");
  const Isa* found = nullptr;
  for (const Isa* const* isa = lt4rec_supported_isas(); *isa; ++isa)
    if (!wanted || std::strcmp((*isa)->name, wanted) == 0) found = *isa;
  if (!found)
    std::snprintf(message, LT4REC_MESSAGE_BYTES, "LT4REC_SPARSE_ISA: got %s, wanted one that this machine runs", wanted);
  return found;
}

// A file's bytes, for as long as this lives.
class Mapping {
 public:
  explicit Mapping(const char* path) {
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe would wait for its writer
    struct stat facts;
    if (file >= 0 && fstat(file, &facts) == 0) {
      if (S_ISREG(facts.st_mode) && facts.st_size > 0) {
        size_ = size_t(facts.st_size);
        bytes_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
      } else {
        errno = EINVAL;  // a folder, a pipe, or nothing
      }
    }
    error_ = bytes_ == MAP_FAILED ? errno : 0;
    if (file >= 0) ::close(file);
  }
  ~Mapping() {
    if (bytes_ != MAP_FAILED) munmap(bytes_, size_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  int error() const { return error_; }
  const uint8_t* bytes() const { return static_cast<const uint8_t*>(bytes_); }
  size_t size() const { return size_; }

 private:
  void* bytes_ = MAP_FAILED;
  size_t size_ = 0;
  int error_ = 0;
};

struct Free {
  void operator()(uint8_t* blob) const { lt4rec_free(blob); }
};
using Blob = std::unique_ptr<uint8_t, Free>;

// A network in every layout that any number of rows takes here, so that no request has to prepack.
Blob prepacked(const std::vector<CanonicalLayer>& layers, int64_t precision, const Isa* isa, const char* section) {
  char message[MESSAGE_BYTES] = "";
  uint8_t* blob = nullptr;
  const int64_t bytes = lt4rec_prepack(layers.data(), int64_t(layers.size()), precision, 0, isa, -1, &blob, message);
  if (bytes == -1) throw Refused(std::string(section) + ": " + message);
  if (bytes < 0) throw std::bad_alloc();
  return Blob(blob);
}

}  // namespace

struct lt4rec_model {
  std::unique_ptr<Mapping> mapping;  // none where the caller has the bytes
  lt4rec::EngineFile file;
  const Isa* isa;
  lt4rec::Ranker ranker;
  Blob common, own;

  lt4rec_model(std::unique_ptr<Mapping> mapped, const uint8_t* bytes, size_t size, const Isa* isa)
      : mapping(std::move(mapped)), file(bytes, size), isa(isa), ranker(file.ranker) {
    own = prepacked(file.own_layers, file.precision, isa, "own_layers");
    if (!file.common_layers.empty()) common = prepacked(file.common_layers, file.precision, isa, "common_layers");
  }

  int64_t tasks() const { return int64_t(file.task_names.size()); }
  int64_t fields() const { return int64_t(file.fields.size()); }
};

struct lt4rec_request {
  const lt4rec_model& model;
  lt4rec::Request inputs;
  int64_t candidates = 0;
  std::vector<uint8_t> is_set;  // of each field
  std::vector<float> scores;
  std::vector<double> rank_scores;
  std::vector<int64_t> order;
  char message[LT4REC_MESSAGE_BYTES] = "";

  explicit lt4rec_request(const lt4rec_model& of) : model(of) { begin(0); }

  void begin(int64_t count) {
    candidates = count;
    inputs.begin(model.fields());
    is_set.assign(size_t(model.fields()), 0);
  }

  __attribute__((format(printf, 3, 4))) int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof(message), format, arguments);
    va_end(arguments);
    return status;
  }
  const char* name(int64_t field) const { return model.file.field_names[size_t(field)]; }
  const FieldSpec& spec(int64_t field) const { return model.file.fields[size_t(field)]; }
  const Table& table(int64_t field) const { return model.ranker.table_of(field); }
};

namespace {

int type_of(const Table& table) {
  return table.takes_strings() ? LT4REC_STRINGS : table.takes_numbers() ? LT4REC_DOUBLES : LT4REC_INTS;
}

constexpr const char* kTypes[] = {"ints", "strings", "doubles"};
constexpr const char* kValues[] = {"an int of 64 bits", "UTF-8", "a number"};

// No exception leaves the API.
template <class Work>
int guarded(char* message, Work work) {
  try {
    return work();
  } catch (const Refused& why) {
    if (message) std::snprintf(message, LT4REC_MESSAGE_BYTES, "%s", why.what());
    return LT4REC_BAD_FILE;
  } catch (const std::bad_alloc&) {
  } catch (const std::length_error&) {  // more elements than a vector can have
  }
  if (message) std::snprintf(message, LT4REC_MESSAGE_BYTES, "%s", lt4rec_status_text(LT4REC_NO_MEMORY));
  return LT4REC_NO_MEMORY;
}

int open_model(std::unique_ptr<Mapping> mapping, const void* bytes, size_t size, lt4rec_model** model, char* message) {
  const Isa* isa = isa_in_force(message);
  if (!isa) return LT4REC_BAD_ISA;
  *model = new lt4rec_model(std::move(mapping), static_cast<const uint8_t*>(bytes), size, isa);
  return LT4REC_OK;
}

bool is_bad_number(double value) { return !(value >= 0 && value < HUGE_VAL); }

// --- Values -> ids ------------------------------------------------------------------------------------------------

bool put(Sink& sink, int64_t value) { return sink.put(value); }
bool put(Sink& sink, double value) { return sink.put(value); }
bool put(Sink& sink, const lt4rec_string& value) {
  const char* text = value.size ? value.data : "";
  return text && lt4rec::is_utf8(text, value.size, true) && sink.put(text, value.size);
}

std::string shown(int64_t value) { return std::to_string(value); }
std::string shown(double value) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%.17g", value);
  return digits;
}
std::string shown(const lt4rec_string&) { return "other bytes"; }

// What every function that sets a field begins with.
int checked_field(lt4rec_request* request, int64_t field, bool has_values, int64_t rows) {
  if (field < 0 || field >= request->model.fields())
    return request->fail(LT4REC_BAD_ARGUMENT, "field: got %" PRId64 ", wanted 0 or more, below %" PRId64, field,
                         request->model.fields());
  request->is_set[size_t(field)] = 0;
  if (rows != 1 && rows != request->candidates)
    return request->fail(LT4REC_BAD_ROWS, "column %s: got %" PRId64 " rows, wanted 1 or %" PRId64, request->name(field),
                         rows, request->candidates);
  if (!has_values && rows > 0)
    return request->fail(LT4REC_BAD_ARGUMENT, "column %s: got NULL, wanted its values", request->name(field));
  return LT4REC_OK;
}

FieldIds& emptied(lt4rec_request* request, int64_t field) {
  FieldIds& of_field = request->inputs.fields[size_t(field)];
  of_field.ids.clear();
  of_field.ends.clear();
  of_field.given = nullptr;
  return of_field;
}

// Fills a field by fill(row, sink) for each row; it returns a status. `type` is that of the values.
template <class Fill>
int filled(lt4rec_request* request, int64_t field, bool has_values, int64_t rows, int type, bool are_bags, Fill fill) {
  if (!request) return LT4REC_BAD_ARGUMENT;
  return guarded(request->message, [&] {
    if (const int status = checked_field(request, field, has_values, rows)) return status;
    const Table& table = request->table(field);
    const int wanted = type_of(table);
    if (!request->model.ranker.has_rows(field))
      return request->fail(LT4REC_BAD_TYPE, "column %s: got %s, wanted vectors: its embeddings are not in the file",
                           request->name(field), kTypes[type]);
    const bool is_bag = request->spec(field).is_bag, is_text = type == LT4REC_STRINGS && is_bag && !are_bags;
    if (!is_text && (is_bag != are_bags || (type == LT4REC_STRINGS) != (wanted == LT4REC_STRINGS)))
      return request->fail(LT4REC_BAD_TYPE, "column %s: got %s%s, wanted %s%s", request->name(field),
                           are_bags ? "bags of " : "", kTypes[type], is_bag ? "bags of " : "", kTypes[wanted]);
    FieldIds& of_field = emptied(request, field);
    Sink sink(table, of_field, is_bag);
    for (int64_t row = 0; row < rows; ++row) {
      if (const int status = fill(row, sink)) return status;
      if (is_bag) sink.end();
    }
    of_field.rows = rows;
    request->is_set[size_t(field)] = 1;
    return int{LT4REC_OK};
  });
}

template <class Value>
int put_one(lt4rec_request* request, int64_t field, const Value& value, bool is_valid, int64_t row, Sink& sink) {
  if (!is_valid) return sink.put_missing(), LT4REC_OK;
  if (put(sink, value)) return LT4REC_OK;
  return request->fail(LT4REC_BAD_VALUE, "column %s: row %" PRId64 ": got %s, wanted %s", request->name(field), row,
                       shown(value).c_str(), kValues[type_of(request->table(field))]);
}

template <class Value>
int set_bags(lt4rec_request* request, int64_t field, const Value* values, const uint8_t* is_valid,
             const int64_t* offsets, int64_t rows, int type) {
  const auto fill = [&](int64_t row, Sink& sink) {
    const int64_t first = offsets[row], last = offsets[row + 1];
    if (first < 0 || last < first)
      return request->fail(LT4REC_BAD_VALUE, "column %s: got offsets %" PRId64 ", %" PRId64 " of row %" PRId64
                           ", wanted ascending ones from 0 or more", request->name(field), first, last, row);
    if (!values && last > first)
      return request->fail(LT4REC_BAD_ARGUMENT, "column %s: got NULL, wanted its values", request->name(field));
    for (int64_t i = first; i < last; ++i)
      if (const int status = put_one(request, field, values[i], !is_valid || is_valid[i], row, sink)) return status;
    return int{LT4REC_OK};
  };
  return filled(request, field, offsets != nullptr, rows, type, true, fill);
}

template <class Value>
int set_values(lt4rec_request* request, int64_t field, const Value* values, const uint8_t* is_valid, int64_t rows,
               int type) {
  return filled(request, field, values != nullptr, rows, type, false, [&](int64_t row, Sink& sink) {
    return put_one(request, field, values[row], !is_valid || is_valid[row], row, sink);
  });
}

// --- Scores -------------------------------------------------------------------------------------------------------

int checked_request(lt4rec_request* request, int threads) {
  if (threads < 1) return request->fail(LT4REC_BAD_ARGUMENT, "threads: got %d, wanted at least 1", threads);
  for (int64_t field = 0; field < request->model.fields(); ++field)
    if (!request->is_set[size_t(field)])
      return request->fail(LT4REC_NOT_SET, "column %s: got nothing, wanted %s of 1 row or %" PRId64,
                           request->name(field), request->model.ranker.has_rows(field) ? "values" : "vectors",
                           request->candidates);
  return LT4REC_OK;
}

// After `checked_request`.
int scored(lt4rec_request* request, int threads, float* scores) {
  const lt4rec_model& model = request->model;
  const int64_t rows = request->candidates;
  if (rows == 0) return LT4REC_OK;
  const int status = model.ranker.score(model.isa, request->inputs, model.common.get(), model.own.get(), rows, threads,
                                        scores, model.tasks());
  if (status == STATUS_NO_MEMORY) throw std::bad_alloc();
  if (status != STATUS_OK) return request->fail(LT4REC_INTERNAL, "the engine ended with status %d", status);
  return LT4REC_OK;
}

int checked_ranking(lt4rec_request* request, const lt4rec_ranking& ranking, int64_t k) {
  if (k < 1) return request->fail(LT4REC_BAD_ARGUMENT, "k: got %" PRId64 ", wanted at least 1", k);
  for (int64_t task = 0; ranking.powers && task < request->model.tasks(); ++task)
    if (is_bad_number(ranking.powers[task]))
      return request->fail(LT4REC_BAD_ARGUMENT, "powers: got %g of %s, wanted finite ones of at least 0",
                           ranking.powers[task], request->model.file.task_names[size_t(task)]);
  if (!ranking.factor) return LT4REC_OK;
  if (is_bad_number(ranking.factor_power))
    return request->fail(LT4REC_BAD_ARGUMENT, "factor_power: got %g, wanted a finite one of at least 0",
                         ranking.factor_power);
  for (int64_t row = 0; row < request->candidates; ++row)
    if (is_bad_number(ranking.factor[row]))
      return request->fail(LT4REC_BAD_VALUE, "factor: got %g in row %" PRId64 ", wanted finite numbers of at least 0",
                           ranking.factor[row], row);
  return LT4REC_OK;
}

double rank_score(const float* scores, int64_t tasks, const lt4rec_ranking& ranking, int64_t row) {
  double product = 1;
  for (int64_t task = 0; task < tasks; ++task)
    product *= lt4rec::raised(double(scores[task]), ranking.powers ? ranking.powers[task] : 1);
  return ranking.factor ? product * lt4rec::raised(ranking.factor[row], ranking.factor_power) : product;
}

int find(const std::vector<const char*>& names, const char* name, int64_t* place) {
  for (size_t i = 0; name && place && i < names.size(); ++i)
    if (std::strcmp(names[i], name) == 0) return *place = int64_t(i), LT4REC_OK;
  return LT4REC_BAD_ARGUMENT;
}

}  // namespace

extern "C" {

const char* lt4rec_status_text(int status) {
  switch (status) {
    case LT4REC_OK: return "no error";
    case LT4REC_BAD_FILE: return "no engine file of this version, or a damaged one";
    case LT4REC_CANNOT_READ: return "the file cannot be read";
    case LT4REC_BAD_ISA: return "LT4REC_SPARSE_ISA names an instruction set that this machine lacks";
    case LT4REC_BAD_ARGUMENT: return "an argument is NULL, below its bound, or names nothing";
    case LT4REC_BAD_TYPE: return "the field has values of another type";
    case LT4REC_BAD_VALUE: return "a value that the field cannot have";
    case LT4REC_BAD_ROWS: return "neither one row nor as many as there are candidates";
    case LT4REC_NOT_SET: return "a field was given nothing";
    case LT4REC_NO_MEMORY: return "memory does not suffice";
    case LT4REC_INTERNAL: return "a fault of this library";
    default: return "no status of this library";
  }
}

int lt4rec_open(const char* path, lt4rec_model** model, char* message) {
  char unwanted[LT4REC_MESSAGE_BYTES];
  if (!message) message = unwanted;
  if (!path || !model) {
    std::snprintf(message, LT4REC_MESSAGE_BYTES, "path, model: got NULL, wanted both");
    return LT4REC_BAD_ARGUMENT;
  }
  return guarded(message, [&] {
    auto mapping = std::make_unique<Mapping>(path);
    if (mapping->error()) {
      std::snprintf(message, LT4REC_MESSAGE_BYTES, "%s: %s", path, std::strerror(mapping->error()));
      return int{LT4REC_CANNOT_READ};
    }
    const uint8_t* bytes = mapping->bytes();
    const size_t size = mapping->size();
    return open_model(std::move(mapping), bytes, size, model, message);
  });
}

int lt4rec_open_memory(const void* bytes, size_t size, lt4rec_model** model, char* message) {
  char unwanted[LT4REC_MESSAGE_BYTES];
  if (!message) message = unwanted;
  if (!bytes || !model || reinterpret_cast<uintptr_t>(bytes) % 8 != 0) {
    std::snprintf(message, LT4REC_MESSAGE_BYTES,
                  "bytes, model: got NULL, or an address that is no multiple of 8, wanted both");
    return LT4REC_BAD_ARGUMENT;
  }
  return guarded(message, [&] { return open_model(nullptr, bytes, size, model, message); });
}

int lt4rec_close(lt4rec_model* model) {
  delete model;
  return LT4REC_OK;
}

int lt4rec_describe(const lt4rec_model* model, lt4rec_model_facts* facts) {
  if (!model || !facts) return LT4REC_BAD_ARGUMENT;
  *facts = {model->fields(), model->tasks(), model->ranker.dim(), int(model->file.precision), model->isa->name};
  return LT4REC_OK;
}

int lt4rec_describe_field(const lt4rec_model* model, int64_t field, lt4rec_field_facts* facts) {
  if (!model || !facts || field < 0 || field >= model->fields()) return LT4REC_BAD_ARGUMENT;
  const FieldSpec& spec = model->file.fields[size_t(field)];
  *facts = {model->file.field_names[size_t(field)], type_of(model->ranker.table_of(field)), int(spec.is_bag),
            int(spec.is_common), !model->ranker.has_rows(field)};
  return LT4REC_OK;
}

int lt4rec_task_name(const lt4rec_model* model, int64_t task, const char** name) {
  if (!model || !name || task < 0 || task >= model->tasks()) return LT4REC_BAD_ARGUMENT;
  *name = model->file.task_names[size_t(task)];
  return LT4REC_OK;
}

int lt4rec_find_field(const lt4rec_model* model, const char* name, int64_t* field) {
  return model ? find(model->file.field_names, name, field) : int{LT4REC_BAD_ARGUMENT};
}

int lt4rec_find_task(const lt4rec_model* model, const char* name, int64_t* task) {
  return model ? find(model->file.task_names, name, task) : int{LT4REC_BAD_ARGUMENT};
}

int lt4rec_request_new(const lt4rec_model* model, lt4rec_request** request) {
  if (!model || !request) return LT4REC_BAD_ARGUMENT;
  return guarded(nullptr, [&] {
    *request = new lt4rec_request(*model);
    return int{LT4REC_OK};
  });
}

int lt4rec_request_free(lt4rec_request* request) {
  delete request;
  return LT4REC_OK;
}

const char* lt4rec_message(const lt4rec_request* request) { return request ? request->message : ""; }

int lt4rec_begin(lt4rec_request* request, int64_t candidates) {
  if (!request) return LT4REC_BAD_ARGUMENT;
  if (candidates < 0 || candidates > INT32_MAX)  // so that no size of a buffer overflows
    return request->fail(LT4REC_BAD_ARGUMENT, "candidates: got %" PRId64 ", wanted 0 to 2^31 - 1", candidates);
  request->begin(candidates);
  return LT4REC_OK;
}

int lt4rec_set_ints(lt4rec_request* request, int64_t field, const int64_t* values, const uint8_t* is_valid,
                    int64_t rows) {
  return set_values(request, field, values, is_valid, rows, LT4REC_INTS);
}

int lt4rec_set_doubles(lt4rec_request* request, int64_t field, const double* values, const uint8_t* is_valid,
                       int64_t rows) {
  return set_values(request, field, values, is_valid, rows, LT4REC_DOUBLES);
}

int lt4rec_set_strings(lt4rec_request* request, int64_t field, const lt4rec_string* values, const uint8_t* is_valid,
                       int64_t rows) {
  return filled(request, field, values != nullptr, rows, LT4REC_STRINGS, false, [&](int64_t row, Sink& sink) {
    const lt4rec_string& value = values[row];
    const bool is_there = !is_valid || is_valid[row];
    if (!request->spec(field).is_bag || !is_there) return put_one(request, field, value, is_there, row, sink);
    const char* text = value.size ? value.data : "";
    const bool is_of_strings = request->table(field).takes_strings();
    const auto* separator = reinterpret_cast<const char*>(request->spec(field).separator);
    if (text && lt4rec::is_utf8(text, value.size, true) &&
        lt4rec::put_text(text, value.size, separator, is_of_strings, sink))
      return int{LT4REC_OK};
    return request->fail(LT4REC_BAD_VALUE, "column %s: row %" PRId64 ": got other text, wanted %s between separators %s",
                         request->name(field), row, is_of_strings ? "UTF-8" : "ints of 64 bits", separator);
  });
}

int lt4rec_set_int_bags(lt4rec_request* request, int64_t field, const int64_t* values, const uint8_t* is_valid,
                        const int64_t* offsets, int64_t rows) {
  return set_bags(request, field, values, is_valid, offsets, rows, LT4REC_INTS);
}

int lt4rec_set_string_bags(lt4rec_request* request, int64_t field, const lt4rec_string* values,
                           const uint8_t* is_valid, const int64_t* offsets, int64_t rows) {
  return set_bags(request, field, values, is_valid, offsets, rows, LT4REC_STRINGS);
}

int lt4rec_set_vectors(lt4rec_request* request, int64_t field, const float* vectors, int64_t rows) {
  if (!request) return LT4REC_BAD_ARGUMENT;
  if (const int status = checked_field(request, field, vectors != nullptr, rows)) return status;
  const int64_t dim = request->model.ranker.dim();
  for (int64_t i = 0; i < rows * dim; ++i)
    if (!std::isfinite(vectors[i]))
      return request->fail(LT4REC_BAD_VALUE, "column %s: row %" PRId64 ": got a vector with %g, wanted finite numbers",
                           request->name(field), i / dim, double(vectors[i]));
  FieldIds& of_field = emptied(request, field);
  of_field.given = vectors;
  of_field.rows = rows;
  request->is_set[size_t(field)] = 1;
  return LT4REC_OK;
}

int lt4rec_score(lt4rec_request* request, int threads, float* scores) {
  if (!request) return LT4REC_BAD_ARGUMENT;
  return guarded(request->message, [&] {
    if (const int status = checked_request(request, threads)) return status;
    if (!scores && request->candidates > 0)
      return request->fail(LT4REC_BAD_ARGUMENT, "scores: got NULL, wanted float[candidates][tasks]");
    return scored(request, threads, scores);
  });
}

int lt4rec_rank(lt4rec_request* request, int threads, const lt4rec_ranking* ranking, int64_t k, int64_t* rows,
                double* rank_scores, float* scores, int64_t* count) {
  if (!request) return LT4REC_BAD_ARGUMENT;
  return guarded(request->message, [&] {
    const lt4rec_ranking by = ranking ? *ranking : lt4rec_ranking{nullptr, nullptr, 0};
    if (!count || (!rows && request->candidates > 0))
      return request->fail(LT4REC_BAD_ARGUMENT, "rows, count: got NULL, wanted int64_t[min(k, candidates)] and one");
    if (const int status = checked_request(request, threads)) return status;
    if (const int status = checked_ranking(request, by, k)) return status;
    const int64_t candidates = request->candidates, tasks = request->model.tasks(), best = std::min(k, candidates);
    request->scores.resize(size_t(candidates * tasks));
    request->rank_scores.resize(size_t(candidates));
    if (const int status = scored(request, threads, request->scores.data())) return status;
    for (int64_t row = 0; row < candidates; ++row) {
      const double product = rank_score(&request->scores[size_t(row * tasks)], tasks, by, row);
      if (!std::isfinite(product))
        return request->fail(LT4REC_BAD_VALUE, "rank score of row %" PRId64 ": got %s, wanted a finite number", row,
                             std::isnan(product) ? "nan" : "inf");
      request->rank_scores[size_t(row)] = product;
    }
    lt4rec::order_descending(request->rank_scores, size_t(best), request->order);
    for (int64_t i = 0; i < best; ++i) {
      const int64_t row = request->order[size_t(i)];
      rows[i] = row;
      if (rank_scores) rank_scores[i] = request->rank_scores[size_t(row)];
      if (scores) std::memcpy(scores + i * tasks, &request->scores[size_t(row * tasks)], size_t(tasks) * sizeof(float));
    }
    *count = best;
    return int{LT4REC_OK};
  });
}

}  // extern "C"
