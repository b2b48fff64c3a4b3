// A ranker from C: opens an engine file, scores candidates for every task, and ranks them. No Python.
//
//   lt4rec_model* model;       // one per file; any number of threads may use it at once
//   lt4rec_request* request;   // one per thread; keeps its memory from one request to the next
//   char why[LT4REC_MESSAGE_BYTES];
//   if (lt4rec_open("model.engine", &model, why)) ...
//   lt4rec_request_new(model, &request);
//   lt4rec_begin(request, 3);                        // candidates
//   lt4rec_set_ints(request, item, ids, NULL, 3);    // one row per candidate,
//   lt4rec_set_strings(request, city, &text, NULL, 1);  // or one row for all of them
//   lt4rec_score(request, 1, scores);
//
// Every function returns a status: LT4REC_OK, or what lt4rec_status_text says; lt4rec_message says it of the request at
// hand, with column, row and value. What a function that fails has written to its results means nothing.
//
// Scores are those of `Ranker.score`, to the bit: on every machine and for any number of threads, and whether what
// candidates have in common is given once or for each. The instruction set is the best that the machine has, or the one
// that the environment variable LT4REC_SPARSE_ISA names when the model is opened.
#ifndef LT4REC_H
#define LT4REC_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define LT4REC_API __attribute__((visibility("default")))
#else
#define LT4REC_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { LT4REC_MESSAGE_BYTES = 512 };

enum {
  LT4REC_OK = 0,
  LT4REC_BAD_FILE = 1,      // no engine file of this version, or a damaged one
  LT4REC_CANNOT_READ = 2,   // the operating system gives no file
  LT4REC_BAD_ISA = 3,       // LT4REC_SPARSE_ISA names one that this machine lacks
  LT4REC_BAD_ARGUMENT = 4,  // a null pointer, a number below its bound, no such field or task
  LT4REC_BAD_TYPE = 5,      // the field has values of another type
  LT4REC_BAD_VALUE = 6,     // a value that the field cannot have
  LT4REC_BAD_ROWS = 7,      // neither one row nor as many as there are candidates
  LT4REC_NOT_SET = 8,       // a field was given nothing
  LT4REC_NO_MEMORY = 9,
  LT4REC_INTERNAL = 10      // a fault of this library
};

// One line about a status; of a number that is none, it says so.
LT4REC_API const char* lt4rec_status_text(int status);

// --- Models -------------------------------------------------------------------------------------------------------

typedef struct lt4rec_model lt4rec_model;

// Opens an engine file, which is checked in full, memory-mapped while the model is open, and laid out for this machine.
// To replace a file, rename a new one to its name. `message` is char[LT4REC_MESSAGE_BYTES], or NULL: it names the part
// of the file and the rule.
LT4REC_API int lt4rec_open(const char* path, lt4rec_model** model, char* message);

// The same of a file in memory, which stands at a multiple of 8 and stays as it is while the model is open.
LT4REC_API int lt4rec_open_memory(const void* bytes, size_t size, lt4rec_model** model, char* message);

// After all its requests are freed. NULL is no model, and no error.
LT4REC_API int lt4rec_close(lt4rec_model* model);

enum { LT4REC_INTS = 0, LT4REC_STRINGS = 1, LT4REC_DOUBLES = 2 };
enum { LT4REC_FP32 = 0, LT4REC_BF16 = 1, LT4REC_INT8 = 2 };

// Text lives as long as the model.
typedef struct {
  int64_t fields;
  int64_t tasks;
  int64_t dim;       // of an embedding
  int precision;     // LT4REC_FP32, ...
  const char* isa;   // the instruction set that is used
} lt4rec_model_facts;

typedef struct {
  const char* name;  // of the column, UTF-8
  int type;          // LT4REC_INTS, ...: which values it takes
  int is_bag;        // several values per row
  int is_common;     // candidates of a request have it in common: give it one row, and it is computed with once
  int wants_vectors; // its embeddings are not in the file: each request brings vectors
} lt4rec_field_facts;

