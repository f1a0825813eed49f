// All kernels of csrc/cuda/kernels as a library of plain functions: emulate_launch runs one on a grid.
#define QWENOPT_EMULATE 1
#include "cuda.h"

#if defined(QWENOPT_EMULATED_FILE)
#include QWENOPT_EMULATED_FILE
#else
#include "../kernels/budget_step.cuh"
#include "../kernels/kv_append.cuh"
#include "../kernels/linear.cuh"
#include "../kernels/linear_argmax.cuh"
#include "../kernels/moe_align.cuh"
#include "../kernels/paged_attention.cuh"
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

// Lets every thread from `first` to `last` that is not through go on, once; returns whether one got anywhere.
bool visit(int first, int last, int order) {
  Machine& m = machine();
  static volatile int i;
  const uint64_t before = m.progress;
  for (i = first; i < last; ++i) {
    Fiber& fiber = m.fibers[order == 2 ? last - 1 - (i - first) : i];
    if (fiber.done) continue;
    if (_setjmp(m.scheduler) == 0) resume(fiber);
    if (!m.error.empty()) return false;
  }
  return m.progress != before;
}

// All threads once, in turn (order 0), or each warp as far as it gets before the next one, from the first (1), or the
// last.
bool visit_all(int threads, int order) {
  if (order == 0) return visit(0, threads, order);
  const int warps = (threads + kLanes - 1) / kLanes;
  bool any = false;
  for (int w = 0; w < warps; ++w) {
    const int first = (order == 1 ? w : warps - 1 - w) * kLanes,
              last = first + kLanes < threads ? first + kLanes : threads;
    while (visit(first, last, order)) any = true;
  }
  return any;
}

// Tensors end where memory that nobody may touch begins; the compiler traps accesses that are wider than their address
// allows, which a GPU refuses (qwenopt/testing/emulated.py).
void fault(int signal) {
  Machine& m = machine();
  m.error = std::string(signal == SIGILL ? "an access at no multiple of its size" : "an access beside a tensor");
  m.error += " (block " + std::to_string(m.block_index.x) + ", " + std::to_string(m.block_index.y) + ", thread " +
             std::to_string(m.self->index.x) + ")";
  _longjmp(m.scheduler, 2);
}

class FaultsCaught {
 public:
  FaultsCaught() {
    struct sigaction own = {};
    own.sa_handler = &fault;
    own.sa_flags = SA_NODEFER;  // the handler does not return
    sigaction(SIGSEGV, &own, &segv_);
    sigaction(SIGBUS, &own, &bus_);
    sigaction(SIGILL, &own, &ill_);
  }
  ~FaultsCaught() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
    sigaction(SIGILL, &ill_, nullptr);
  }

 private:
  struct sigaction segv_, bus_, ill_;
};

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
  while (m.running > 0 && m.error.empty()) {
    if (visit_all(threads, order) || m.running == 0 || !m.error.empty()) continue;
    for (const Fiber& fiber : m.fibers) {
      if (fiber.done) continue;
      const Meeting& warp = m.warps[fiber.warp].meeting;
      const char* what = warp.arrived ? warp.what : m.barrier.arrived ? m.barrier.what : "nothing";
      m.error = "thread " + std::to_string(fiber.index.x) + " waits for ever in " + what;
    }
  }
  check_shared();
}

}  // namespace
}  // namespace emulate

// Runs a kernel; returns null, or what went wrong. `order`: 0 threads in turn, 1 warp by warp, 2 the same backwards.
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
    const FaultsCaught caught;
    const uint64_t count = uint64_t(x) * y * z;
    for (uint64_t i = 0; i < count && m.error.empty(); ++i) {
      const uint64_t b = order == 2 ? count - 1 - i : i;
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
