// What the parts of the Python module share.
#ifndef LT4REC_SPARSE_MODULE_H
#define LT4REC_SPARSE_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>

#include "engine.h"
#include "request.h"

namespace module {

const Isa* isa_in_force();

// A matrix on the CPU whose rows are contiguous.
struct Matrix {
  uint8_t* data;
  int64_t rows, columns, stride;
  bool is_bf16;
};

// False where it is not a tensor, or not such a matrix, of float32 or bfloat16.
bool read_matrix(PyObject* object, Matrix* to);

// Unpacks exactly `wanted` integers; false with a Python exception set where they are not.
bool unpack(PyObject* const* args, Py_ssize_t count, int64_t* into, Py_ssize_t wanted);

template <class T>
T* address(int64_t value) {
  return reinterpret_cast<T*>(value);
}

struct Decref {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Decref>;

// Lets other threads of Python run while it lives, also past an exception.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// module_columns.cpp. False for a column that is left to Python, without a Python exception.
bool read_column(const lt4rec::Ranker& ranker, int64_t field, PyObject* column, lt4rec::FieldIds& to);
PyObject* use_arrays(PyObject*, PyObject* const* args, Py_ssize_t count);

// module_ranker.cpp
PyObject* new_ranker(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* score_columns(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* inputs_of_columns(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* score_ids(PyObject*, PyObject* const* args, Py_ssize_t count);

// module_training.cpp
PyObject* training_floats(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* training_forward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* training_backward(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace module
#endif
