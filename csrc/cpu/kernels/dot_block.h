// out[m][n] = sum_k x[m][k] * w[n][k] for a few rows of x and a run of row-major weights: the inside of linear,
// moe_experts and of attention scores.
//
// Whatever the number of rows, one element is summed in one order (vectors of k in sequence into one accumulator, the
// tail as a zero-filled vector, then the lanes in one fixed tree), so a row's bits do not depend on its neighbours.
#pragma once

#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr int kMaxDotRows = 32;

// One weight row at a time: one forward stream per thread, which is what the prefetchers of current CPUs like best.
template <class T, int MR>
static inline void dot_rows(const T* const* x, const T* w, int64_t ldw, int64_t num_cols, int64_t K, float* out,
                            int64_t ldo) {
  using D = Dot<T>;
  const int64_t whole = K / D::STEP * D::STEP;
  const int tail = int(K - whole);
  for (int64_t n = 0; n < num_cols; n += 4) {
    F acc[MR][4];
    const int cols = num_cols - n < 4 ? int(num_cols - n) : 4;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
      for (int i = 0; i < MR; ++i) acc[i][j] = zero();
      if (j >= cols) continue;
      const T* row = w + (n + j) * ldw;
#pragma GCC unroll 4
      for (int64_t k = 0; k < whole; k += D::STEP) {
        const typename D::X b = D::load(row + k);
#pragma GCC unroll 2
        for (int i = 0; i < MR; ++i) acc[i][j] = D::step(acc[i][j], D::load(x[i] + k), b);
      }
      if (tail) {
        const typename D::X b = D::load_n(row + whole, tail);
#pragma GCC unroll 2
        for (int i = 0; i < MR; ++i) acc[i][j] = D::step(acc[i][j], D::load_n(x[i] + whole, tail), b);
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < MR; ++i) {
      float sums[4];
      hsum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3], sums);
      for (int j = 0; j < cols; ++j) out[i * ldo + n + j] = sums[j];
    }
  }
}

// MR rows times NR weight rows in registers. `ahead` walks the weights that follow in address order, one line for each
// line used here: the memory sees one forward stream although NR rows are read at once.
template <class T, int MR, int NR, bool Prefetch>
static inline void dot_tile(const T* const* x, const T* w, int64_t ldw, int64_t K, float* out, int64_t ldo,
                            const char* ahead) {
  using D = Dot<T>;
  constexpr int kLine = int(D::STEP * sizeof(T));
  const int64_t whole = K / D::STEP * D::STEP;
  const int tail = int(K - whole);
  F acc[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[i][j] = zero();
  }
  for (int64_t k = 0; k < whole; k += D::STEP) {
    typename D::X b[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      b[j] = D::load(w + j * ldw + k);
      if (Prefetch) __builtin_prefetch(ahead + j * kLine, 0, 3);
    }
    ahead += NR * kLine;
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const typename D::X a = D::load(x[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[i][j] = D::step(acc[i][j], a, b[j]);
    }
  }
  if (tail) {
    typename D::X b[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) b[j] = D::load_n(w + j * ldw + whole, tail);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const typename D::X a = D::load_n(x[i] + whole, tail);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[i][j] = D::step(acc[i][j], a, b[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    if constexpr (NR == 4) {
      hsum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3], out + i * ldo);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) out[i * ldo + j] = hsum(acc[i][j]);
    }
  }
}

template <class T, int NR, bool Prefetch>
static inline void dot_tile_rows(int rows, const T* const* x, const T* w, int64_t ldw, int64_t K, float* out,
                                 int64_t ldo, const char* ahead) {
  static_assert(kTileRows <= 6, "add cases");
  switch (rows) {
    case 1: return dot_tile<T, 1, NR, Prefetch>(x, w, ldw, K, out, ldo, ahead);
    case 2: return dot_tile<T, 2, NR, Prefetch>(x, w, ldw, K, out, ldo, ahead);
    case 3: return dot_tile<T, 3, NR, Prefetch>(x, w, ldw, K, out, ldo, ahead);
    case 4: return dot_tile<T, 4, NR, Prefetch>(x, w, ldw, K, out, ldo, ahead);
    default: break;
  }
  if constexpr (kTileRows >= 6) {
    if (rows == 5) return dot_tile<T, 5, NR, Prefetch>(x, w, ldw, K, out, ldo, ahead);
    return dot_tile<T, 6, NR, Prefetch>(x, w, ldw, K, out, ldo, ahead);
  }
}

// M <= kMaxDotRows rows given by pointers; out is [M][ldo].
template <class T>
static inline void dot_block(const T* const* x, int M, const T* w, int64_t ldw, int64_t num_cols, int64_t K, float* out,
                             int64_t ldo) {
  if (M == 1) return dot_rows<T, 1>(x, w, ldw, num_cols, K, out, ldo);
  if (M == 2) return dot_rows<T, 2>(x, w, ldw, num_cols, K, out, ldo);
  const int blocks = (M + kTileRows - 1) / kTileRows;
  int64_t n = 0;
  for (; n + kTileCols <= num_cols; n += kTileCols) {
    const T* rows = w + n * ldw;
    const char* ahead = (const char*)(rows + kTileCols * ldw);
    for (int block = 0; block < blocks; ++block) {
      const int m0 = M * block / blocks, m1 = M * (block + 1) / blocks;
      if (block == 0) {
        dot_tile_rows<T, kTileCols, true>(m1 - m0, x + m0, rows, ldw, K, out + m0 * ldo + n, ldo, ahead);
      } else {
        dot_tile_rows<T, kTileCols, false>(m1 - m0, x + m0, rows, ldw, K, out + m0 * ldo + n, ldo, ahead);
      }
    }
  }
  for (; n < num_cols; ++n) {
    for (int m = 0; m < M; m += 2) {
      float* to = out + m * ldo + n;
      if (m + 1 < M) {
        dot_rows<T, 2>(x + m, w + n * ldw, ldw, 1, K, to, ldo);
      } else {
        dot_rows<T, 1>(x + m, w + n * ldw, ldw, 1, K, to, ldo);
      }
    }
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
