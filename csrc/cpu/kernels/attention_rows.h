// Softmax and the sum of values, row by row, in vectors: what attention does where there are no tiles.
#pragma once

#include "attention.h"
#include "outer_block.h"
#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr float kMinusInfinity = -__builtin_inff();

static inline float exp1(float x) {
  float out;
  store_n(&out, exp_below(set1(x)), 1);
  return out;
}

// scores -> probabilities relative to the running maximum; keeps maximum, total and the factor for what came before.
template <class C>
static inline void softmax_row(float* scores, const float* bias, int num_keys, float scale, C* probs, float* maximum,
                               float* total, float* rescale) {
  const int whole = (num_keys + W - 1) / W * W;
  F top = set1(kMinusInfinity);
  for (int j = 0; j < whole; j += W) {
    F s = mul(load(scores + j), set1(scale));
    if (bias) s = add(s, load(bias + j));
    store(scores + j, s);
  }
  for (int j = num_keys; j < whole; ++j) scores[j] = kMinusInfinity;
  for (int j = 0; j < whole; j += W) top = vmax(load(scores + j), top);
  const float before = *maximum, now = hmax(top) > before ? hmax(top) : before;
  if (now == kMinusInfinity) {
    for (int j = 0; j < whole; j += W) store(probs + j, zero());
    *rescale = 1.0f;
    return;
  }
  F sum = zero();
  for (int j = 0; j < whole; j += W) {
    const F p = exp_below(sub(load(scores + j), set1(now)));
    sum = add(sum, p);
    store(probs + j, p);
  }
  *rescale = before == now ? 1.0f : exp1(before - now);
  *maximum = now;
  *total = *total * *rescale + hsum(sum);
}

// sums = sums * rescale + probs @ values for a few rows, values read where they lie.
template <class T, int MR>
static inline void add_values(const float* probs, const T* values, int64_t stride, int num_keys, int64_t D, float* sums,
                              int64_t padded, const float* rescale) {
  for (int64_t d = 0; d < D; d += kOuterVecs * W) {
    F acc[MR][kOuterVecs];
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kOuterVecs; ++v) {
        acc[i][v] = d + v * W < padded ? mul(load(sums + i * padded + d + v * W), set1(rescale[i])) : zero();
      }
    }
    if (d + kOuterVecs * W <= D) {
      for (int j = 0; j < num_keys; ++j) {
#pragma GCC unroll 4
        for (int v = 0; v < kOuterVecs; ++v) {
          const F value = load(values + j * stride + d + v * W);
#pragma GCC unroll 6
          for (int i = 0; i < MR; ++i) acc[i][v] = fma(set1(probs[i * kKeyBlock + j]), value, acc[i][v]);
        }
      }
    } else {
      for (int j = 0; j < num_keys; ++j) {
#pragma GCC unroll 4
        for (int v = 0; v < kOuterVecs; ++v) {
          if (d + v * W >= D) continue;
          const F value = load_upto(values + j * stride + d + v * W, D - d - v * W);
#pragma GCC unroll 6
          for (int i = 0; i < MR; ++i) acc[i][v] = fma(set1(probs[i * kKeyBlock + j]), value, acc[i][v]);
        }
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kOuterVecs; ++v) {
        if (d + v * W < padded) store(sums + i * padded + d + v * W, acc[i][v]);
      }
    }
  }
}

template <class T>
static inline void add_values_rows(int rows, const float* probs, const T* values, int64_t stride, int num_keys,
                                   int64_t D, float* sums, int64_t padded, const float* rescale) {
  for (int i = 0; i < rows;) {
    const int left = rows - i;
    const float* p = probs + i * kKeyBlock;
    float* to = sums + i * padded;
    if (left >= 4) {
      add_values<T, 4>(p, values, stride, num_keys, D, to, padded, rescale + i);
      i += 4;
    } else if (left >= 2) {
      add_values<T, 2>(p, values, stride, num_keys, D, to, padded, rescale + i);
      i += 2;
    } else {
      add_values<T, 1>(p, values, stride, num_keys, D, to, padded, rescale + i);
      i += 1;
    }
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
