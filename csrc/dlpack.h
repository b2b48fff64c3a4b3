// What the engine needs of the DLPack 1.x C exchange API: a table of functions that a tensor type shows as
// `__dlpack_c_exchange_api__`, a capsule named "dlpack_exchange_api". The layouts are fixed within major version 1.
// Specification: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <cstdint>

namespace dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48, "DLTensor");

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void *allocate, *from_object, *to_object;  // of tensors that own their memory
  int (*borrow)(void* object, Tensor* out);  // 0, or -1 with a Python exception set
  void* current_stream;
};

}  // namespace dlpack
