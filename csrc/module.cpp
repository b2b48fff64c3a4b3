// The module lt4rec_sparse.kernels._engine: addresses and tensors in, status out. The door that names what is wrong is
// cpu.py; this file only unpacks integers and lets go of the GIL.
//
// METH_FASTCALL on the limited API: one build serves every CPython from 3.10. `run` takes tensors as they are, because
// each query of a tensor from Python costs as much as a small layer: 0.2 us, a dozen of them per call.
#include "module.h"

#include <atomic>
#include <cstring>

#include "dlpack.h"

namespace {

// One per process, chosen when the module loads; only tests and benchmarks change it.
std::atomic<const Isa*> isa_now{nullptr};

// The tensor type that `run` reads, and its functions; null until use_tensors.
PyObject* tensor_type = nullptr;
const dlpack::ExchangeApi* tensors = nullptr;

}  // namespace

const Isa* module::isa_in_force() { return isa_now; }

bool module::unpack(PyObject* const* args, Py_ssize_t count, int64_t* into, Py_ssize_t wanted) {
  if (count != wanted) {
    PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted %zd", count, wanted);
    return false;
  }
  for (Py_ssize_t i = 0; i < wanted; ++i) {
    into[i] = PyLong_AsLongLong(args[i]);
    if (into[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

bool module::read_matrix(PyObject* object, Matrix* to) {
  dlpack::Tensor t;
  if (!tensors || reinterpret_cast<PyObject*>(Py_TYPE(object)) != tensor_type) return false;
  if (tensors->borrow(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool is_f32 = t.type_code == dlpack::kFloat && t.bits == 32;
  const bool is_bf16 = t.type_code == dlpack::kBfloat && t.bits == 16;
  if (t.device_type != dlpack::kCpu || t.ndim != 2 || !(is_f32 || is_bf16) || t.lanes != 1) return false;
  if (t.shape[1] != 1 && t.strides[1] != 1) return false;
  if (!t.data && t.shape[0] > 0 && t.shape[1] > 0) return false;  // its storage was taken away
  const int64_t stride = t.shape[0] > 1 ? t.strides[0] : t.shape[1];  // of a single row the stride means nothing
  *to = {static_cast<uint8_t*>(t.data) + t.byte_offset, t.shape[0], t.shape[1], stride, is_bf16};
  return true;
}

namespace {

using module::address;
using module::isa_in_force;
using module::Matrix;
using module::read_matrix;
using module::unpack;

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(isa_in_force()->name); }

PyObject* supported_isas(PyObject*, PyObject*) {
  const Isa* const* isas = lt4rec_supported_isas();
  Py_ssize_t count = 0;
  while (isas[count]) ++count;
  PyObject* names = PyTuple_New(count);
  for (Py_ssize_t i = 0; names && i < count; ++i) {
    PyObject* name = PyUnicode_FromString(isas[i]->name);
    if (!name || PyTuple_SetItem(names, i, name) < 0) Py_CLEAR(names);
  }
  return names;
}

// set_isa(index into supported_isas)
PyObject* set_isa(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t index;
  if (!unpack(args, count, &index, 1)) return nullptr;
  isa_now = lt4rec_supported_isas()[index];
  Py_RETURN_NONE;
}

// path(blob, bytes, batch) -> the fastest path, or None for no blob of ours
PyObject* path(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t a[3];
  if (!unpack(args, count, a, 3)) return nullptr;
  if (lt4rec_check_blob(address<const uint8_t>(a[0]), a[1]) != STATUS_OK) Py_RETURN_NONE;
  return PyLong_FromLongLong(lt4rec_path(isa_in_force(), address<const BlobHeader>(a[0]), a[2]));
}

// prepack(layers, count, precision, layouts, batch, allocate): copies the blob to the address allocate(bytes)
PyObject* prepack(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t a[5], bytes;
  if (count != 6) return PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted 6", count);
  if (!unpack(args, 5, a, 5)) return nullptr;
  const Isa* isa = isa_in_force();
  char message[MESSAGE_BYTES] = "";
  uint8_t* blob;
  Py_BEGIN_ALLOW_THREADS;
  bytes = lt4rec_prepack(address<const CanonicalLayer>(a[0]), a[1], a[2], a[3], isa, a[4], &blob, message);
  Py_END_ALLOW_THREADS;
  if (bytes == -1) PyErr_SetString(PyExc_ValueError, message);
  if (bytes == -2) PyErr_NoMemory();
  if (bytes < 0) return nullptr;
  PyObject* allocated = PyObject_CallFunction(args[5], "L", static_cast<long long>(bytes));
  const long long to = allocated ? PyLong_AsLongLong(allocated) : -1;
  Py_XDECREF(allocated);
  if (to != -1) std::memcpy(address<void>(to), blob, size_t(bytes));
  lt4rec_free(blob);
  if (to == -1) return nullptr;
  Py_RETURN_NONE;
}

// use_tensors(type, its __dlpack_c_exchange_api__) -> whether `run` can read such tensors
PyObject* use_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2) return PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted 2", count);
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(args[1], "dlpack_exchange_api"));
  if (!api) return nullptr;
  if (api->major != dlpack::kMajor || !api->borrow) Py_RETURN_FALSE;
  Py_INCREF(args[0]);
  tensor_type = args[0];
  tensors = api;
  Py_RETURN_TRUE;
}

int run_matrices(int64_t blob, int64_t bytes, const Matrix& x, const Matrix& bias, const Matrix& out, int64_t threads,
                 int64_t path) {
  if (threads < 1 || out.is_bf16 || out.rows != x.rows || out.stride < out.columns) return STATUS_NOT_READ;
  if (bias.is_bf16 || (bias.columns > 0 && bias.rows != 1 && bias.rows != x.rows)) return STATUS_NOT_READ;
  const SparseMlpCall call{x.data,
                           x.is_bf16,
                           x.rows,
                           x.columns,
                           x.stride,
                           reinterpret_cast<float*>(out.data),
                           out.columns,
                           out.stride,
                           threads,
                           path,
                           reinterpret_cast<float*>(bias.data),
                           bias.columns,
                           bias.rows > 1 ? bias.stride : 0};
  const Isa* isa = isa_in_force();
  int status;
  Py_BEGIN_ALLOW_THREADS;
  status = lt4rec_sparse_mlp(isa, address<const uint8_t>(blob), bytes, &call);
  Py_END_ALLOW_THREADS;
  return status;
}

// run(blob, bytes, x, out, threads, path[, bias]) -> status. STATUS_NOT_READ where it does not take the arguments: the
// caller finds out why. `bias` is that of the layers that take it from the call: one row, or as many as x has.
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6 && count != 7) return PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted 6 or 7", count);
  PyObject* const integers[] = {args[0], args[1], args[4], args[5]};
  int64_t a[4];
  if (!unpack(integers, 4, a, 4)) return nullptr;
  Matrix x, out, bias{};
  const bool is_read = read_matrix(args[2], &x) && read_matrix(args[3], &out) &&
                       (count == 6 || read_matrix(args[6], &bias));
  return PyLong_FromLong(is_read ? run_matrices(a[0], a[1], x, bias, out, a[2], a[3]) : int{STATUS_NOT_READ});
}

// run_new(blob, bytes, empty, outputs, x, threads, path) -> empty(rows of x, outputs) with the result, or None where
// `run` would not return STATUS_OK.
PyObject* run_new(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 7) return PyErr_Format(PyExc_TypeError, "arguments: got %zd, wanted 7", count);
  PyObject* const integers[] = {args[0], args[1], args[5], args[6]};
  int64_t a[4];
  if (!unpack(integers, 4, a, 4)) return nullptr;
  Matrix x, out;
  if (!read_matrix(args[4], &x)) Py_RETURN_NONE;
  PyObject* rows = PyLong_FromLongLong(x.rows);
  PyObject* result = rows ? PyObject_CallFunctionObjArgs(args[2], rows, args[3], nullptr) : nullptr;
  Py_XDECREF(rows);
  if (!result) return nullptr;
  if (read_matrix(result, &out) && run_matrices(a[0], a[1], x, {}, out, a[2], a[3]) == STATUS_OK) return result;
  Py_DECREF(result);
  Py_RETURN_NONE;
}

