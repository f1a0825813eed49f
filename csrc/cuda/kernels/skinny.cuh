// Up to 16 rows of x times the rows of a weight: what linear and lm_head share.
//
// The weight is read once, straight from memory into the fragments of matrix instructions: of 32 neighbouring columns a
// lane holds 8 (16 bytes) of a weight row and the same 8 of a row of x. Which of them the instruction takes for column
// 0 or 9 does not matter, since both sides agree. No shared memory, no shuffles until the sums of the warps meet.
#pragma once

#include "rows.cuh"

namespace qwenopt {

struct LinearArgs {
  const void *x, *weight, *bias;  // [M, K], [N, K], [N] or null
  void* out;                      // [M, N]
  int64_t M, N, K, x_stride, weight_stride, out_stride;
};

constexpr int kSkinnyWarps = 8, kSkinnyThreads = kSkinnyWarps * kWarp;
constexpr int kTileRows = 16, kTileTokens = 8, kChunk = 32, kUnroll = 4;

// Partial sums of each warp: [row of the tile][token], a column apart so that lanes write to different banks.
template <int TILES>
struct SkinnySums {
  float of[kSkinnyWarps][kTileRows][TILES * kTileTokens + 1];
};

// Where a lane reads: two rows of the weight, and a row of x for each tile, at the first of its columns.
template <int TILES>
struct SkinnyRows {
  const bf16 *low, *high, *x[TILES];

  // Rows and tokens behind the last one are computed from the last one, and dropped.
  QWENOPT_FN_MEMBER SkinnyRows(const LinearArgs& a, int64_t row0) {
    const int r = lane_id() / 4, c = lane_id() % 4 * 8;
    low = static_cast<const bf16*>(a.weight) + least(row0 + r, a.N - 1) * a.weight_stride + c;
    high = static_cast<const bf16*>(a.weight) + least(row0 + r + 8, a.N - 1) * a.weight_stride + c;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      x[t] = static_cast<const bf16*>(a.x) + least(r + t * kTileTokens, a.M - 1) * a.x_stride + c;
    }
  }
};

// Columns k..k+32*UNROLL into the sums; with EDGE, those of them that are there.
template <int TILES, int UNROLL, bool EDGE>
QWENOPT_FN void skinny_step(const LinearArgs& a, const SkinnyRows<TILES>& rows, int64_t k, float (&d)[TILES][4]) {
  Words low[UNROLL], high[UNROLL], tokens[UNROLL][TILES];
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int64_t at = k + u * kChunk;
    const bool there = !EDGE || at + lane_id() % 4 * 8 < a.K;  // K is a multiple of 8
    low[u] = there ? load16_once(rows.low + at) : Words{};
    high[u] = there ? load16_once(rows.high + at) : Words{};
#pragma unroll
    for (int t = 0; t < TILES; ++t) tokens[u][t] = there ? load16(rows.x[t] + at) : Words{};
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const uint32_t (&l)[4] = low[u].w, (&h)[4] = high[u].w, (&b)[4] = tokens[u][t].w;
      const uint32_t first[4] = {l[0], h[0], l[1], h[1]}, second[4] = {l[2], h[2], l[3], h[3]};
      mma_bf16(d[t], first, b[0], b[1]);
      mma_bf16(d[t], second, b[2], b[3]);
    }
  }
}

// This warp's share of rows row0..row0+16 of the weight times all tokens: every eighth run of 128 columns, and of what
// is left of them every eighth run of 32.
template <int TILES>
QWENOPT_FN void skinny_dot(const LinearArgs& a, int64_t row0, float (&d)[TILES][4]) {
  constexpr int64_t kRun = kUnroll * kChunk;
  const SkinnyRows<TILES> rows(a, row0);
  const int64_t whole = a.K / kRun * kRun;
  for (int64_t k = warp_id() * kRun; k < whole; k += kSkinnyWarps * kRun) {
    skinny_step<TILES, kUnroll, false>(a, rows, k, d);
  }
  for (int64_t k = whole + warp_id() * kChunk; k < a.K; k += kSkinnyWarps * kChunk) {
    skinny_step<TILES, 1, true>(a, rows, k, d);
  }
}

// The sums of all warps for rows row0..row0+16, in shared memory: always added in the same order.
template <int TILES>
QWENOPT_FN void skinny_tile(const LinearArgs& a, int64_t row0, SkinnySums<TILES>& sums) {
  float d[TILES][4] = {};
  skinny_dot<TILES>(a, row0, d);
  const int r = lane_id() / 4, c = lane_id() % 4 * 2;
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums.of[warp_id()][r + i / 2 * 8][t * kTileTokens + c + i % 2] = d[t][i];
  }
  __syncthreads();
}

// One result, rounded as it is stored. Every thread of the block asks for one row and token of the tile.
template <int TILES>
QWENOPT_FN float skinny_result(const LinearArgs& a, int64_t row0, const SkinnySums<TILES>& sums, int row, int token) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kSkinnyWarps; ++w) sum += sums.of[w][row][token];
  if (a.bias != nullptr && row0 + row < a.N) sum += to_float(static_cast<const bf16*>(a.bias)[row0 + row]);
  return rounded<bf16>(sum);
}

}  // namespace qwenopt
