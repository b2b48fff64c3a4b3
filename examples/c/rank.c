// Ranks three items of a shop for one user, from an engine file: `rank model.engine`.
//
//   make -C csrc && cc -Icsrc examples/c/rank.c -Lbuild/c -llt4rec -o rank && LD_LIBRARY_PATH=build/c ./rank model.engine
//
// The model has the columns item (ints), price (doubles), city (strings, one for all candidates) and tags (bags of
// strings); docs/c-api.md makes one.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lt4rec.h"

enum { CANDIDATES = 3, BEST = 2, MAX_TASKS = 16 };

static void check(int status, const char* message) {
  if (status == LT4REC_OK) return;
  fprintf(stderr, "%s: %s\n", lt4rec_status_text(status), message);
  exit(1);
}

static int64_t field_of(const lt4rec_model* model, const char* name) {
  int64_t field;
  check(lt4rec_find_field(model, name, &field), name);
  return field;
}

static lt4rec_string text(const char* data) { return (lt4rec_string){data, strlen(data)}; }

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: rank model.engine\n");
    return 2;
  }
  char why[LT4REC_MESSAGE_BYTES] = "";
  lt4rec_model* model;
  check(lt4rec_open(argv[1], &model, why), why);
  lt4rec_model_facts facts;
  check(lt4rec_describe(model, &facts), "describe");
  if (facts.tasks > MAX_TASKS) check(LT4REC_BAD_ARGUMENT, "more tasks than this example prints");

  lt4rec_request* request;
  check(lt4rec_request_new(model, &request), "request");
  const int64_t items[CANDIDATES] = {7, 9, 11};
  const double prices[CANDIDATES] = {3.5, 0, 120};
  const uint8_t has_price[CANDIDATES] = {1, 0, 1};
  const lt4rec_string city = text("Köln"), tags[] = {text("new"), text("red"), text("red")};
  const int64_t tag_ends[CANDIDATES + 1] = {0, 2, 2, 3};
  check(lt4rec_begin(request, CANDIDATES), lt4rec_message(request));
  check(lt4rec_set_ints(request, field_of(model, "item"), items, NULL, CANDIDATES), lt4rec_message(request));
  check(lt4rec_set_doubles(request, field_of(model, "price"), prices, has_price, CANDIDATES), lt4rec_message(request));
  check(lt4rec_set_strings(request, field_of(model, "city"), &city, NULL, 1), lt4rec_message(request));
  check(lt4rec_set_string_bags(request, field_of(model, "tags"), tags, NULL, tag_ends, CANDIDATES),
        lt4rec_message(request));

  int64_t rows[BEST], count;
  double rank_scores[BEST];
  float scores[BEST * MAX_TASKS];
  check(lt4rec_rank(request, 1, NULL, BEST, rows, rank_scores, scores, &count), lt4rec_message(request));

  printf("%-6s %-16s", "item", "rank score");
  for (int64_t task = 0; task < facts.tasks; ++task) {
    const char* name;
    check(lt4rec_task_name(model, task, &name), "task");
    printf(" %-14s", name);
  }
  printf("\n");
  for (int64_t i = 0; i < count; ++i) {
    printf("%-6" PRId64 " %-16.9g", items[rows[i]], rank_scores[i]);
    for (int64_t task = 0; task < facts.tasks; ++task) printf(" %-14.9g", (double)scores[i * facts.tasks + task]);
    printf("\n");
  }
  check(lt4rec_request_free(request), "free");
  check(lt4rec_close(model), "close");
  return 0;
}
