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
  void* packed;         // in tiles only: scratch for x, a KB for each 16 rows and 32 of K, 64-byte aligned
  int64_t block_steps;  // in tiles only: K in blocks of this many times 32
};

// Output columns n0..n1.
QWENOPT_DECLARE_TILE_KERNEL(void linear(const LinearArgs& args, int64_t n0, int64_t n1))

constexpr int64_t kLinearFewRows = 64;  // up to here weights are used as they lie, at the speed of memory

// The same in AMX tiles, bfloat16: first x is packed, units 0..ceil(M / 16) * ceil(ceil(K / 32) / block_steps), then
// come blocks in any order.
struct LinearBlock {
  int64_t m0, m1, n0, n1;  // m0 a multiple of 32
  int64_t then;            // the first weight row that this thread reads afterwards, or -1
  float* sums;             // 64-byte aligned: 4 bytes for each element; with K in one block for 32 columns of them
};
QWENOPT_DECLARE_AMX(void linear_pack(const LinearArgs& args, int64_t unit0, int64_t unit1))
QWENOPT_DECLARE_AMX(void linear_tiles(const LinearArgs& args, const LinearBlock& block))

}  // namespace qwenopt
