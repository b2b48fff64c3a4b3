// Engine files with faults: `mutants COUNT SEED FILE...`. Each mutant must be refused with a message, or serve requests
// whose rows do not depend on each other; one with a stale checksum must be refused. `mutants threads 0 FILE...` serves
// whole files to several threads. `mutants freed 0 FILE` and `mutants shared 0 FILE` are faults on purpose. Prints what it
// did, and how many mutants per second.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine_file.h"
#include "lt4rec.h"
#include "sha256.h"

#define CHECK(condition, ...)                                      \
  do {                                                             \
    if (!(condition)) {                                            \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                           \
      std::fprintf(stderr, "\n");                                  \
      std::exit(1);                                                \
    }                                                              \
  } while (0)

namespace {

using lt4rec::Array;
using lt4rec::FileHeader;
using Bytes = std::vector<uint8_t>;

std::mt19937_64 random_numbers;

uint64_t below(uint64_t bound) { return random_numbers() % bound; }

Bytes read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Bytes bytes((std::istreambuf_iterator<char>(file)), {});
  CHECK(bytes.size() > sizeof(FileHeader), "%s", path);
  return bytes;
}

FileHeader header_of(const Bytes& bytes) {
  FileHeader header;
  std::memcpy(&header, bytes.data(), sizeof(header));
  return header;
}

void seal(Bytes& bytes) {
  if (bytes.size() < sizeof(FileHeader)) return;
  const uint64_t size = bytes.size();
  std::memcpy(&bytes[offsetof(FileHeader, bytes)], &size, sizeof(size));
  uint8_t* place = &bytes[offsetof(FileHeader, sha256)];
  std::memset(place, 0, 32);
  lt4rec::Sha256 sha256;
  sha256.add(bytes.data(), bytes.size());
  std::memcpy(place, sha256.digest().data(), 32);
}

// --- Requests -----------------------------------------------------------------------------------------------------

struct CloseModel {
  void operator()(lt4rec_model* model) const { lt4rec_close(model); }
};
struct FreeRequest {
  void operator()(lt4rec_request* request) const { lt4rec_request_free(request); }
};

// Row r of every column depends on r alone.
void set_rows(lt4rec_request* request, const lt4rec_model* model, const std::vector<int64_t>& rows) {
  static const char* const kTexts[] = {"red", "green", "a", "", "nothing like it"};
  lt4rec_model_facts facts;
  CHECK(lt4rec_describe(model, &facts) == LT4REC_OK, "describe");
  const auto count = int64_t(rows.size());
  for (int64_t field = 0; field < facts.fields; ++field) {
    lt4rec_field_facts of;
    CHECK(lt4rec_describe_field(model, field, &of) == LT4REC_OK, "describe_field");
    CHECK(std::strlen(of.name) > 0, "field %lld", (long long)field);
    std::vector<int64_t> ints, offsets{0};
    std::vector<double> doubles;
    std::vector<lt4rec_string> texts;
    std::vector<uint8_t> is_valid;
    for (int64_t row : rows) {
      const int64_t values = of.is_bag ? (row + field) % 4 : 1;
      for (int64_t i = 0; i < values; ++i) {
        ints.push_back((row * 7 + field + i) % 9 - 2);
        doubles.push_back(double(row) * 0.7 - double(field));
        const char* text = kTexts[size_t(row + field + i) % 5];
        texts.push_back({text, std::strlen(text)});
        is_valid.push_back((row + i) % 5 != 0);
      }
      offsets.push_back(int64_t(ints.size()));
    }
    int status;
    static thread_local std::vector<float> vectors;  // read when the request is scored
    vectors.assign(size_t(facts.dim) * rows.size(), 0.5f);
    if (of.wants_vectors) {
      status = lt4rec_set_vectors(request, field, vectors.data(), count);
    } else if (of.is_bag) {
      status = of.type == LT4REC_STRINGS
                   ? lt4rec_set_string_bags(request, field, texts.data(), is_valid.data(), offsets.data(), count)
                   : lt4rec_set_int_bags(request, field, ints.data(), is_valid.data(), offsets.data(), count);
    } else if (of.type == LT4REC_STRINGS) {
      status = lt4rec_set_strings(request, field, texts.data(), is_valid.data(), count);
    } else if (of.type == LT4REC_DOUBLES) {
      status = lt4rec_set_doubles(request, field, doubles.data(), is_valid.data(), count);
    } else {
      status = lt4rec_set_ints(request, field, ints.data(), is_valid.data(), count);
    }
    CHECK(status == LT4REC_OK, "%s", lt4rec_message(request));
  }
}

