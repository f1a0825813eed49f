#include "logit_signals.h"

#include "exp_below.h"
#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

// The vector at place i of n; past the end -inf, which counts for nothing.
template <class T>
F load_padded(const T* x, int64_t i, int64_t n) {
  if (i + W <= n) return load(x + i);
  float rest[W];
  for (int l = 0; l < W; ++l) rest[l] = i + l < n ? to_float(x[i + l]) : -__builtin_inff();
  return load(rest);
}

template <class T>
float largest(const T* x, int64_t n) {
  const F infinity = set1(__builtin_inff());
  F even = sub(zero(), infinity), odd = even;
  uint32_t unordered = 0;
  for (int64_t i = 0; i < n; i += 2 * W) {
    const F a = load_padded(x, i, n), b = load_padded(x, i + W, n);
    unordered |= lanes_above(a, infinity) | lanes_above(b, infinity);
    even = vmax(a, even);
    odd = vmax(b, odd);
  }
  return unordered != 0 ? __builtin_nanf("") : hmax(vmax(even, odd));
}

template <class T>
void add_up(const T* x, int64_t n, SignalPart* part) {
  const F top = set1(part->largest), low = set1(-87.0f);
  F sum[2] = {zero(), zero()}, weighted[2] = {zero(), zero()};
  for (int64_t i = 0; i < n; i += 2 * W) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const F below = sub(load_padded(x, i + v * W, n), top), share = exp_below(below);
      sum[v] = add(sum[v], share);
      weighted[v] = fma(share, vmax(low, below), weighted[v]);  // not 0 * -inf
    }
  }
  part->sum = hsum(add(sum[0], sum[1]));
  part->weighted = hsum(add(weighted[0], weighted[1]));
}

template <class T>
void fill(const LogitSignalsArgs& a, int64_t part) {
  const int64_t row = part / a.P, begin = part % a.P * kSignalColumns;
  const int64_t n = a.V - begin < kSignalColumns ? a.V - begin : kSignalColumns;
  const T* x = (const T*)a.logits + row * a.stride + begin;
  SignalPart& out = a.parts[part];
  out = {largest(x, n), 0.0f, 0.0f};
  if (a.entropy && __builtin_isfinite(out.largest)) add_up(x, n, &out);
}

}  // namespace

void logit_signals(const LogitSignalsArgs& a, int64_t part0, int64_t part1) {
  for (int64_t part = part0; part < part1; ++part) {
    of_type(a.dtype, [&](auto type) { fill<decltype(type)>(a, part); });
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
