// The part of the module that ranks: a request's columns or ids, and its scores.
#include <algorithm>
#include <memory>
#include <new>

#include "module.h"

namespace {

using lt4rec::FieldIds;
using lt4rec::Ranker;
using lt4rec::Request;
using module::Matrix;
using module::Owned;

// --- Rankers ------------------------------------------------------------------------------------------------------

constexpr char kCapsule[] = "lt4rec_sparse.ranker";

struct Held {
  Ranker ranker;
  Owned columns;  // a tuple of the fields' columns
  Owned prepare;  // prepare(is_own, rows) -> the address of a blob, which stays
  int64_t outputs;
};

Held* held_of(PyObject* capsule) { return static_cast<Held*>(PyCapsule_GetPointer(capsule, kCapsule)); }

// The request of this thread, or another one where Python code that runs on the way began one more.
class Lease {
 public:
  Lease() : request_(is_taken_ ? *(more_ = std::make_unique<Request>()) : Request::of_this_thread()), before_(is_taken_) {
    is_taken_ = true;
  }
  ~Lease() { is_taken_ = before_; }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Request& operator*() { return request_; }

 private:
  static thread_local bool is_taken_;
  std::unique_ptr<Request> more_;
  Request& request_;
  bool before_;
};
thread_local bool Lease::is_taken_ = false;

// Vectors that a request brings in the place of ids.
bool read_given(const Ranker& ranker, PyObject* tensor, FieldIds& field) {
  Matrix vectors;
  if (!module::read_matrix(tensor, &vectors) || vectors.is_bf16) return false;
  if (vectors.columns != ranker.dim() || (vectors.rows > 1 && vectors.stride != vectors.columns)) return false;
  field.given = reinterpret_cast<const float*>(vectors.data);
  field.rows = vectors.rows;
  return true;
}

// The blob for so many rows, made where it is not here yet; null with a Python exception set.
const uint8_t* blob_for(Held& held, lt4rec::Network& network, bool is_own, const Isa* isa, int64_t rows) {
  int64_t path;
  if (const uint8_t* blob = network.blob_for(isa, rows, &path)) return blob;
  const Owned made(PyObject_CallFunction(held.prepare.get(), "LL", static_cast<long long>(is_own),
                                         static_cast<long long>(rows)));
  const long long address = made ? PyLong_AsLongLong(made.get()) : -1;
  if (address == -1) return nullptr;
  const auto* blob = module::address<const uint8_t>(address);
  network.add(lt4rec_path(isa, reinterpret_cast<const BlobHeader*>(blob), rows), blob);
  return blob;
}

// empty(rows, columns), which `to` shows; null with a Python exception set, or without one where it is no such matrix.
Owned result_of(PyObject* empty, int64_t rows, int64_t columns, Matrix* to) {
  Owned result(PyObject_CallFunction(empty, "LL", static_cast<long long>(rows), static_cast<long long>(columns)));
  if (!result || !module::read_matrix(result.get(), to) || to->is_bf16 || to->rows != rows || to->columns != columns)
    return nullptr;
  return result;
}

PyObject* none_or_null() {
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

// Scores what `request` holds into empty(rows, outputs).
PyObject* scored(Held& held, Request& request, int64_t rows, int64_t threads, PyObject* empty) {
  const Isa* isa = module::isa_in_force();
  Matrix out;
  Owned result = result_of(empty, rows, held.outputs, &out);
  if (!result) return none_or_null();
  if (rows == 0) return result.release();
  Ranker& ranker = held.ranker;
  const int64_t at_once = std::min(rows, Ranker::kPiece);
  const uint8_t* common = nullptr;
  if (ranker.common_width() > 0) {
    common = blob_for(held, ranker.common, false, isa, ranker.is_given_once(request) ? 1 : at_once);
    if (!common) return nullptr;
  }
  const uint8_t* own = blob_for(held, ranker.own, true, isa, at_once);
  if (!own) return nullptr;
  int status;
  {
    const module::Unlocked unlocked;
    status = ranker.score(isa, request, common, own, rows, threads, reinterpret_cast<float*>(out.data), out.stride);
  }
  if (status == STATUS_NO_MEMORY) return PyErr_NoMemory();
  if (status != STATUS_OK) Py_RETURN_NONE;
  return result.release();
}

// Reads a request's columns; its rows, or -1 where Python has to read them. See score_columns.
int64_t read_request(Held& held, PyObject* candidates, PyObject* context, PyObject* given, Request& request) {
  const auto is_dict = [](PyObject* object) { return object == Py_None || PyDict_Check(object); };
  if (!PyDict_Check(candidates) || !is_dict(context) || !is_dict(given)) return -1;
  const auto found = [](PyObject* dict, PyObject* name) {
    PyObject* value = dict == Py_None ? nullptr : PyDict_GetItemWithError(dict, name);
    if (!value) PyErr_Clear();
    return value;
  };
  const Ranker& ranker = held.ranker;
  request.begin(ranker.field_count());
  for (int64_t i = 0; i < ranker.field_count(); ++i) {
    FieldIds& field = request.fields[size_t(i)];
    PyObject* name = PyTuple_GetItem(held.columns.get(), i);
    if (PyObject* vectors = found(given, name)) {
      if (!read_given(ranker, vectors, field)) return -1;
      continue;
    }
    PyObject *of_context = found(context, name), *of_candidates = found(candidates, name);
    if (!of_context == !of_candidates) return -1;  // neither, or both
    PyObject* column = of_context ? of_context : of_candidates;
    Py_INCREF(column);
    const Owned kept(column);
    if (!module::read_column(ranker, i, column, field) || (of_context && field.rows != 1)) return -1;
  }
  return ranker.rows_of(request);
}

}  // namespace

// new_ranker(spec, columns, outputs, prepare) -> a capsule. The memory that the spec names outlives it.
PyObject* module::new_ranker(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted 4", count);
  PyObject* const integers[] = {args[0], args[2]};
  int64_t a[2];
  if (!unpack(integers, 2, a, 2)) return nullptr;
  try {
    Py_INCREF(args[1]);
    Py_INCREF(args[3]);
    auto held = std::unique_ptr<Held>(
        new Held{Ranker(*address<const RankerSpec>(a[0])), Owned(args[1]), Owned(args[3]), a[1]});
    PyObject* capsule = PyCapsule_New(held.get(), kCapsule, [](PyObject* of) { delete held_of(of); });
    if (capsule) held.release();
    return capsule;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// score_columns(ranker, candidates, context, given, threads, empty) -> empty(rows, outputs) with the scores, or None
// where Python has to read the columns. `candidates` and `context` (or None) are dicts of columns, those of the second
// of one row each, `given` (or None) one of vectors.
PyObject* module::score_columns(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) return PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted 6", count);
  Held* held = held_of(args[0]);
  int64_t threads;
  if (!held || !unpack(args + 4, 1, &threads, 1)) return nullptr;
  try {
    Lease lease;
    const int64_t rows = read_request(*held, args[1], args[2], args[3], *lease);
    if (rows < 0) Py_RETURN_NONE;
    return scored(*held, *lease, rows, threads, args[5]);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// inputs_of_columns(ranker, candidates, context, given, threads, empty): the same of the inputs of the network, for
// rankers without common fields.
PyObject* module::inputs_of_columns(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) return PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted 6", count);
  Held* held = held_of(args[0]);
  int64_t threads;
  if (!held || !unpack(args + 4, 1, &threads, 1)) return nullptr;
  try {
    Lease lease;
    const int64_t rows = read_request(*held, args[1], args[2], args[3], *lease);
    if (rows < 0) Py_RETURN_NONE;
    Matrix x;
    Owned result = result_of(args[5], rows, held->ranker.own_width(), &x);
    if (!result) return none_or_null();
    const module::Unlocked unlocked;
    held->ranker.own_inputs(isa_in_force(), *lease, rows, threads, reinterpret_cast<float*>(x.data), x.stride);
    return result.release();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// score_ids(ranker, single, rows, values, value_count, offsets, given, threads, empty): of `EncodedFeatures`, whose
// tensors are contiguous; or None where an id is out of its table, or the given vectors are not read.
PyObject* module::score_ids(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9) return PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted 9", count);
  Held* held = held_of(args[0]);
  int64_t a[5], threads;
  if (!held || !unpack(args + 1, 5, a, 5) || !unpack(args + 7, 1, &threads, 1)) return nullptr;
  const auto *single = address<const int64_t>(a[0]), *values = address<const int64_t>(a[2]);
  const auto* offsets = address<const int64_t>(a[4]);
  const int64_t rows = a[1];
  if (!(args[6] == Py_None || PyDict_Check(args[6]))) Py_RETURN_NONE;
  try {
    Lease lease;
    Request& request = *lease;
    const Ranker& ranker = held->ranker;
    request.begin(ranker.field_count());
    const int64_t fields = ranker.field_count();
    int64_t singles = 0;
    while (singles < fields && !ranker.field(singles).is_bag) ++singles;
    // Storage may have been taken away.
    if ((!single && rows * singles > 0) || (!values && a[3] > 0) || !offsets) Py_RETURN_NONE;
    for (int64_t i = 0; i < fields; ++i) {
      FieldIds& field = request.fields[size_t(i)];
      PyObject* vectors = nullptr;
      if (args[6] != Py_None) vectors = PyDict_GetItemWithError(args[6], PyTuple_GetItem(held->columns.get(), i));
      if (vectors) {
        if (!read_given(ranker, vectors, field)) Py_RETURN_NONE;
        continue;
      }
      if (!ranker.has_rows(i)) Py_RETURN_NONE;
      field.rows = rows;
      const int64_t size = ranker.table_of(i).size();
      const auto put = [&](int64_t id) { return id >= 0 && id < size && (field.ids.push_back(id), true); };
      if (!ranker.field(i).is_bag) {
        for (int64_t row = 0; row < rows; ++row)
          if (!put(single[row * singles + i])) Py_RETURN_NONE;
        continue;
      }
      const int64_t* begins = offsets + (i - singles) * rows;
      for (int64_t row = 0; row < rows; ++row) {
        if (begins[row] < 0 || begins[row + 1] > a[3]) Py_RETURN_NONE;
        for (int64_t at = begins[row]; at < begins[row + 1]; ++at)
          if (!put(values[at])) Py_RETURN_NONE;
        field.ends.push_back(int64_t(field.ids.size()));
      }
    }
    if (ranker.rows_of(request) != rows && rows != 0) Py_RETURN_NONE;
    return scored(*held, request, rows, threads, args[8]);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}