std::vector<float> scores_of(lt4rec_request* request, const lt4rec_model* model, const std::vector<int64_t>& rows) {
  lt4rec_model_facts facts;
  CHECK(lt4rec_describe(model, &facts) == LT4REC_OK, "describe");
  CHECK(lt4rec_begin(request, int64_t(rows.size())) == LT4REC_OK, "begin");
  set_rows(request, model, rows);
  std::vector<float> scores(rows.size() * size_t(facts.tasks));
  CHECK(lt4rec_score(request, 1, scores.data()) == LT4REC_OK, "%s", lt4rec_message(request));
  return scores;
}

bool is_same(float a, float b) { return a == b || (a != a && b != b); }

// What an accepted file must do.
void serve(const lt4rec_model* model) {
  lt4rec_request* made = nullptr;
  CHECK(lt4rec_request_new(model, &made) == LT4REC_OK, "request_new");
  const std::unique_ptr<lt4rec_request, FreeRequest> request(made);
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < 17; ++row) rows.push_back(row);
  const std::vector<float> all = scores_of(made, model, rows);
  const size_t tasks = all.size() / rows.size();
  std::vector<int64_t> order(5);
  int64_t count = 0;
  const bool is_finite = std::all_of(all.begin(), all.end(), [](float score) { return std::isfinite(score); });
  const int status = lt4rec_rank(made, 1, nullptr, 5, order.data(), nullptr, nullptr, &count);
  CHECK(is_finite ? status == LT4REC_OK && count == 5 : status == LT4REC_BAD_VALUE, "rank: status %d: %s", status,
        lt4rec_message(made));
  for (int64_t row : {0, 5, 16}) {
    const std::vector<float> one = scores_of(made, model, {row});
    for (size_t task = 0; task < tasks; ++task)
      CHECK(is_same(one[task], all[size_t(row) * tasks + task]), "row %lld, task %zu", (long long)row, task);
  }
}

// Whether the file is accepted; memory ends where it does.
bool opens(const Bytes& bytes) {
  const auto own = std::unique_ptr<uint8_t, decltype(&std::free)>(static_cast<uint8_t*>(std::malloc(bytes.size())),
                                                                  &std::free);
  std::memcpy(own.get(), bytes.data(), bytes.size());
  char message[LT4REC_MESSAGE_BYTES] = "";
  lt4rec_model* made = nullptr;
  const int status = lt4rec_open_memory(own.get(), bytes.size(), &made, message);
  if (status != LT4REC_OK) {
    CHECK(status == LT4REC_BAD_FILE && message[0] && std::strstr(message, "got"), "status %d: %s", status, message);
    return false;
  }
  const std::unique_ptr<lt4rec_model, CloseModel> model(made);
  serve(made);
  return true;
}

// --- Mutants ------------------------------------------------------------------------------------------------------

// A place in the structures of a file: its header, or a record of one of the arrays that are made of records.
uint64_t structural_place(const FileHeader& header, uint64_t width) {
  const struct {
    Array array;
    uint64_t size;
  } kinds[] = {{{8, 1}, sizeof(FileHeader) - 8},
               {header.fields, sizeof(lt4rec::FileField)},
               {header.tables, sizeof(lt4rec::FileTable)},
               {header.tasks, sizeof(lt4rec::FileTask)},
               {header.common_layers, sizeof(lt4rec::FileLayer)},
               {header.own_layers, sizeof(lt4rec::FileLayer)}};
  for (;;) {
    const auto& [array, size] = kinds[below(6)];
    if (array.count) return array.offset + below(array.count * size / width) * width;
  }
}

// A place in the offsets or keys of a table, the columns, or anywhere.
uint64_t place_of_contents(const Bytes& bytes, const FileHeader& header) {
  Array array{0, bytes.size() / 8};
  lt4rec::FileTable table;
  switch (below(4)) {
    case 0: array = header.own_columns; break;
    case 1: array = header.common_columns; break;
    case 2:
      std::memcpy(&table, &bytes[header.tables.offset + below(header.tables.count) * sizeof(table)], sizeof(table));
      array = table.offsets.count ? table.offsets : table.keys;
      break;
    default: break;
  }
  return array.count ? array.offset + below(array.count) * 8 : 0;
}

