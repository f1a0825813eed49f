// A GPU on a CPU thread, for tests: the builtins that csrc/cuda/kernels use, on blocks whose threads are fibers.
//
// A fiber runs until it must wait for others: at a barrier, a shuffle, a product of matrices. Strict where a GPU is
// not: a barrier that not all threads of a block reach, lanes of a warp that meet in different places, a write past a
// shared variable and a thread that waits for ever are errors with a text. The order in which the waiting threads go
// on, and that of blocks, is the caller's choice: a kernel that lacks a barrier gives other results in another order.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <map>
#include <string>
#include <vector>

namespace emulate {

constexpr int kLanes = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Threads that wait for one another; `what` they wait in must be the same.
struct Meeting {
  int arrived = 0;
  unsigned round = 0;
  const char* what = nullptr;
};

struct Warp {
  Meeting meeting;
  int lanes = 0;
  uint64_t slots[2][kLanes][8];  // of the meeting that is on, and of the one before, which some lanes still read
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  Index index;
  int warp = 0, lane = 0;
  bool started = false, done = false;
  std::vector<char> stack;
};

struct Shared {
  std::vector<unsigned char> bytes;
  size_t size = 0;
};

struct Machine {
  Index grid, block, block_index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, Shared> shared;
  Meeting barrier;
  Fiber* self = nullptr;
  jmp_buf scheduler;
  ucontext_t back;
  uint64_t progress = 0;
  int running = 0;
  void (*run)(const void*) = nullptr;
  const void* args = nullptr;
  std::string error;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline void yield() {
  Machine& m = machine();
  if (_setjmp(m.self->state) == 0) _longjmp(m.scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& text) {
  Machine& m = machine();
  m.error = text + " (block " + std::to_string(m.block_index.x) + ", " + std::to_string(m.block_index.y) + ", thread " +
            std::to_string(m.self->index.x) + ")";
  _longjmp(m.scheduler, 2);
}

inline void meet(Meeting& meeting, int wanted, const char* what) {
  if (meeting.arrived > 0 && strcmp(meeting.what, what) != 0) {
    fail(std::string("threads meet in different places: ") + meeting.what + " and " + what);
  }
  meeting.what = what;
  const unsigned round = meeting.round;
  ++machine().progress;
  if (++meeting.arrived == wanted) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    while (meeting.round == round) yield();
  }
}

// What all lanes of the warp gave, as [lane][word].
inline uint64_t (*exchange(const uint64_t* mine, int words, uint32_t mask, const char* what))[8] {
  Machine& m = machine();
  Warp& warp = m.warps[m.self->warp];
  if (mask != 0xffffffffu) fail(std::string(what) + " of a part of a warp");
  const unsigned side = warp.meeting.round & 1;
  memcpy(warp.slots[side][m.self->lane], mine, sizeof(uint64_t) * words);
  meet(warp.meeting, warp.lanes, what);
  return warp.slots[side];
}

template <class T>
uint64_t to_slot(T value) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t slot = 0;
  memcpy(&slot, &value, sizeof(T));
  return slot;
}
template <class T>
T from_slot(uint64_t slot) {
  T value;
  memcpy(&value, &slot, sizeof(T));
  return value;
}

template <class T>
T shuffle(uint32_t mask, T value, int from, const char* what) {
  const uint64_t mine = to_slot(value);
  Machine& m = machine();
  uint64_t (*all)[8] = exchange(&mine, 1, mask, what);
  const bool there = from >= 0 && from < m.warps[m.self->warp].lanes;
  return there ? from_slot<T>(all[from][0]) : value;
}

inline int self_lane() { return machine().self->lane; }

inline float half_of(uint64_t word, int which) {
  const uint32_t bits = which ? uint32_t(word) & 0xffff0000u : uint32_t(word) << 16;
  return from_slot<float>(bits);
}

// Fragments as described in common.cuh; sums in double, rounded once.
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint64_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  uint64_t (*all)[8] = exchange(mine, 6, 0xffffffffu, "mma");
  const int lane = self_lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i >= 2 ? 8 : 0), col = lane % 4 * 2 + (i & 1);
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const float x = half_of(all[row % 8 * 4 + k % 8 / 2][(row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0)], k & 1);
      const float y = half_of(all[col * 4 + k % 8 / 2][4 + (k >= 8 ? 1 : 0)], k & 1);
      sum += double(x) * double(y);
    }
    d[i] = float(sum);
  }
}

