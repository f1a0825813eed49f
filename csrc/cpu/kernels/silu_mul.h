// silu_mul: round(round(silu(gate)) * up)
#pragma once

#include "types.h"

namespace qwenopt {

struct SiluMulArgs {
  const void* gate;  // [rows, cols], rows gate_stride apart
  const void* up;    // [rows, cols], rows up_stride apart
  void* out;         // [rows, cols] contiguous
  int64_t rows, cols, gate_stride, up_stride;
  int dtype;
};

QWENOPT_DECLARE_KERNEL(void silu_mul(const SiluMulArgs& args, int64_t row0, int64_t row1))

}  // namespace qwenopt
