// The engine file: a whole ranker in one precision, to be read without Python.
//
// It is no format to keep models in: that is the artefact, which every release reads. An engine file has one version,
// and readers refuse all others; it is exported again from the artefact.
//
// Little-endian, without pointers. It begins with a FileHeader; all else are arrays, which an Array names by where they
// begin and how many elements they have. Arrays begin at multiples of 8 (those that are written, of 64); one without
// elements begins anywhere. Two may be the same: tasks that share a weight name the same `values` and `planes`. What no
// Array names is padding, and `zero` is 0. The checksum is over the whole file, with 32 zeros in its own place.
//
// Text is UTF-8, ended by a byte 0, which is counted and is the only one in it.
#ifndef LT4REC_SPARSE_ENGINE_FILE_H
#define LT4REC_SPARSE_ENGINE_FILE_H

#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "ranker.h"

namespace lt4rec {

using std::size_t;

constexpr char kMagic[8] = {'L', 'T', '4', 'R', 'E', 'C', 'E', 'F'};
constexpr uint32_t kFileVersion = 2;

struct Array {
  uint64_t offset;  // from the beginning of the file, in bytes
  uint64_t count;   // of elements
};

struct FileHeader {          // 208 bytes
  char magic[8];
  uint32_t version;
  uint32_t precision;        // PRECISION_F32, _BF16 or _S8
  uint64_t bytes;            // of the file
  uint8_t sha256[32];
  uint32_t dim;              // of an embedding
  uint32_t rows_kind;        // ROWS_F32, _F16 or _S8
  Array fields;              // FileField[], those with one value first
  Array tables;              // FileTable[]
  Array tasks;               // FileTask[], in the order of the scores
  Array common_layers;       // FileLayer[]: one per task; none where nothing is in common
  Array own_layers;          // FileLayer[]: those of the first task, of the second, ...
  Array embedding;           // float, uint16_t (half) or int8_t [rows][dim]; finite
  Array scales;              // of S8: float[rows], finite and not negative; else none
  Array common_columns;      // int64_t[]: which input each column of x of the common network is,
  Array own_columns;         // and of the own network; each input once
};

struct FileField {           // 48 bytes
  Array name;                // char[]
  Array separator;           // char[]: of a bag that is given as text
  uint32_t table;            // which of the tables
  uint32_t is_bag;           // 0 or 1, as every `is_`
  uint32_t is_common;
  uint32_t zero;
};

struct FileTable {           // 56 bytes
  uint32_t kind;             // TABLE_INTS, ...
  uint32_t zero;
  uint64_t size;             // ids are below. Of INTS, STRINGS and CUTS: keys + 2
  int64_t first_row;         // of the embedding; -1 where vectors come with each request
  Array keys;                // INTS: int64_t[]; STRINGS: UTF-8, char[]; CUTS: double[], ascending; else none
  Array offsets;             // STRINGS: int64_t[keys + 1], where each begins in `keys` and the last one ends
};

struct FileTask {            // 16 bytes
  Array name;                // char[]
};

struct FileLayer {           // 120 bytes: a CanonicalLayer of engine.h
  uint32_t is_blocks;
  uint32_t in_features;
  uint32_t out_features;
  uint32_t activation;
  uint32_t is_head;
  uint32_t takes_bias;
  uint32_t tasks;
  uint32_t task;
  int64_t input_zero_point;
  double input_scale;
  double slope;
  Array values;              // float[]
  Array planes;              // uint8_t[]; none for a dense weight
  Array bias;                // float[out_features], or none
  Array slopes;              // float[slope_rows][out_features], or none
};

static_assert(sizeof(FileHeader) == 208 && sizeof(FileField) == 48 && sizeof(FileTable) == 56 &&
              sizeof(FileTask) == 16 && sizeof(FileLayer) == 120, "the structures have no padding");

// Why a file is refused: which part of it, what was there, what was wanted.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a file holds, checked: a Ranker reads it without any further check, and lt4rec_prepack checks the layers'
// contents. Addresses are those of the file's bytes.
struct EngineFile {
  int64_t precision;
  std::vector<const char*> field_names, task_names;
  std::vector<TableSpec> tables;
  std::vector<FieldSpec> fields;
  std::vector<CanonicalLayer> common_layers, own_layers;
  RankerSpec ranker;

  // `bytes` stand at a multiple of 8. Throws Refused, and std::bad_alloc.
  EngineFile(const uint8_t* bytes, uint64_t size);
  EngineFile(const EngineFile&) = delete;  // `ranker` holds addresses of these vectors
  EngineFile& operator=(const EngineFile&) = delete;
};

}  // namespace lt4rec
#endif
