// Sums of 16 or 32 weight rows times 16 or 32 rows of packed x, in AMX tiles: the inside of linear and moe_experts.
//
// An element is summed over k in one order, 32 at a time, wherever its row lies and however k is cut into blocks (sums
// between blocks are kept in fp32, exactly), so a row's bits do not depend on its neighbours.
#pragma once

#include "tile.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr int kPanel = 2 * kTile;  // weight rows, and rows of x, of one block

// What to ask memory for while a product runs: lines of `rows` rows, in address order, `each` for every step of k.
// One forward stream although 32 rows are read at once; see dot_tile.
struct Ahead {
  const char *at, *row_end;
  int64_t row_bytes, stride_bytes;
  int rows, each;

  // num_rows rows of row_bytes each, to be asked for over `steps` steps of k.
  Ahead(const void* data, int num_rows, int64_t bytes, int64_t stride, int64_t steps)
      : at((const char*)data), row_end(at + bytes), row_bytes(bytes), stride_bytes(stride), rows(num_rows), each(0) {
    const int64_t lines = num_rows * ((bytes + 63) / 64);
    if (rows > 0 && steps > 0) each = int((lines + steps - 1) / steps);
  }

  void step() {
    if (rows <= 0) return;
    for (int i = 0; i < each; ++i) {
      _mm_prefetch(at, _MM_HINT_T1);
      at += 64;
      if (at >= row_end) {
        if (--rows <= 0) return;
        at = row_end - row_bytes + stride_bytes;
        row_end = at + row_bytes;
      }
    }
  }
};

// 32 weight rows, or a copy of them: tiles of rows `stride` bytes apart, the second tile and the next step of k
// further.
struct TileWeights {
  const char* at;
  int64_t stride, second, step;
  const char* tail;  // null, or one more step that is no whole one: a copy, [32][32] with zeros
};

// sums (+)= weights times x over `steps` of k, `NR` x `MR` tiles. x is [step][MR tiles], sums [NR][MR tiles of 16 n x
// 16 m]; tiles 0 to 3 are the sums.
template <int NR, int MR>
static inline void tile_block(const TileWeights& w, int64_t steps, const char* x, float* sums, bool first,
                              Ahead& ahead) {
  if (first) {
    tile_zero<0>();
    if (MR == 2) tile_zero<1>();
    if (NR == 2) tile_zero<2>();
    if (NR == 2 && MR == 2) tile_zero<3>();
  } else {
    tile_load<0>(sums, 64);
    if (MR == 2) tile_load<1>(sums + kTileWords, 64);
    if (NR == 2) tile_load<2>(sums + MR * kTileWords, 64);
    if (NR == 2 && MR == 2) tile_load<3>(sums + 3 * kTileWords, 64);
  }
  auto step = [](const char* a, int64_t stride, int64_t second, const char* b) {
    tile_load<4>(a, stride);
    tile_load<6>(b, 64);
    tile_step<0, 4, 6>();
    if (MR == 2) {
      tile_load<7>(b + kTileBytes, 64);
      tile_step<1, 4, 7>();
    }
    if (NR == 2) {
      tile_load<5>(a + second, stride);
      tile_step<2, 5, 6>();
      if (MR == 2) tile_step<3, 5, 7>();
    }
  };
  const char* a = w.at;
  for (int64_t k = 0; k < steps; ++k, a += w.step, x += MR * kTileBytes) {
    step(a, w.stride, w.second, x);
    ahead.step();
  }
  if (w.tail) step(w.tail, 64, kTileBytes, x);
  tile_store<0>(sums, 64);
  if (MR == 2) tile_store<1>(sums + kTileWords, 64);
  if (NR == 2) tile_store<2>(sums + MR * kTileWords, 64);
  if (NR == 2 && MR == 2) tile_store<3>(sums + 3 * kTileWords, 64);
}

static inline void tile_block(int n_tiles, int m_tiles, const TileWeights& w, int64_t steps, const char* x, float* sums,
                              bool first, Ahead& ahead) {
  if (n_tiles == 2 && m_tiles == 2) return tile_block<2, 2>(w, steps, x, sums, first, ahead);
  if (n_tiles == 2) return tile_block<2, 1>(w, steps, x, sums, first, ahead);
  if (m_tiles == 2) return tile_block<1, 2>(w, steps, x, sums, first, ahead);
  return tile_block<1, 1>(w, steps, x, sums, first, ahead);
}

// `cols` of k of 16 * n_tiles weight rows -> [step][2 n tiles][16][32], zeros past cols.
static inline void copy_weights(const bf16* from, int64_t stride, int n_tiles, int64_t cols, char* to) {
  for (int n = 0; n < kTile * n_tiles; ++n, from += stride) {
    char* row = to + n * 64;
    int64_t k = 0;
    for (; k + kTileK <= cols; k += kTileK) {
      _mm512_store_si512(row + k / kTileK * 2 * kTileBytes, _mm512_loadu_si512(from + k));
    }
    if (k < cols) {
      _mm512_store_si512(row + k / kTileK * 2 * kTileBytes,
                         _mm512_maskz_loadu_epi16(half_lanes(int(cols - k)), from + k));
    }
  }
}

// Two rows of a sums tile, neighbours in n, rounded: words of pairs, as a right operand has them.
static inline __m512i join_pair(F even, F odd) {
  const __m512i high = _mm512_and_si512(bf16_bits(odd), _mm512_set1_epi32(int(0xffff0000)));
  return _mm512_or_si512(_mm512_srli_epi32(bf16_bits(even), 16), high);
}

// sums of one m tile (n tiles sum_stride apart), each row of 16 changed by change(row, n), rounded -> 16 * n_tiles
// columns of `rows` rows at row(m). Pairs are joined before the transpose, which so moves half as much. Plain stores:
// what is written is read by the next op, and around the caches it went to memory and back (0.6B, 512 tokens, whole
// prefill 445 ms with streaming stores, 373 without; 2 cores of Granite Rapids, 2026-11-25).
template <class Change, class Row>
static inline void finish_tiles(int n_tiles, const float* sums, int64_t sum_stride, int rows, Change change, Row row) {
  alignas(64) uint32_t words[kTile * W], lines[kTile * W];
  const uint32_t* at[kTile];
  for (int n = 0; n < kTile * n_tiles; n += 2) {
    const float* from = sums + n / kTile * sum_stride + n % kTile * kTile;
    _mm512_store_si512(words + n / 2 * W, join_pair(change(load(from), n), change(load(from + kTile), n + 1)));
  }
  for (int i = 0; i < kTile; ++i) at[i] = words + i * W;
  transpose(at, 8 * n_tiles, kTile, lines, kTile);
  for (int m = 0; m < rows; ++m) {
    bf16* out = row(m);
    const __m512i line = _mm512_load_si512(lines + m * W);
    if (n_tiles == 1) {
      _mm256_storeu_si256((__m256i*)out, _mm512_castsi512_si256(line));
    } else {
      _mm512_storeu_si512(out, line);
    }
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
