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

// The lane sums of N accumulators, to out[0..count). Inlined: the call would take them through memory.
template <int N>
__attribute__((always_inline)) static inline void store_sums(const F* acc, int count, float* out) {
#if defined(QWENOPT_ISA_AVX512)
  if (N == 4) {
    alignas(16) float sums[4];
    hsum4(acc[0], acc[1], acc[2], acc[3], sums);
    for (int j = 0; j < count; ++j) out[j] = sums[j];
    return;
  }
#endif
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    if (j < count) out[j] = hsum(acc[j]);
  }
}

// What is asked for ahead goes to the second-level cache, not the first: 1.0 times a plain read's speed instead of 0.7
// for M = 1 and 2, 0.9 instead of 0.86 for M = 4 (K = 1024..3072, 2 cores of Granite Rapids, 2026-11-24). The first
// level has too few lines in flight to wait for memory.
template <class P>
static inline void ask_ahead(const P* at) {
  __builtin_prefetch(at, 0, 2);
}

// Up to kStreamRows rows of x: one weight row after the other, asked for kAheadBytes before its use. On 4 KB pages,
// where a prefetch has to wait for its page's translation, this reads 1.3 times as fast as dot_tile for one row of x
// and 1.15 times for two or three; on huge pages the two are equal (one core of Zen 5, 2026-11-22). K is summed as in
// dot_tile.
constexpr int64_t kAheadBytes = 16384;

template <class T, int MR>
static inline void dot_rows(const T* const* x, const T* w, int64_t ldw, int64_t num_cols, int64_t K, float* out,
                            int64_t ldo, const T* then) {
  using D = Dot<T>;
  constexpr int64_t kAhead = kAheadBytes / int64_t(sizeof(T));
  const int64_t whole = K / D::STEP * D::STEP, end = num_cols * ldw;
  const int tail = int(K - whole);
  for (int64_t n = 0; n < num_cols; n += 4) {
    F acc[MR][4];
    const int cols = num_cols - n < 4 ? int(num_cols - n) : 4;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[i][j] = zero();
      if (j >= cols) continue;
      const T* row = w + (n + j) * ldw;
      const int64_t at = (n + j) * ldw + kAhead;
      const T* ahead = at < end ? w + at : then + (at - end);
#pragma GCC unroll 4
      for (int64_t k = 0; k < whole; k += D::STEP) {
        const typename D::X b = D::load(row + k);
        ask_ahead(ahead + k);
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) acc[i][j] = D::step(acc[i][j], D::load(x[i] + k), b);
      }
      if (tail) {
        const typename D::X b = D::load_n(row + whole, tail);
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) acc[i][j] = D::step(acc[i][j], D::load_n(x[i] + whole, tail), b);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) store_sums<4>(acc[i], cols, out + i * ldo + n);
  }
}

// MR rows times NR weight rows in registers, while `Lines` lines a step of the weights that follow are asked for in
// address order: the memory sees one forward stream although NR rows are read at once. Each row prefetched on its own,
// 0.5 or 1 KB ahead, reached 60-75 % of one core's read bandwidth where this reaches 85-100 % (M = 1..4, K = 768..3072,
// one core of Zen 5, 2026-11-22).
template <class T, int MR, int NR, int Lines>
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
      if (j < Lines) ask_ahead(ahead + j * kLine);
    }
    ahead += Lines * kLine;
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
    store_sums<NR>(acc[i], NR, out + i * ldo);
  }
}

template <class T, int NR, int Lines>
static inline void dot_tile_rows(int rows, const T* const* x, const T* w, int64_t ldw, int64_t K, float* out,
                                 int64_t ldo, const char* ahead) {
  static_assert(kTileRows <= 6, "add cases");
  switch (rows) {
    case 1:
      return dot_tile<T, 1, NR, Lines>(x, w, ldw, K, out, ldo, ahead);
    case 2:
      return dot_tile<T, 2, NR, Lines>(x, w, ldw, K, out, ldo, ahead);
    case 3:
      return dot_tile<T, 3, NR, Lines>(x, w, ldw, K, out, ldo, ahead);
    case 4:
      return dot_tile<T, 4, NR, Lines>(x, w, ldw, K, out, ldo, ahead);
    default:
      break;
  }
  if constexpr (kTileRows >= 6) {
    if (rows == 5) return dot_tile<T, 5, NR, Lines>(x, w, ldw, K, out, ldo, ahead);
    return dot_tile<T, 6, NR, Lines>(x, w, ldw, K, out, ldo, ahead);
  }
}

template <class T>
static inline void dot_tile_lines(int lines, int rows, const T* const* x, const T* w, int64_t ldw, int64_t K,
                                  float* out, int64_t ldo, const char* ahead) {
  static_assert(kTileCols == 2 || kTileCols == 4, "the shares below are 0, 1, 2 or all");
  if (lines == 0) return dot_tile_rows<T, kTileCols, 0>(rows, x, w, ldw, K, out, ldo, ahead);
  if (lines == 1) return dot_tile_rows<T, kTileCols, 1>(rows, x, w, ldw, K, out, ldo, ahead);
  if (lines == 2) return dot_tile_rows<T, kTileCols, 2>(rows, x, w, ldw, K, out, ldo, ahead);
  return dot_tile_rows<T, kTileCols, kTileCols>(rows, x, w, ldw, K, out, ldo, ahead);
}

// M <= kMaxDotRows rows given by pointers; out is [M][ldo]. `then` is what this thread reads after these weights: the
// last tile prefetches it.
template <class T>
static inline void dot_block(const T* const* x, int M, const T* w, int64_t ldw, int64_t num_cols, int64_t K, float* out,
                             int64_t ldo, const T* then) {
  static_assert(kStreamRows == 2 || kStreamRows == 3, "cases below");
  if (M == 1) return dot_rows<T, 1>(x, w, ldw, num_cols, K, out, ldo, then);
  if (M == 2) return dot_rows<T, 2>(x, w, ldw, num_cols, K, out, ldo, then);
  if constexpr (kStreamRows == 3) {
    if (M == 3) return dot_rows<T, 3>(x, w, ldw, num_cols, K, out, ldo, then);
  }
  const int blocks = (M + kTileRows - 1) / kTileRows;
  int64_t n = 0;
  for (; n + kTileCols <= num_cols; n += kTileCols) {
    const T* rows = w + n * ldw;
    const T* next = n + 2 * kTileCols <= num_cols ? rows + kTileCols * ldw : then;
    for (int block = 0; block < blocks; ++block) {
      // The row blocks share out the prefetching of the next weight rows.
      const int m0 = M * block / blocks, line0 = kTileCols * block / blocks;
      const int m1 = M * (block + 1) / blocks, line1 = kTileCols * (block + 1) / blocks;
      const char* ahead = (const char*)(next + line0 * ldw);
      dot_tile_lines<T>(line1 - line0, m1 - m0, x + m0, rows, ldw, K, out + m0 * ldo + n, ldo, ahead);
    }
  }
  for (; n < num_cols; ++n) {
    for (int block = 0; block < blocks; ++block) {
      const int m0 = M * block / blocks, m1 = M * (block + 1) / blocks;
      dot_tile_rows<T, 1, 0>(m1 - m0, x + m0, w + n * ldw, ldw, K, out + m0 * ldo + n, ldo, nullptr);
    }
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
