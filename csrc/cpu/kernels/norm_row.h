// The parts of an RMS norm over one row, in the reference's cast order.
#pragma once

#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

// 1 / sqrt(mean(x^2) + eps)
template <class T>
static inline float inverse_rms(const T* x, int64_t cols, float eps) {
  F acc[4] = {zero(), zero(), zero(), zero()};
  int64_t c = 0;
  for (; c + 4 * W <= cols; c += 4 * W) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F h = load(x + c + i * W);
      acc[i] = fma(h, h, acc[i]);
    }
  }
  for (; c < cols; c += W) {
    const F h = load_upto(x + c, cols - c);
    acc[0] = fma(h, h, acc[0]);
  }
  const float mean = hsum(add(add(acc[0], acc[1]), add(acc[2], acc[3]))) / float(cols);
  return 1.0f / __builtin_sqrtf(mean + eps);
}

// weight * round(h * scale), rounded: what the reference gives before the next op reads it.
template <class T>
static inline F normalised(F h, F scale, F weight) {
  return round_to<T>(mul(weight, round_to<T>(mul(h, scale))));
}

template <class T>
static inline void norm_row(const T* x, const T* weight, T* out, int64_t cols, float eps) {
  const F scale = set1(inverse_rms(x, cols, eps));
  for (int64_t c = 0; c < cols; c += W) {
    const F h = load_upto(x + c, cols - c), w = load_upto(weight + c, cols - c);
    store_upto(out + c, normalised<T>(h, scale, w), cols - c);
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
