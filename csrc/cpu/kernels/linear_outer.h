// linear for many rows where T has no instruction of its own: T widened to floats once for many products.
//
// x is packed with its rows in the lanes, so that a weight row is the broadcast operand as it lies: weights need only
// be widened, kLinearDepth of k at a time, and are then used for every row of x. An element is summed over k in one
// order, wherever its row lies, so a row's bits do not depend on its neighbours.
#pragma once

#include "linear.h"
#include "outer_block.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr int64_t kLanes = kOuterVecs * W;  // rows of x that lie side by side: a panel
static_assert(kLinearPackRows % kLanes == 0, "a unit of packing is whole panels");
static_assert(kLinearDepth % kOuterSteps == 0 && kLinearDepth % W == 0, "whole sums, whole vectors");

// The packed x: [block of k][panel][k of the block][kLanes], zeros past row M.
static inline float* packed_panel(const LinearArgs& a, int64_t k, int64_t panel) {
  const int64_t rows = (a.M + kLinearPackRows - 1) / kLinearPackRows * kLinearPackRows;
  const int64_t depth = a.K - k < kLinearDepth ? a.K - k : kLinearDepth;
  return (float*)a.packed + k * rows + panel * kLanes * depth;
}

// Rows of T, `cols` <= kLinearDepth of k each -> out[k][kLanes].
template <class T>
static inline void pack_panel(const T* x, int64_t stride, int64_t rows, int64_t cols, float* out) {
  alignas(64) float wide[W * kLinearDepth];
  for (int64_t m = 0; m < kLanes; m += W) {
    const int here = rows - m < 0 ? 0 : rows - m < W ? int(rows - m) : W;
    const uint32_t* row[W];
    for (int i = 0; i < W; ++i) {
      float* to = wide + i * kLinearDepth;
      if (i < here) widen_row(x + (m + i) * stride, cols, to);
      row[i] = (const uint32_t*)to;
    }
    for (int64_t k = 0; k < cols; k += W) {
      const uint32_t* at[W];
      for (int i = 0; i < W; ++i) at[i] = row[i] + k;
      transpose(at, here, int(cols - k < W ? cols - k : W), (uint32_t*)out + k * kLanes + m, kLanes);
    }
  }
}

template <class T>
static inline void pack_units(const LinearArgs& a, int64_t unit0, int64_t unit1) {
  const int64_t groups = (a.M + kLinearPackRows - 1) / kLinearPackRows;
  for (int64_t unit = unit0; unit < unit1; ++unit) {
    const int64_t k = unit / groups * kLinearDepth, cols = a.K - k < kLinearDepth ? a.K - k : kLinearDepth;
    for (int64_t m = unit % groups * kLinearPackRows, end = m + kLinearPackRows; m < end; m += kLanes) {
      pack_panel((const T*)a.x + m * a.x_stride + k, a.x_stride, a.M - m, cols, packed_panel(a, k, m / kLanes));
    }
  }
}

// Weight rows n0..n1, `cols` of k -> floats, kLinearDepth apart; what comes next in each row is asked for.
template <class T>
static inline void widen_weights(const T* weight, int64_t stride, int64_t rows, int64_t cols, float* out) {
  for (int64_t n = 0; n < rows; ++n, weight += stride, out += kLinearDepth) {
    for (int64_t k = 0; k < cols; k += W) __builtin_prefetch(weight + k + kLinearDepth, 0, 2);
    widen_row(weight, cols, out);
  }
}

// sums [n][kLanes] of one panel -> out[m][n], bias added, rounded.
template <class T>
static inline void finish_panel(const float* sums, const T* bias, int64_t rows, int64_t cols, T* out, int64_t stride) {
  alignas(64) float lines[W * W];
  for (int64_t m = 0; m < rows; m += W) {
    for (int64_t n = 0; n < cols; n += W) {
      const int here = cols - n < W ? int(cols - n) : W;
      const uint32_t* at[W];
      for (int j = 0; j < W; ++j) at[j] = (const uint32_t*)(sums + (n + (j < here ? j : 0)) * kLanes + m);
      transpose(at, here, W, (uint32_t*)lines, W);
      for (int i = 0; i < W && m + i < rows; ++i) {
        F y = load(lines + i * W);
        if (bias) y = add(y, load_upto(bias + n, here));
        store_upto(out + (m + i) * stride + n, y, here);
      }
    }
  }
}

// Rows m0..m1, columns n0..n1, at most kLinearCols of them.
template <class T>
static inline void outer_columns(const LinearArgs& a, const LinearBlock& b) {
  const int64_t cols = b.n1 - b.n0;
  float* weights = b.sums;
  float* sums = weights + kLinearCols * kLinearDepth;
  float ones[kLinearCols];
  for (float& one : ones) one = 1.0f;
  for (int64_t k = 0; k < a.K; k += kLinearDepth) {
    const int64_t steps = a.K - k < kLinearDepth ? a.K - k : kLinearDepth;
    widen_weights((const T*)a.weight + b.n0 * a.weight_stride + k, a.weight_stride, cols, steps, weights);
    for (int64_t m = b.m0; m < b.m1; m += kLanes) {
      const int64_t lanes = b.m1 - m < kLanes ? (b.m1 - m + W - 1) / W * W : kLanes;
      outer_block<float>(int(cols), (const uint32_t*)weights, kLinearDepth,
                         (const uint32_t*)packed_panel(a, k, m / kLanes), kLanes, lanes, steps,
                         sums + (m - b.m0) * cols, kLanes, k > 0 ? ones : nullptr);
    }
  }
  const T* bias = a.bias ? (const T*)a.bias + b.n0 : nullptr;
  for (int64_t m = b.m0; m < b.m1; m += kLanes) {
    finish_panel(sums + (m - b.m0) * cols, bias, b.m1 - m < kLanes ? b.m1 - m : kLanes, cols,
                 (T*)a.out + m * a.out_stride + b.n0, a.out_stride);
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
