#include "cpu_isa.h"

#include <cstdint>

#include "check.h"

#if QWENOPT_X86
#include <cpuid.h>
#endif
#if QWENOPT_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qwenopt {
namespace {

#if QWENOPT_X86
struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
  Leaf out;
  if (!__get_cpuid_count(leaf, subleaf, &out.a, &out.b, &out.c, &out.d)) return Leaf();
  return out;
}

// XCR0 says which register files the operating system saves; without that, using them corrupts other programs.
uint64_t saved_state(const Leaf& one) {
  constexpr uint32_t kOsxsave = 1u << 27;
  if (!(one.c & kOsxsave)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// The tile registers are large, so Linux gives them to a process only when asked: for all its threads, once.
bool leave_for_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool all(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

int detect() {
  const Leaf one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const uint64_t state = saved_state(one);
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 3u << 17;
  constexpr uint32_t kFma = 1u << 12, kAvx = 1u << 28, kF16c = 1u << 29, kAvx2Bit = 1u << 5;
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr uint32_t kVnni = 1u << 11, kBf16 = 1u << 5;
  constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  if ((state & kYmm) != kYmm || !all(one.c, kFma | kAvx | kF16c) || !all(seven.b, kAvx2Bit)) return kGeneric;
  if ((state & kZmm) != kZmm || !all(seven.b, kF | kDq | kBw | kVl)) return kAvx2;
  if (!all(seven.c, kVnni) || !all(seven_one.a, kBf16)) return kAvx512;
  if ((state & kTiles) != kTiles || !all(seven.d, kAmxBf16 | kAmxTile | kAmxInt8)) return kAvx512Bf16;
  if (!leave_for_tiles()) return kAvx512Bf16;
  return kAmx;
}
#else
int detect() { return kGeneric; }
#endif

}  // namespace

const char* isa_name(int isa) {
  static const char* const kNames[kNumIsas] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};
  return isa >= 0 && isa < kNumIsas ? kNames[isa] : "unknown";
}

int best_isa() {
  static const int isa = detect();
  return isa;
}

int resolve_isa(const char* op, int isa) {
  const int best = best_isa();
  if (isa == -1) return best;
  QWENOPT_CHECK(isa >= 0 && isa < kNumIsas, op, ": isa ", isa,
                "; isa must be -1 (best), 0 generic, 1 avx2, 2 avx512, 3 avx512bf16 or 4 amx");
  QWENOPT_CHECK(isa <= best, op, ": isa ", isa, " (", isa_name(isa), ") on a host whose best is ", best, " (",
                isa_name(best), "); isa must be one the host can run");
  return isa;
}

}  // namespace qwenopt
