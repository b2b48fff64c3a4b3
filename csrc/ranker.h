// A whole ranker: from ids to every task's scores in one call. Plain C, as engine.h is.
//
// A request's inputs are those of ranker/inputs.py: the vectors of n fields, then the dot products of all pairs,
// `n dim + n (n - 1) / 2` numbers, which stand in the order of training. Fields that candidates have in common, such as
// the user's, make up a part of them that is the same for the whole request. So the network is two:
//
//   common  each task's first layer over the inputs of common fields alone, with its bias and without its activation
//   own     all layers over the other inputs; the first one's bias is what `common` yields (engine.h, given bias)
//
// A request computes `common` once where it gives each common field once, and else for each candidate: the numbers are
// the same to the bit. A dot product is a chain of fused multiply-adds from 0 on, elements ascending; the mean of a bag is
// the sum of its rows in their order, over their number.
#ifndef LT4REC_SPARSE_RANKER_H
#define LT4REC_SPARSE_RANKER_H

#include "engine.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { TABLE_INTS = 0, TABLE_STRINGS = 1, TABLE_HASHED_INTS = 2, TABLE_HASHED_STRINGS = 3, TABLE_CUTS = 4 };
enum { ROWS_F32 = 0, ROWS_F16 = 1, ROWS_S8 = 2 };

// Addresses travel as integers, as in engine.h.
typedef struct {
  int64_t kind;
  int64_t size;       // ids are below
  int64_t keys;       // INTS: int64_t[count]; STRINGS: UTF-8 bytes; CUTS: double[count], ascending
  int64_t offsets;    // STRINGS: int64_t[count + 1]
  int64_t count;
  int64_t first_row;  // of the embedding matrix; -1 where the table's vectors come with each request
} TableSpec;

typedef struct {
  int64_t table;
  int64_t is_bag;     // several values, whose vectors' mean is the field's
  int64_t is_common;
  int64_t separator;  // UTF-8, ended by 0: of a bag that is given as text
} FieldSpec;

typedef struct {
  int64_t tables, table_count;  // TableSpec[]
  int64_t fields, field_count;  // FieldSpec[]: those with one value first
  int64_t dim;
  int64_t embedding;            // float, uint16_t (half) or int8_t [rows, dim]
  int64_t rows_kind;
  int64_t scales;               // of S8: float[rows]
  int64_t common_columns, common_count;  // int64_t[]: which input each column of x of the network `common` is,
  int64_t own_columns, own_count;        // and of `own`
} RankerSpec;

#ifdef __cplusplus
}
#endif
#endif
