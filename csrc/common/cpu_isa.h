// Which instruction sets this build has and this host can run.
#pragma once

namespace qwenopt {

enum CpuIsa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kNumIsas = 5 };

const char* isa_name(int isa);

// The best one the host can run (cpuid, the operating system's xsave state and, for AMX, its leave), found once.
int best_isa();

// -1 -> best_isa(); anything else is checked against the host and raises with `op` in the text.
int resolve_isa(const char* op, int isa);

}  // namespace qwenopt
