// All kernels of csrc/cuda/kernels as a library of plain functions: emulate_launch runs one on a grid.
#define QWENOPT_EMULATE 1
#include "cuda.h"

#if defined(QWENOPT_EMULATED_FILE)
#include QWENOPT_EMULATED_FILE
#else
#include "../kernels/budget_step.cuh"
#include "../kernels/kv_append.cuh"
#include "../kernels/linear.cuh"
#include "../kernels/lm_head.cuh"
#include "../kernels/qk_norm_rope.cuh"
#endif

namespace emulate {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

void enter() {
  Machine& m = machine();
  m.run(m.args);
  m.self->done = true;
  ++m.progress;
  --m.running;
  _longjmp(m.scheduler, 1);
}

void resume(Fiber& fiber) {
  Machine& m = machine();
  m.self = &fiber;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// The i-th of n to go on: first to last, last to first, or a permutation that changes with the round.
int pick(int i, int n, int order, uint64_t round) {
  if (order == 0) return i;
  if (order == 1) return n - 1 - i;
  const int step = n > 2 ? n / 2 | 1 : 1;
  for (int s = step + 2 * int(round % 5);; s += 2) {  // a step without a common divisor visits all
    int a = s, b = n;
    while (b) {
      const int rest = a % b;
      a = b;
      b = rest;
    }
    if (a == 1) return int((uint64_t(i) * s + round) % n);
  }
}

void prepare_block(int threads) {
  Machine& m = machine();
  m.fibers.resize(threads);
  m.warps.assign((threads + kLanes - 1) / kLanes, Warp());
  m.barrier = Meeting();
  m.running = threads;
  for (auto& one : m.shared) memset(one.second.bytes.data(), 0xff, one.second.bytes.size());
  for (int i = 0; i < threads; ++i) {
    Fiber& f = m.fibers[i];
    f.index = Index{unsigned(i), 0, 0};
    f.warp = i / kLanes;
    f.lane = i % kLanes;
    f.started = f.done = false;
    ++m.warps[f.warp].lanes;
    f.stack.resize(kStackBytes);
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.data();
    f.start.uc_stack.ss_size = f.stack.size();
    f.start.uc_link = nullptr;
    makecontext(&f.start, &enter, 0);
  }
}

void check_shared() {
  Machine& m = machine();
  for (auto& one : m.shared) {
    const Shared& s = one.second;
    const size_t lead = (16 - reinterpret_cast<uintptr_t>(s.bytes.data()) % 16) % 16;
    for (size_t i = 0; i < kGuard; ++i) {
      if (s.bytes[lead + s.size + i] != 0xff) m.error = "a write past the end of a shared variable";
    }
  }
}

void run_block(int threads, int order) {
  Machine& m = machine();
  prepare_block(threads);
  static volatile int place;
  static volatile uint64_t round, before;
  for (round = 0; m.running > 0 && m.error.empty(); ++round) {
    before = m.progress;
    for (place = 0; place < threads; ++place) {
      Fiber& fiber = m.fibers[pick(place, threads, order, round)];
      if (fiber.done) continue;
      if (_setjmp(m.scheduler) == 0) resume(fiber);
      if (!m.error.empty()) return;
    }
    if (m.progress == before && m.running > 0) {
      for (Fiber& fiber : m.fibers) {
        if (fiber.done) continue;
        const Warp& warp = m.warps[fiber.warp];
        const char* what = warp.meeting.arrived ? warp.meeting.what : m.barrier.arrived ? m.barrier.what : "nothing";
        m.error = "thread " + std::to_string(fiber.index.x) + " waits for ever in " + what;
      }
    }
  }
  check_shared();
}

}  // namespace
}  // namespace emulate

// Runs a kernel; returns null, or what went wrong. `order`: 0 first to last, 1 last to first, 2 mixed.
extern "C" const char* emulate_launch(const char* name, unsigned x, unsigned y, unsigned z, int threads,
                                      const void* args, size_t args_bytes, int order) {
  using namespace emulate;
  Machine& m = machine();
  m.error.clear();
  const auto found = kernels().find(name);
  if (found == kernels().end()) {
    m.error = std::string("no kernel ") + name;
  } else if (found->second.args_bytes != args_bytes || found->second.threads != threads) {
    m.error = std::string(name) + " has arguments of " + std::to_string(found->second.args_bytes) + " bytes and " +
              std::to_string(found->second.threads) + " threads, not " + std::to_string(args_bytes) + " and " +
              std::to_string(threads);
  } else {
    m.grid = Index{x, y, z};
    m.block = Index{unsigned(threads), 1, 1};
    m.run = found->second.run;
    m.args = args;
    const uint64_t count = uint64_t(x) * y * z;
    for (uint64_t i = 0; i < count && m.error.empty(); ++i) {
      const uint64_t b = uint64_t(pick(int(i), int(count), order, 0));
      m.block_index = Index{unsigned(b % x), unsigned(b / x % y), unsigned(b / x / y)};
      run_block(threads, order);
    }
  }
  return m.error.empty() ? nullptr : m.error.c_str();
}

// The names of all kernels, a line each.
extern "C" const char* emulate_kernels() {
  static std::string text;
  text.clear();
  for (const auto& one : emulate::kernels()) text += one.first + "\n";
  return text.c_str();
}
