// What the rows of a query block see of a key block.
#pragma once

#include "attention.h"
#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

enum Visible : int { kNothing = 0, kEverything = 1, kSome = 2 };

// Keys before this one may be seen by query s, as far as order goes.
static inline int64_t key_limit(const AttentionArgs& a, int64_t s) {
  int64_t limit = a.L;
  if (a.is_causal && s + 1 < limit) limit = s + 1;
  if (a.q_positions && a.q_positions[s] + 1 < limit) limit = a.q_positions[s] + 1;
  return limit < 0 ? 0 : limit;
}

// Keys before this one are behind the window of query s.
static inline int64_t key_first(const AttentionArgs& a, int64_t s) {
  if (a.pages.window == 0 || !a.q_positions) return 0;
  const int64_t first = a.q_positions[s] + 1 - a.pages.window;
  return first < 0 ? 0 : first;
}

template <class M>
static inline float mask_value(M m) {
  return to_float(m);
}
static inline float mask_value(uint8_t m) { return m ? 0.0f : -__builtin_inff(); }

template <class M>
static inline float fill_bias(const M* mask, int64_t stride, int n, float* bias) {
  float top = -__builtin_inff();
  if (stride == 1) {
    for (int j = 0; j < n; ++j) bias[j] = mask_value(mask[j]);
  } else {
    for (int j = 0; j < n; ++j) bias[j] = mask_value(mask[j * stride]);
  }
  for (int j = 0; j < n; ++j) top = bias[j] <= top ? top : bias[j];
  return top;
}

// What query s sees as far as order goes: keys first..limit.
struct Order {
  int64_t first, limit;
};

// bias[0..kKeyBlock) = what to add to the scores of query s, head h, keys j0..j0+n; unset when everything is seen.
static inline Visible row_bias(const AttentionArgs& a, int64_t b, int64_t h, int64_t s, Order order, int64_t j0,
                               int num_keys, float* bias) {
  const int n = order.limit - j0 >= num_keys ? num_keys : order.limit > j0 ? int(order.limit - j0) : 0;
  const int behind = order.first <= j0 ? 0 : order.first - j0 >= n ? n : int(order.first - j0);
  if (n == behind) return kNothing;
  if (a.mask_kind == kNoMask && n == num_keys && behind == 0) return kEverything;
  const int64_t at = b * a.m_sb + h * a.m_sh + s * a.m_ss + j0 * a.m_sl;
  float top = 0.0f;
  if (a.mask_kind == kBoolMask) {
    const uint8_t* mask = (const uint8_t*)a.mask + at;
    int seen = 0;
    for (int j = behind; j < n; ++j) seen += mask[j * a.m_sl] != 0;
    if (seen == 0) return kNothing;
    if (seen == num_keys) return kEverything;
    fill_bias(mask, a.m_sl, n, bias);
  } else if (a.mask_kind == kFloatMask) {
    top = fill_bias((const float*)a.mask + at, a.m_sl, n, bias);
  } else if (a.mask_kind == kBf16Mask) {
    top = fill_bias((const bf16*)a.mask + at, a.m_sl, n, bias);
  } else if (a.mask_kind == kFp16Mask) {
    top = fill_bias((const fp16*)a.mask + at, a.m_sl, n, bias);
  } else {
    for (int j = 0; j < n; ++j) bias[j] = 0.0f;
  }
  if (top == -__builtin_inff()) return kNothing;
  for (int j = 0; j < behind; ++j) bias[j] = -__builtin_inff();
  for (int j = n; j < kKeyBlock; ++j) bias[j] = -__builtin_inff();
  return kSome;
}

template <class M>
static inline bool shows(M m) {
  return !(to_float(m) == -__builtin_inff());
}
static inline bool shows(uint8_t m) { return m != 0; }

template <class M>
static inline void add_seen(const M* mask, int64_t stride, int from, int to, uint8_t* seen) {
  for (int j = from; j < to; ++j) seen[j] |= shows(mask[j * stride]);
}

// Sets seen[j] where query s, head h may see key j0 + j.
static inline void add_seen(const AttentionArgs& a, int64_t b, int64_t h, int64_t s, Order order, int64_t j0,
                            int num_keys, uint8_t* seen) {
  const int to = order.limit - j0 >= num_keys ? num_keys : order.limit > j0 ? int(order.limit - j0) : 0;
  const int from = order.first <= j0 ? 0 : order.first - j0 >= to ? to : int(order.first - j0);
  const int64_t at = b * a.m_sb + h * a.m_sh + s * a.m_ss + j0 * a.m_sl;
  if (a.mask_kind == kBoolMask) {
    add_seen((const uint8_t*)a.mask + at, a.m_sl, from, to, seen);
  } else if (a.mask_kind == kFloatMask) {
    add_seen((const float*)a.mask + at, a.m_sl, from, to, seen);
  } else if (a.mask_kind == kBf16Mask) {
    add_seen((const bf16*)a.mask + at, a.m_sl, from, to, seen);
  } else if (a.mask_kind == kFp16Mask) {
    add_seen((const fp16*)a.mask + at, a.m_sl, from, to, seen);
  } else {
    for (int j = from; j < to; ++j) seen[j] = 1;
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
