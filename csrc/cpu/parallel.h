// Threads: torch's own OpenMP pool (same libgomp soname), never a second one.
#pragma once

#include <atomic>
#include <cstdint>

namespace qwenopt {

// All members meet here; any number of times. They spin, because the next piece of work is microseconds away, and give
// their turn away when it is not (more threads than cores).
class Barrier {
 public:
  void wait(int members);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> round_{0};
};

struct Team {
  int id;
  int size;
  Barrier* gate;

  void barrier() const {
    if (size > 1) gate->wait(size);
  }

  // Static share of [0, count) for this member when the first `members` of the team take part.
  void share(int64_t count, int members, int64_t* begin, int64_t* end) const {
    if (members > size) members = size;
    *begin = id < members ? count * id / members : 0;
    *end = id < members ? count * (id + 1) / members : 0;
  }
};

// Runs body(context, team) on `threads` threads, or here when threads is 1. The body must not throw.
void run_team(int threads, void (*body)(void* context, const Team& team), void* context);

template <class Body>
void in_team(int threads, Body&& body) {
  run_team(threads, [](void* context, const Team& team) { (*static_cast<Body*>(context))(team); }, &body);
}

// A shared counter; a copy starts at the beginning, so that a step can be copied.
struct Counter {
  std::atomic<int64_t> next{0};
  Counter() = default;
  Counter(const Counter&) {}
  Counter& operator=(const Counter&) {
    next.store(0, std::memory_order_relaxed);
    return *this;
  }
  int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }

  // A run of [0, count) for one of `members`: half an equal share of what is left, so that all end together, but at
  // least `grain`, of which every run but the last is a multiple. False when nothing is left.
  bool take_run(int64_t count, int64_t grain, int members, int64_t* begin, int64_t* end) {
    int64_t at = next.load(std::memory_order_relaxed), size;
    do {
      if (at >= count) return false;
      size = (count - at) / (2 * members) / grain * grain;
      if (size < grain) size = grain;
    } while (!next.compare_exchange_weak(at, at + size, std::memory_order_relaxed));
    *begin = at;
    *end = at + size < count ? at + size : count;
    return true;
  }
};

}  // namespace qwenopt