template <class Word>
void change_word(Bytes& bytes, uint64_t place, const FileHeader& header) {
  Word old, other;
  std::memcpy(&old, &bytes[place], sizeof(old));
  std::memcpy(&other, &bytes[structural_place(header, sizeof(other))], sizeof(other));
  const Word values[] = {0, 1, 2, Word(-1), Word(Word(1) << (8 * sizeof(Word) - 1)), Word(old + 1), Word(old - 1),
                         Word(old * 2), Word(old / 2), Word(bytes.size()), Word(bytes.size() - old), other,
                         Word(old ^ Word(1) << below(8 * sizeof(Word))), Word(random_numbers()), Word(old + 8),
                         Word(old + 64)};
  const Word value = values[below(std::size(values))];
  std::memcpy(&bytes[place], &value, sizeof(value));
}

void mutate(Bytes& bytes, const FileHeader& header) {
  switch (below(6)) {
    case 0:
      for (uint64_t i = below(4) + 1; i > 0; --i) bytes[below(bytes.size())] ^= uint8_t(1 << below(8));
      break;
    case 1: change_word<uint32_t>(bytes, structural_place(header, 4), header); break;
    case 2: change_word<uint64_t>(bytes, structural_place(header, 8), header); break;
    case 3: {
      const uint64_t place = place_of_contents(bytes, header);
      if (place + 8 <= bytes.size()) change_word<uint64_t>(bytes, place, header);
      break;
    }
    case 4: {  // a run of bytes over another one
      const uint64_t count = 1 + below(std::min<uint64_t>(bytes.size() / 2, 256));
      const uint64_t from = below(bytes.size() - count), to = below(bytes.size() - count);
      std::memmove(&bytes[to], &bytes[from], count);
      break;
    }
    default:
      if (below(8) == 0) bytes.resize(1 + below(bytes.size()));
      else change_word<uint64_t>(bytes, structural_place(header, 8), header);
  }
}

void run(int64_t count, const std::vector<Bytes>& files) {
  int64_t accepted = 0, stale = 0;
  const auto begun = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < count; ++i) {
    const Bytes& whole = files[below(files.size())];
    Bytes mutant = whole;
    const FileHeader header = header_of(whole);
    for (uint64_t changes = below(3) + 1; changes > 0 && mutant.size() == whole.size(); --changes)
      mutate(mutant, header);
    const bool is_stale = below(16) == 0 && mutant != whole;
    if (is_stale) ++stale;
    else seal(mutant);
    if (!opens(mutant)) continue;
    CHECK(!is_stale, "mutant %lld of stale checksum is accepted", (long long)i);
    ++accepted;
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  std::printf("mutants: %lld engine files, %lld accepted and served, %lld with a stale checksum, %.0f per second\n",
              (long long)count, (long long)accepted, (long long)stale, double(count) / seconds);
}

// The file's memory goes before the model does.
void run_freed(const Bytes& file) {
  auto* own = static_cast<uint8_t*>(std::malloc(file.size()));
  std::memcpy(own, file.data(), file.size());
  lt4rec_model* model = nullptr;
  CHECK(lt4rec_open_memory(own, file.size(), &model, nullptr) == LT4REC_OK, "open");
  std::free(own);
  serve(model);
}

// One model and a request per thread; with `is_shared` they have one request, which they must not.
void run_threads(const std::vector<Bytes>& files, bool is_shared) {
  for (const Bytes& file : files) {
    lt4rec_model* model = nullptr;
    CHECK(lt4rec_open_memory(file.data(), file.size(), &model, nullptr) == LT4REC_OK, "open");
    lt4rec_request* request = nullptr;
    CHECK(lt4rec_request_new(model, &request) == LT4REC_OK, "request_new");
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i)
      threads.emplace_back([&] {
        if (is_shared) lt4rec_begin(request, 1);
        else serve(model);
      });
    for (std::thread& thread : threads) thread.join();
    lt4rec_request_free(request);
    lt4rec_close(model);
  }
  std::printf("mutants: %zu engine files, each served to three threads\n", files.size());
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc >= 4, "usage: mutants COUNT|threads|freed|shared SEED FILE...");
  std::vector<Bytes> files;
  for (int i = 3; i < argc; ++i) files.push_back(read(argv[i]));
  if (std::strcmp(argv[1], "freed") == 0) return run_freed(files[0]), 0;
  if (std::strcmp(argv[1], "threads") == 0) return run_threads(files, false), 0;
  if (std::strcmp(argv[1], "shared") == 0) return run_threads(files, true), 0;
  random_numbers.seed(std::strtoull(argv[2], nullptr, 10));
  for (const Bytes& file : files) CHECK(opens(file), "a whole file is refused");
  run(std::atoll(argv[1]), files);
}