// A shared variable, known by the address of a function of its own; filled with 0xff (NaN) when a block begins.
constexpr size_t kGuard = 64;
inline void* shared_memory(const void* key, size_t size) {
  Shared& s = machine().shared[key];
  if (s.bytes.empty()) {
    s.size = size;
    s.bytes.assign(size + kGuard + 16, 0xff);
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(s.bytes.data()) + 15) & ~uintptr_t(15));
}

struct Kernel {
  void (*run)(const void*);
  size_t args_bytes;
  int threads;
};
inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}
struct Registered {
  Registered(const char* name, void (*run)(const void*), size_t args_bytes, int threads) {
    kernels()[name] = Kernel{run, args_bytes, threads};
  }
};

}  // namespace emulate

#define __device__
#define __forceinline__ inline
#define threadIdx (emulate::machine().self->index)
#define blockIdx (emulate::machine().block_index)
#define blockDim (emulate::machine().block)
#define gridDim (emulate::machine().grid)

#define QWENOPT_KERNEL(name, Args, threads, ...)       \
  static void name##_emulated(const void* memory) {    \
    const Args& a = *static_cast<const Args*>(memory); \
    __VA_ARGS__;                                       \
  }                                                    \
  static const emulate::Registered name##_entry(#name, &name##_emulated, sizeof(Args), threads);
#define QWENOPT_SHARED(T, name)     \
  static const char name##_key = 0; \
  T& name = *static_cast<T*>(emulate::shared_memory(&name##_key, sizeof(T)))

#define rsqrtf(x) (1.0f / sqrtf(x))

#define QWENOPT_HERE2(line) #line
#define QWENOPT_HERE1(line) QWENOPT_HERE2(line)
#define QWENOPT_HERE(what) what " at " __FILE__ ":" QWENOPT_HERE1(__LINE__)
#define __syncthreads() emulate::meet(emulate::machine().barrier, int(blockDim.x), QWENOPT_HERE("__syncthreads"))
#define __syncwarp() (void)emulate::shuffle(0xffffffffu, 0, 0, QWENOPT_HERE("__syncwarp"))
#define __shfl_sync(mask, value, from) emulate::shuffle(mask, value, from, QWENOPT_HERE("__shfl_sync"))
#define __shfl_xor_sync(mask, value, n) \
  emulate::shuffle(mask, value, emulate::self_lane() ^ (n), QWENOPT_HERE("__shfl_xor_sync"))
#define __shfl_up_sync(mask, value, n) \
  emulate::shuffle(mask, value, emulate::self_lane() - int(n), QWENOPT_HERE("__shfl_up_sync"))
#define __match_any_sync(mask, value) emulate::match_any(mask, value, QWENOPT_HERE("__match_any_sync"))

namespace emulate {
template <class T>
uint32_t match_any(uint32_t mask, T value, const char* what) {
  const uint64_t mine = to_slot(value);
  Machine& m = machine();
  uint64_t (*all)[8] = exchange(&mine, 1, mask, what);
  uint32_t found = 0;
  for (int i = 0; i < m.warps[m.self->warp].lanes; ++i) found |= uint32_t(all[i][0] == mine) << i;
  return found;
}
}  // namespace emulate

static inline float __int_as_float(int x) { return emulate::from_slot<float>(uint32_t(x)); }
static inline float __uint_as_float(unsigned x) { return emulate::from_slot<float>(x); }
static inline int __float_as_int(float x) { return int(emulate::to_slot(x)); }
static inline unsigned __float_as_uint(float x) { return unsigned(emulate::to_slot(x)); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  const uint64_t both = uint64_t(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= unsigned(both >> (select >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}
// Blocks run one after another, and threads change only where they wait.
static inline void __threadfence() {}
template <class T>
static inline T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
static inline T atomicMax(T* address, T value) {
  const T before = *address;
  if (value > before) *address = value;
  return before;
}