LT4REC_API int lt4rec_describe(const lt4rec_model* model, lt4rec_model_facts* facts);
LT4REC_API int lt4rec_describe_field(const lt4rec_model* model, int64_t field, lt4rec_field_facts* facts);
LT4REC_API int lt4rec_task_name(const lt4rec_model* model, int64_t task, const char** name);

// Where a field or a task is, by name; LT4REC_BAD_ARGUMENT where there is none.
LT4REC_API int lt4rec_find_field(const lt4rec_model* model, const char* name, int64_t* field);
LT4REC_API int lt4rec_find_task(const lt4rec_model* model, const char* name, int64_t* task);

// --- Requests -----------------------------------------------------------------------------------------------------

typedef struct lt4rec_request lt4rec_request;

typedef struct {
  const char* data;  // UTF-8, without an end; may be NULL where size is 0
  size_t size;       // in bytes
} lt4rec_string;

LT4REC_API int lt4rec_request_new(const lt4rec_model* model, lt4rec_request** request);
LT4REC_API int lt4rec_request_free(lt4rec_request* request);

// What went wrong in the last call that failed, in one line; lives until the next call of the request.
LT4REC_API const char* lt4rec_message(const lt4rec_request* request);

// Begins a request of so many candidates, from 0 on, and forgets the one before.
LT4REC_API int lt4rec_begin(lt4rec_request* request, int64_t candidates);

// Each gives a field its values, which are read at once: `rows` are 1, for all candidates, or one per candidate. Where
// `is_valid` is not NULL, values with a 0 there are missing; so is NaN. Fields of doubles take ints too, and fields of
// ints take doubles without a fraction.
LT4REC_API int lt4rec_set_ints(lt4rec_request* request, int64_t field, const int64_t* values, const uint8_t* is_valid,
                               int64_t rows);
LT4REC_API int lt4rec_set_doubles(lt4rec_request* request, int64_t field, const double* values,
                                  const uint8_t* is_valid, int64_t rows);
// Of a bag: each row is text, cut at the field's separator, without spaces around its parts and without empty parts.
LT4REC_API int lt4rec_set_strings(lt4rec_request* request, int64_t field, const lt4rec_string* values,
                                  const uint8_t* is_valid, int64_t rows);

// Bags: row r has values[offsets[r]] to values[offsets[r + 1] - 1]; `offsets` has rows + 1 elements, ascending from 0 or
// more. `is_valid` has one element per value; missing ones count as if they were not in the bag.
LT4REC_API int lt4rec_set_int_bags(lt4rec_request* request, int64_t field, const int64_t* values,
                                   const uint8_t* is_valid, const int64_t* offsets, int64_t rows);
LT4REC_API int lt4rec_set_string_bags(lt4rec_request* request, int64_t field, const lt4rec_string* values,
                                      const uint8_t* is_valid, const int64_t* offsets, int64_t rows);

// Vectors in the place of values, float[rows][dim], finite; of a bag the mean of its values' vectors. They are not
// copied: they must stay until the request was scored.
LT4REC_API int lt4rec_set_vectors(lt4rec_request* request, int64_t field, const float* vectors, int64_t rows);

// Every task's scores into float[candidates][tasks]. `threads`, at least 1, is an upper bound. What was set stays.
LT4REC_API int lt4rec_score(lt4rec_request* request, int threads, float* scores);

// The rank score of a candidate is the product, in double and in this order, of score ^ power of each task, then of
// factor ^ factor_power; 0 ^ 0 is 1.
typedef struct {
  const double* powers;  // [tasks], finite, at least 0; NULL: 1 for every task
  const double* factor;  // [candidates], finite, at least 0, such as a video's length; NULL: none
  double factor_power;   // finite, at least 0
} lt4rec_ranking;

// The best min(k, candidates), k at least 1, in descending order; candidates that are level keep their order. `rows`
// says which candidate each is, and `*count` how many there are. `ranking`, `rank_scores` and `scores` [count][tasks]
// may be NULL. A rank score that is infinite or NaN is LT4REC_BAD_VALUE.
LT4REC_API int lt4rec_rank(lt4rec_request* request, int threads, const lt4rec_ranking* ranking, int64_t k,
                           int64_t* rows, double* rank_scores, float* scores, int64_t* count);

#ifdef __cplusplus
}
#endif
#endif
