// linear: out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]
#pragma once

#include "types.h"

namespace qwenopt {

struct LinearArgs {
  const void* x;       // [M, K], rows x_stride apart
  const void* weight;  // [N, K], rows weight_stride apart
  const void* bias;    // [N] or null
  void* out;           // [M, N], rows out_stride apart
  int64_t M, N, K;
  int64_t x_stride, weight_stride, out_stride;
  int dtype;
};

// Output columns n0..n1.
QWENOPT_DECLARE_KERNEL(void linear(const LinearArgs& args, int64_t n0, int64_t n1))

}  // namespace qwenopt
