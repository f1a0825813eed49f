// c[m][n] = scale[m] * c[m][n] + sum_k a[m][k] * b[k][n] with b packed so that n lies in the lanes: no horizontal sums.
//
// Operands are 32-bit words: one float, or (where VDPBF16PS is built) two bfloat16 neighbours in k. Packing b costs
// about as much as five rows of the product, so this is for eight rows and more.
#pragma once

#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

// Row of T -> row of floats, zeros up to a whole vector.
template <class T>
static inline void widen_row(const T* from, int64_t n, float* to) {
  for (int64_t d = 0; d < n; d += W) store(to + d, load_upto(from + d, n - d));
}

// The type that a product of T is computed in, and how many of them one word holds.
template <class T>
struct Compute {
  using Type = float;
  static constexpr int PACK = 1;
};

template <class C>
struct Outer;
template <>
struct Outer<float> {
  static F spread(const uint32_t* a) { return set1(*(const float*)a); }
  static F load_b(const uint32_t* b) { return load((const float*)b); }
  static F step(F acc, F a, F b) { return fma(a, b, acc); }
  using X = F;
};

#if defined(QWENOPT_ISA_BF16)
template <>
struct Compute<bf16> {
  using Type = bf16;
  static constexpr int PACK = 2;
};
template <>
struct Outer<bf16> {
  using X = __m512i;
  static X spread(const uint32_t* a) { return _mm512_set1_epi32(int(*a)); }
  static X load_b(const uint32_t* b) { return _mm512_loadu_si512(b); }
  static F step(F acc, X a, X b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
};
#endif

// Steps summed from zero before they are added to c: a long sum in one accumulator loses digits (fp32 attention of
// head_dim 192 was 2.6 times as far from the truth as eager).
constexpr int64_t kOuterSteps = 64;

template <class C, int MR, int NV>
static inline void outer_tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t steps, float* c,
                              int64_t ldc, const float* scale) {
  using O = Outer<C>;
  for (int64_t s0 = 0; s0 < steps; s0 += kOuterSteps) {
    const int64_t s1 = steps - s0 < kOuterSteps ? steps : s0 + kOuterSteps;
    F acc[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = zero();
    }
    for (int64_t s = s0; s < s1; ++s) {
      typename O::X bv[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) bv[j] = O::load_b(b + s * ldb + j * W);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const typename O::X av = O::spread(a + i * lda + s);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = O::step(acc[i][j], av, bv[j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const F before = set1(s0 > 0 ? 1.0f : scale ? scale[i] : 0.0f);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* to = c + i * ldc + j * W;
        store(to, s0 > 0 || scale ? fma(load(to), before, acc[i][j]) : acc[i][j]);
      }
    }
  }
}

template <class C, int NV>
static inline void outer_rows(int rows, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t steps,
                              float* c, int64_t ldc, const float* scale) {
  switch (rows) {
    case 1:
      return outer_tile<C, 1, NV>(a, lda, b, ldb, steps, c, ldc, scale);
    case 2:
      return outer_tile<C, 2, NV>(a, lda, b, ldb, steps, c, ldc, scale);
    case 3:
      return outer_tile<C, 3, NV>(a, lda, b, ldb, steps, c, ldc, scale);
    case 4:
      return outer_tile<C, 4, NV>(a, lda, b, ldb, steps, c, ldc, scale);
    default:
      break;
  }
  if constexpr (kOuterRows >= 6) {
    if (rows == 5) return outer_tile<C, 5, NV>(a, lda, b, ldb, steps, c, ldc, scale);
    return outer_tile<C, 6, NV>(a, lda, b, ldb, steps, c, ldc, scale);
  }
}

// cols is a multiple of W. scale null: c starts from zero.
template <class C>
static inline void outer_block(int M, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t cols,
                               int64_t steps, float* c, int64_t ldc, const float* scale) {
  const int blocks = (M + kOuterRows - 1) / kOuterRows;
  for (int block = 0; block < blocks; ++block) {
    const int m0 = M * block / blocks, rows = M * (block + 1) / blocks - m0;
    const uint32_t* am = a + m0 * lda;
    const float* sm = scale ? scale + m0 : nullptr;
    int64_t n = 0;
    for (; n + kOuterVecs * W <= cols; n += kOuterVecs * W) {
      outer_rows<C, kOuterVecs>(rows, am, lda, b + n, ldb, steps, c + m0 * ldc + n, ldc, sm);
    }
    for (; n < cols; n += W) outer_rows<C, 1>(rows, am, lda, b + n, ldb, steps, c + m0 * ldc + n, ldc, sm);
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
