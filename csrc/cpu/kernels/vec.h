// One vector vocabulary for every instruction set. Each kernel file is compiled once per set, with QWENOPT_ISA_NS
// naming the namespace (generic, avx2, avx512, avx512bf16, amx), so that nothing compiled for a wide set can be merged
// by the linker into code that runs on a narrow one. For the same reason no standard library header is included here.
//
// F is a vector of W floats. Operations: zero set1 load load_n store store_n add sub mul div fma vmax vmin hsum hmax
// lanes_above vexp round_to<T>, and hsum4 on AVX-512. load_n and store_n touch only the first n < W elements,
// and load_n fills with zeros.
//
// Elements T are float, bf16 and fp16; whatever they are, arithmetic is in float.
//
// Dot<T> multiplies and accumulates runs of T along the last dimension; Outer<T> does it with a broadcast left operand.
#pragma once

#include "types.h"

#if defined(QWENOPT_ISA_AVX512)
#include "vec_avx512.h"
#elif defined(QWENOPT_ISA_AVX2)
#include "vec_avx2.h"
#else
#include "vec_generic.h"
#endif

namespace qwenopt {
namespace QWENOPT_ISA_NS {

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
static inline float to_float(fp16 x) { return widen_one(x); }

// Round to nearest even; a NaN stays a NaN, and what float16 has no room for becomes an infinity.
template <class T>
static inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return bf16{0x7fc0};
  return bf16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  return narrow_one(x);
}

// fn(an element of the type that a dtype code stands for). Float16 has no kernels beyond those of AVX-512: kernel_isa.
template <class Fn>
static inline void of_type(int dtype, Fn fn) {
  if (dtype == kBFloat16) return fn(bf16());
#if !defined(QWENOPT_ISA_BF16)
  if (dtype == kFloat16) return fn(fp16());
#endif
  fn(float());
}

// e^x to about 1.5 ulp over the whole range: x = n ln2 + r, a polynomial in r, scaled by 2^n without early overflow.
static inline F vexp(F x) {
  x = vmin(set1(89.5f), vmax(set1(-105.0f), x));  // operands in this order so that a NaN comes through
  const F n = round_int(mul(x, set1(1.44269504088896341f)));
  F r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return scale2(p, n);
}

static inline F silu(F x) { return div(x, add(set1(1.0f), vexp(sub(zero(), x)))); }

// load/store of n elements where n may be a whole vector.
template <class T>
static inline F load_upto(const T* p, int64_t n) {
  return n >= W ? load(p) : load_n(p, int(n));
}
template <class T>
static inline void store_upto(T* p, F x, int64_t n) {
  if (n >= W) {
    store(p, x);
  } else {
    store_n(p, x, int(n));
  }
}

// Two vectors of elements one after the other.
template <class E>
static inline Pair load_pair(const E* p) {
  return {load(p), load(p + W)};
}
template <class E>
static inline Pair load_pair_n(const E* p, int n) {
  return {load_upto(p, n), n > W ? load_upto(p + W, n - W) : zero()};
}

template <class E>
struct PairDot {
  using X = Pair;
  static constexpr int STEP = 2 * W;
  static X load(const E* p) { return load_pair(p); }
  static X load_n(const E* p, int n) { return load_pair_n(p, n); }
  static F step(F acc, X a, X b) { return fma(a.second, b.second, fma(a.first, b.first, acc)); }
};
// As many bytes a step as Dot<bf16> has without VDPBF16PS.
template <>
struct Dot<fp16> : PairDot<fp16> {};

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
