// The part of the module that trains.
#include "module.h"
#include "training.h"

// training_floats(layers, count, batch) -> the size of `panels`; layers are TrainingLayer[count]
PyObject* module::training_floats(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t a[3];
  if (!unpack(args, count, a, 3)) return nullptr;
  return PyLong_FromLongLong(lt4rec_training_floats(address<const TrainingLayer>(a[0]), a[1], a[2]));
}

// training_forward(layers, count, x, x_stride, batch, threads, panels, h, h_stride) -> status
PyObject* module::training_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t a[9];
  if (!unpack(args, count, a, 9)) return nullptr;
  int status;
  {
    const Unlocked unlocked;
    status = lt4rec_training_forward(isa_in_force(), address<const TrainingLayer>(a[0]), a[1],
                                     address<const float>(a[2]), a[3], a[4], a[5], address<float>(a[6]),
                                     address<float>(a[7]), a[8]);
  }
  return PyLong_FromLong(status);
}

// training_backward(layers, count, panels, dh, dh_stride, batch, threads, dx or 0, dx_stride) -> status
PyObject* module::training_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  int64_t a[9];
  if (!unpack(args, count, a, 9)) return nullptr;
  int status;
  {
    const Unlocked unlocked;
    status = lt4rec_training_backward(isa_in_force(), address<const TrainingLayer>(a[0]), a[1],
                                      address<const float>(a[2]), address<const float>(a[3]), a[4], a[5], a[6],
                                      address<float>(a[7]), a[8]);
  }
  return PyLong_FromLong(status);
}
