// linear in AMX tiles: blocks of columns, of k and of rows such that one core's 2 MB of L2 hold what is used again.
#pragma once

#include "linear.h"
#include "tile_block.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr int64_t kCopySteps = 8;  // of k, when weights are copied: 16 KB, a third of L1

// k in blocks of tile steps; the packed x is [block][panel of 32 rows][step of the block][tile of 16 rows].
struct TileSteps {
  int64_t steps, per_block, tiles;

  explicit TileSteps(const LinearArgs& a)
      : steps((a.K + kTileK - 1) / kTileK), per_block(a.block_steps), tiles((a.M + kTile - 1) / kTile) {}

  int64_t count(int64_t first) const { return steps - first < per_block ? steps - first : per_block; }
  int64_t width(int64_t tile) const { return tile / 2 * 2 + 1 < tiles ? 2 : 1; }  // of the panel that has this tile
  int64_t tile(int64_t first, int64_t tile) const { return first * tiles + tile / 2 * 2 * count(first) + tile % 2; }
};

static inline void pack_rows(const LinearArgs& a, int64_t unit0, int64_t unit1) {
  const TileSteps k(a);
  const int64_t blocks = (k.steps + k.per_block - 1) / k.per_block;
  for (int64_t unit = unit0; unit < unit1; ++unit) {
    const int64_t first = unit % blocks * k.per_block, tile = unit / blocks, end = first + k.count(first);
    const int rows = a.M - tile * kTile < kTile ? int(a.M - tile * kTile) : kTile;
    uint32_t* out = (uint32_t*)a.packed + k.tile(first, tile) * kTileWords;
    for (int64_t s = first; s < end; ++s, out += k.width(tile) * kTileWords) {
      const int64_t left = a.K - s * kTileK;
      const bf16* row[kTile];
      for (int m = 0; m < rows; ++m) row[m] = (const bf16*)a.x + (tile * kTile + m) * a.x_stride + s * kTileK;
      pack_tile(row, rows, left < kTileK ? int(left) : kTileK, out);
    }
  }
}

// Rows m0..m1 (m0 a multiple of 32), columns n0..n1 (a multiple of 16 of them).
struct TileColumns {
  const LinearArgs& a;
  const LinearBlock& b;
  const int64_t n1;
  const TileSteps k;
  const int64_t m_tiles;
  const bool one_block;  // no sums from block to block: one buffer serves all columns
  const bool copies;     // each 32 weight rows meet enough rows of x to be copied to where L1 holds them
  alignas(64) char copy[kPanel * 64 * kCopySteps];

  TileColumns(const LinearArgs& args, const LinearBlock& block, int64_t end)
      : a(args),
        b(block),
        n1(end),
        k(args),
        m_tiles((block.m1 - block.m0 + kTile - 1) / kTile),
        one_block(k.per_block >= k.steps),
        copies(block.m1 - block.m0 > kLinearFewRows) {}

  const bf16* weight(int64_t n, int64_t step) const {
    return (const bf16*)a.weight + n * a.weight_stride + step * kTileK;
  }

  // What this thread reads after block `first` of panel n: the next panel, the next block, or other columns.
  Ahead after(int64_t n, int64_t first) const {
    const bool same = n + kPanel < n1, more = first + k.per_block < k.steps;
    const int64_t next = same ? n + kPanel : more ? b.n0 : b.then;
    const int64_t step = same ? first : more ? first + k.per_block : 0;
    if (next < 0) return Ahead(nullptr, 0, 0, 0, 1);
    const int64_t cols = k.count(step) * kTileK, left = a.K - step * kTileK;
    return Ahead(weight(next, step), int(a.N - next < kPanel ? a.N - next : kPanel), 2 * (cols < left ? cols : left),
                 2 * a.weight_stride, k.count(first) * ((m_tiles + 1) / 2));
  }

  void run() {
    for (int64_t first = 0; first < k.steps; first += k.per_block) {
      for (int64_t n = b.n0; n < n1; n += kPanel) panel(n, first);
    }
  }

  void panel(int64_t n, int64_t first) {
    const int n_tiles = n1 - n >= kPanel ? 2 : 1;
    const int64_t end = first + k.count(first), each = copies ? kCopySteps : end - first;
    Ahead ahead = after(n, first);
    for (int64_t s = first; s < end; s += each) {
      const int64_t steps = end - s < each ? end - s : each, left = a.K - s * kTileK;
      const int64_t cols = left < steps * kTileK ? left : steps * kTileK, whole = cols / kTileK;
      TileWeights w{(const char*)weight(n, s), 2 * a.weight_stride, 2 * kTile * a.weight_stride, 64, nullptr};
      if (copies) {
        copy_weights(weight(n, s), a.weight_stride, n_tiles, cols, copy);
        w = {copy, 64, kTileBytes, 2 * kTileBytes, nullptr};
      } else if (whole < steps) {
        copy_weights(weight(n, s + whole), a.weight_stride, n_tiles, cols - whole * kTileK, copy);
        w.tail = copy;
      }
      for (int64_t m = 0; m < m_tiles; m += 2) {
        const int tiles = int(k.width(b.m0 / kTile + m));
        const int64_t at = k.tile(first, b.m0 / kTile + m) + tiles * (s - first);
        float* sums = b.sums + ((one_block ? 0 : (n - b.n0) / kPanel * m_tiles) + m) * 2 * kTileWords;
        tile_block(n_tiles, tiles, w, w.tail ? whole : steps, (const char*)a.packed + at * kTileBytes, sums, s == 0,
                   ahead);
        if (s + steps == k.steps) finish(n, m, n_tiles, tiles, sums);
      }
    }
  }

  void finish(int64_t n, int64_t m, int n_tiles, int tiles, const float* sums) const {
    const bf16* bias = a.bias ? (const bf16*)a.bias + n : nullptr;
    for (int t = 0; t < tiles; ++t) {
      const int64_t first = b.m0 + (m + t) * kTile;
      bf16* out = (bf16*)a.out + first * a.out_stride + n;
      finish_tiles(
          n_tiles, sums + t * kTileWords, tiles * kTileWords, b.m1 - first < kTile ? int(b.m1 - first) : kTile,
          [=](F x, int i) { return bias ? add(x, set1(to_float(bias[i]))) : x; },
          [=, stride = a.out_stride](int i) { return out + i * stride; });
    }
  }
};

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
