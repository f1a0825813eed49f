#include "parallel.h"

#include <sched.h>

#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif
#if QWENOPT_X86
#include <immintrin.h>
#endif

namespace qwenopt {
namespace {

inline void relax() {
#if QWENOPT_X86
  _mm_pause();
#endif
}

#ifdef _OPENMP
// libgomp's threads do not live on in a forked child, and a parallel region there waits for them for ever. Such a
// process gets threads of its own for each region: dearer (tens of microseconds), but it runs.
std::atomic<bool> is_forked{false};
const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked.store(true); });
#endif

void run_on_new_threads(int threads, void (*body)(void*, const Team&), void* context) {
  Barrier gate;
  std::vector<std::thread> others;
  for (int id = 1; id < threads; ++id) others.emplace_back([=, &gate] { body(context, Team{id, threads, &gate}); });
  body(context, Team{0, threads, &gate});
  for (std::thread& other : others) other.join();
}

}  // namespace

void Barrier::wait(int members) {
  constexpr int kSpins = 1 << 14;  // about half a millisecond
  const uint32_t round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      sched_yield();
    }
  }
}

void run_team(int threads, void (*body)(void*, const Team&), void* context) {
  if (threads <= 1) return body(context, Team{0, 1, nullptr});
#ifdef _OPENMP
  if (!is_forked.load(std::memory_order_relaxed)) {
    Barrier gate;
#pragma omp parallel num_threads(threads)
    body(context, Team{omp_get_thread_num(), omp_get_num_threads(), &gate});
    return;
  }
#endif
  run_on_new_threads(threads, body, context);
}

}  // namespace qwenopt
