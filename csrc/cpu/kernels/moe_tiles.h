// The experts of moe_experts that have enough rows, in AMX tiles. Their rows of x are gathered and packed once; gate
// and up leave the hidden rows packed as the down product reads them (pairs of neighbours in I), so nothing is
// transposed between the two.
#pragma once

#include "moe_experts.h"
#include "tile_block.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

// Packed rows of one expert: [panel of 32 rows][step of k][tile of 16 rows].
static inline int64_t tiles_of(const ExpertRows& r) { return (r.count + kTile - 1) / kTile; }
static inline int panel_width(const ExpertRows& r, int64_t tile) { return tile / 2 * 2 + 1 < tiles_of(r) ? 2 : 1; }
static inline uint32_t* packed_tile(void* packed, const ExpertRows& r, int64_t steps, int64_t tile) {
  return (uint32_t*)packed + ((r.tile + tile / 2 * 2) * steps + tile % 2) * kTileWords;
}

static inline void pack_expert(const MoeExpertsArgs& a, const ExpertRows& r, int64_t tile) {
  const int64_t steps = a.N / kTileK, first = tile * kTile;
  const int rows = r.count - first < kTile ? int(r.count - first) : kTile;
  const bf16* row[kTile];
  for (int m = 0; m < rows; ++m) row[m] = (const bf16*)a.x + r.pairs[first + m] / a.K * a.x_stride;
  uint32_t* out = packed_tile(a.packed_x, r, steps, tile);
  for (int64_t s = 0; s < steps; ++s, out += panel_width(r, tile) * kTileWords) {
    pack_tile(row, rows, kTileK, out);
    for (int m = 0; m < rows; ++m) row[m] += kTileK;
  }
}

// A run of weight rows of one expert times all its rows: `rows` weight rows at `at`, k of them wide.
static inline TileWeights expert_rows(const bf16* at, int64_t k) {
  return {(const char*)at, 2 * k, 2 * kTile * k, 64, nullptr};
}

static inline void gate_up_tiles(const MoeExpertsArgs& a, const ExpertRows& r, int64_t c0, int64_t c1,
                                 const void* then) {
  const bf16* gate = (const bf16*)a.gate_up + r.expert * 2 * a.I * a.N;
  const bf16* up = gate + a.I * a.N;
  const int64_t steps = a.N / kTileK, panels = (tiles_of(r) + 1) / 2;
  alignas(64) float g[4 * kTileWords], u[4 * kTileWords];
  for (int64_t c = c0; c < c1; c += kPanel) {
    const bf16* next = c + kPanel < c1 ? gate + (c + kPanel) * a.N : (const bf16*)then;
    // While gate rows are used, the up rows of the same columns are asked for, and so on.
    Ahead to_up(up + c * a.N, kPanel, 2 * a.N, 2 * a.N, steps * panels);
    Ahead to_next(next, kPanel, 2 * a.N, 2 * a.N, steps * panels);
    for (int64_t t = 0; t < tiles_of(r); t += 2) {
      const int width = panel_width(r, t);
      const char* x = (const char*)packed_tile(a.packed_x, r, steps, t);
      tile_block(2, width, expert_rows(gate + c * a.N, a.N), steps, x, g, true, to_up);
      tile_block(2, width, expert_rows(up + c * a.N, a.N), steps, x, u, true, to_next);
      for (int i = 0; i < width; ++i) {
        uint32_t* out = packed_tile(a.packed_hidden, r, a.I / kTileK, t + i) + c / kTileK * width * kTileWords;
        for (int n = 0; n < kPanel; n += 2) {
          F pair[2];
          for (int j = 0; j < 2; ++j) {
            const int64_t at = ((n / kTile * width + i) * kTile + n % kTile + j) * kTile;
            pair[j] = mul(round_to<bf16>(silu(round_to<bf16>(load(g + at)))), round_to<bf16>(load(u + at)));
          }
          _mm512_store_si512(out + n / 2 * kTile, join_pair(pair[0], pair[1]));
        }
      }
    }
  }
}

static inline void down_tiles(const MoeExpertsArgs& a, const ExpertRows& r, int64_t c0, int64_t c1, const void* then) {
  const bf16* weight = (const bf16*)a.down + r.expert * a.N * a.I;
  const int64_t steps = a.I / kTileK, panels = (tiles_of(r) + 1) / 2;
  alignas(64) float y[4 * kTileWords];
  for (int64_t c = c0; c < c1; c += kPanel) {
    const bf16* next = c + kPanel < c1 ? weight + (c + kPanel) * a.I : (const bf16*)then;
    Ahead ahead(next, kPanel, 2 * a.I, 2 * a.I, steps * panels);
    for (int64_t t = 0; t < tiles_of(r); t += 2) {
      const int width = panel_width(r, t);
      const char* hidden = (const char*)packed_tile(a.packed_hidden, r, steps, t);
      tile_block(2, width, expert_rows(weight + c * a.I, a.I), steps, hidden, y, true, ahead);
      for (int i = 0; i < width; ++i) {
        const int64_t first = (t + i) * kTile;
        const int rows = r.count - first < kTile ? int(r.count - first) : kTile;
        const int32_t* pairs = r.pairs + first;
        alignas(64) float scale[kTile] = {};
        for (int m = 0; m < rows; ++m) scale[m] = to_float(((const bf16*)a.weights)[pairs[m]]);
        const F scales = load(scale);
        finish_tiles(
            2, y + i * kTileWords, width * kTileWords, rows, [=](F x, int) { return mul(round_to<bf16>(x), scales); },
            [=, to = (bf16*)a.weighted + c, N = a.N](int m) { return to + pairs[m] * N; });
      }
    }
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
