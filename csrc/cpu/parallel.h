// Threads: torch's own OpenMP pool (same libgomp soname), never a second one.
#pragma once

#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace qwenopt {

struct Team {
  int id;
  int size;

  void barrier() const {
    if (size == 1) return;
#ifdef _OPENMP
#pragma omp barrier
#endif
  }

  // Static share of [0, count) for this member.
  void share(int64_t count, int64_t* begin, int64_t* end) const {
    *begin = count * id / size;
    *end = count * (id + 1) / size;
  }
};

// Runs body(team) on `threads` threads, or here when threads is 1. The body must not throw.
template <class Body>
void in_team(int threads, Body&& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(Team{0, 1});
}

// Rows of element-wise ops: one call body(begin, end) per thread. A fork costs a few microseconds, which is what one
// thread needs for about 16k elements, so less than that per thread is not worth forking for.
template <class Body>
void over_rows(int64_t rows, int64_t cols, int threads, Body&& body) {
  constexpr int64_t kGrain = 16 * 1024;
  int64_t useful = rows * cols / kGrain;
  if (useful > rows) useful = rows;
  if (useful < 1) useful = 1;
  in_team(useful < threads ? int(useful) : threads, [&](const Team& team) {
    int64_t begin, end;
    team.share(rows, &begin, &end);
    if (begin < end) body(begin, end);
  });
}

}  // namespace qwenopt