// describe(blob, bytes) -> the header's facts in the order of cpu.py, or None for no blob of ours
PyObject* describe(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t a[2];
  if (!unpack(args, count, a, 2)) return nullptr;
  const auto* blob = address<const uint8_t>(a[0]);
  if (lt4rec_check_blob(blob, a[1]) != STATUS_OK) Py_RETURN_NONE;
  BlobHeader h;
  std::memcpy(&h, blob, sizeof(h));
  using Long = unsigned long long;
  return Py_BuildValue("(IIIIIIIKKKKKKKKKK)", h.precision, h.layouts, h.in_features, h.outputs, h.tasks, h.layers,
                       h.bias_features, Long(h.nnz), Long(h.multiply_adds), Long(h.slice_multiply_adds), Long(h.table_multiply_adds),
                       Long(h.block_multiply_adds), Long(h.filled_multiply_adds), Long(h.bytes), Long(h.slice_bytes),
                       Long(h.table_bytes), Long(h.block_bytes));
}

#define FASTCALL(function) reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, nullptr},
    {"supported_isas", supported_isas, METH_NOARGS, nullptr},
    {"set_isa", FASTCALL(set_isa), nullptr},
    {"path", FASTCALL(path), nullptr},
    {"prepack", FASTCALL(prepack), nullptr},
    {"use_tensors", FASTCALL(use_tensors), nullptr},
    {"run", FASTCALL(run), nullptr},
    {"run_new", FASTCALL(run_new), nullptr},
    {"describe", FASTCALL(describe), nullptr},
    {"use_arrays", FASTCALL(module::use_arrays), nullptr},
    {"new_ranker", FASTCALL(module::new_ranker), nullptr},
    {"score_columns", FASTCALL(module::score_columns), nullptr},
    {"inputs_of_columns", FASTCALL(module::inputs_of_columns), nullptr},
    {"score_ids", FASTCALL(module::score_ids), nullptr},
    {"training_floats", FASTCALL(module::training_floats), nullptr},
    {"training_forward", FASTCALL(module::training_forward), nullptr},
    {"training_backward", FASTCALL(module::training_backward), nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_engine", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__engine(void) {
  for (const Isa* const* fastest = lt4rec_supported_isas(); *fastest; ++fastest) isa_now = *fastest;
  PyObject* module = PyModule_Create(&definition);
  if (module && (PyModule_AddIntConstant(module, "STATUS_BAD_BLOB", STATUS_BAD_BLOB) < 0 ||
                 PyModule_AddIntConstant(module, "STATUS_BAD_SHAPE", STATUS_BAD_SHAPE) < 0 ||
                 PyModule_AddIntConstant(module, "STATUS_NO_MEMORY", STATUS_NO_MEMORY) < 0 ||
                 PyModule_AddIntConstant(module, "STATUS_NO_LAYOUT", STATUS_NO_LAYOUT) < 0 ||
                 PyModule_AddIntConstant(module, "STATUS_NOT_READ", STATUS_NOT_READ) < 0))
    Py_CLEAR(module);
  return module;
}
