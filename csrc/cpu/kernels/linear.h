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
  void* packed;         // blocks only: scratch for x, 64-byte aligned
  int64_t block_steps;  // blocks in tiles only: K in blocks of this many times 32
};

// Output columns n0..n1, of a few rows.
QWENOPT_DECLARE_TILE_KERNEL(void linear(const LinearArgs& args, int64_t n0, int64_t n1))

// Many rows: first x is packed, any units in any order, then come blocks in any order.
struct LinearBlock {
  int64_t m0, m1, n0, n1;
  int64_t then;  // the first weight row that this thread reads afterwards, or -1
  float* sums;   // scratch of this thread, 64-byte aligned
};

// In AMX tiles, bfloat16: units 0..ceil(M / 16) * ceil(ceil(K / 32) / block_steps) of a KB for each 32 of K; m0 is a
// multiple of 32; `sums` has 4 bytes for each element of the block, with K in one block for 32 columns of them.
constexpr int64_t kLinearFewRows = 64;  // up to here weights are used as they lie, at the speed of memory
QWENOPT_DECLARE_AMX(void linear_pack(const LinearArgs& args, int64_t unit0, int64_t unit1))
QWENOPT_DECLARE_AMX(void linear_tiles(const LinearArgs& args, const LinearBlock& block))

// In floats: units 0..ceil(M / kLinearPackRows) * ceil(K / kLinearDepth) of kLinearPackRows * kLinearDepth floats; m0
// is a multiple of kLinearPackRows; a block has at most kLinearCols columns, and `sums` kLinearDepth floats for each
// column and one for each element, m1 rounded up to kLinearPackRows.
constexpr int64_t kLinearPackRows = 64, kLinearDepth = 128, kLinearCols = 48;
QWENOPT_DECLARE_KERNEL(void linear_widen(const LinearArgs& args, int64_t unit0, int64_t unit1))
QWENOPT_DECLARE_KERNEL(void linear_outer(const LinearArgs& args, const LinearBlock& block))

}  // namespace qwenopt
