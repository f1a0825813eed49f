// rms_norm and add_rms_norm: x * rsqrt(mean(x^2) + eps), rounded, times weight, rounded.
#pragma once

#include "types.h"

namespace qwenopt {

struct RmsNormArgs {
  const void* x;         // [rows, cols], rows x_stride apart
  const void* residual;  // add_rms_norm: [rows, cols], rows residual_stride apart
  const void* weight;    // [cols]
  void* out;             // [rows, cols] contiguous
  void* sum;             // add_rms_norm: [rows, cols] contiguous, residual + x
  int64_t rows, cols, x_stride, residual_stride;
  double eps;
  int dtype;
};

QWENOPT_DECLARE_KERNEL(void rms_norm(const RmsNormArgs& args, int64_t row0, int64_t row1))
QWENOPT_DECLARE_KERNEL(void add_rms_norm(const RmsNormArgs& args, int64_t row0, int64_t row1))

}  // namespace qwenopt
