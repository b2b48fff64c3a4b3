// The little of OpenMP that the engine uses, made of C++ threads, for ThreadSanitizer.
//
// GCC's own runtime is not instrumented: the sanitizer would miss its forks, joins and barriers and call everything a
// race. These functions are the ones that GCC's code calls for `parallel` with one `for schedule(dynamic)` in it. They
// order memory where the standard says so, at fork and join, and nowhere else: the loop's counter is relaxed, so that
// no iteration seems to wait for another.
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

struct Team {
  std::atomic<long> taken{0};
};
thread_local Team* team = nullptr;
thread_local int loops = 0;  // of this thread in its team
thread_local long loop_start = 0, loop_end = 0;

}  // namespace

extern "C" {

int omp_get_num_procs() { return 4; }  // more than one, whatever the machine has

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team members;
  Team* outer = team;
  const auto take_part = [&] {
    team = &members;
    loops = 0;
    body(data);
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(take_part);
  take_part();
  for (std::thread& other : others) other.join();
  team = outer;
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  *begin = loop_start + team->taken.fetch_add(1, std::memory_order_relaxed);
  *end = *begin + 1;
  return *begin < loop_end;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first, long* past) {
  if (++loops != 1 || step != 1 || chunk != 1) std::abort();  // a team has one counter
  loop_start = start;
  loop_end = end;
  return GOMP_loop_nonmonotonic_dynamic_next(first, past);
}

// The barrier behind a loop; the engine has nothing after it but the join.
void GOMP_loop_end() {}
void GOMP_loop_end_nowait() {}
}
