// c[m][n] = scale[m] * c[m][n] + sum_k a[m][k] * b[k][n] with b packed so that n lies in the lanes: no horizontal sums.
//
// Operands are 32-bit words: one float, or (where VDPBF16PS is built) two bfloat16 neighbours in k. Packing b costs
// about as much as five rows of the product, so this is for eight rows and more.
#pragma once

#include "vec.h"
#if defined(QWENOPT_ISA_AMX)
#include "tile.h"
#endif

namespace qwenopt {
namespace QWENOPT_ISA_NS {

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

#if defined(QWENOPT_ISA_AMX)
template <int MR, int NR>
static inline void outer_tiles(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t steps, float* c,
                               int64_t ldc, bool add_to_c) {
  float* c1 = c + kTile * ldc;
  if (add_to_c) {
    tile_load<0>(c, 4 * ldc);
    if (NR == 2) tile_load<1>(c + kTile, 4 * ldc);
    if (MR == 2) tile_load<2>(c1, 4 * ldc);
    if (MR == 2 && NR == 2) tile_load<3>(c1 + kTile, 4 * ldc);
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t s = 0; s < steps; s += kTile) {
    tile_load<4>(a + s, 4 * lda);
    tile_load<6>(b + s * ldb, 4 * ldb);
    tile_step<0, 4, 6>();
    if (NR == 2) {
      tile_load<7>(b + s * ldb + kTile, 4 * ldb);
      tile_step<1, 4, 7>();
    }
    if (MR == 2) {
      tile_load<5>(a + kTile * lda + s, 4 * lda);
      tile_step<2, 5, 6>();
      if (NR == 2) tile_step<3, 5, 7>();
    }
  }
  tile_store<0>(c, 4 * ldc);
  if (NR == 2) tile_store<1>(c + kTile, 4 * ldc);
  if (MR == 2) tile_store<2>(c1, 4 * ldc);
  if (MR == 2 && NR == 2) tile_store<3>(c1 + kTile, 4 * ldc);
}

// In tiles everything is whole: a and c have rows up to a multiple of 16 (what is in the rows past M does not matter),
// and the operands are zero from `steps` up to the next multiple of 16.
template <>
inline void outer_block<bf16>(int M, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t cols,
                              int64_t steps, float* c, int64_t ldc, const float* scale) {
  for (int m = 0; scale && m < M; ++m) {
    if (scale[m] == 1.0f) continue;
    for (int64_t n = 0; n < cols; n += W) store(c + m * ldc + n, mul(load(c + m * ldc + n), set1(scale[m])));
  }
  for (int m = 0; m < M; m += 2 * kTile) {
    const uint32_t* am = a + m * lda;
    const bool two = M - m > kTile;
    int64_t n = 0;
    for (; n + 2 * kTile <= cols; n += 2 * kTile) {
      float* to = c + m * ldc + n;
      if (two) outer_tiles<2, 2>(am, lda, b + n, ldb, steps, to, ldc, scale);
      if (!two) outer_tiles<1, 2>(am, lda, b + n, ldb, steps, to, ldc, scale);
    }
    if (n == cols) continue;
    if (two) outer_tiles<2, 1>(am, lda, b + n, ldb, steps, c + m * ldc + n, ldc, scale);
    if (!two) outer_tiles<1, 1>(am, lda, b + n, ldb, steps, c + m * ldc + n, ldc, scale);
  }
}
#endif

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
