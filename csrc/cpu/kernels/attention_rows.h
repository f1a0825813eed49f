// The softmax of attention, row by row, in vectors: for many rows where there are no tiles.
#pragma once

#include "attention.h"
#include "exp_below.h"

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

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
