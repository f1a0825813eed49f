// Attention of up to eight rows in AMX tiles: decoding. Reading keys and values is what takes time, so everything else
// is kept short and stays in L1, and lines of the blocks to come are asked for all along. Scores come out with the rows
// in the lanes, of which most would be idle: they are turned round, and exp is taken of as many vectors as there are.
//
// Several heads go through the keys together, block by block, since the heads of a page lie one after the other: 1.05
// to 1.1 times as fast as head by head with 16 rows of 2048 keys in consecutive pages of 16, the same with pages in
// random order (2 cores of Granite Rapids, 2026-11-25).
#pragma once

#include "attention_tiles.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

// Tiles 1, 3 and 7 have eight rows, for probabilities and sums: with two heads 64 keys took 155 ns instead of 171, with
// eight the same as before (a core of Granite Rapids, 2026-11-24).
static inline void few_tiles_begin() {
  const struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, kFewRows, 16, kFewRows, 16, 16, 16, kFewRows};
  } config;
  static_assert(sizeof(config) == 64, "the layout that the processor reads");
  asm volatile("ldtilecfg %0" ::"m"(config));
}

// What one head has come to.
struct FewState {
  alignas(64) float maximum[W], total[W], rescale[W];
  alignas(64) float lane_total[kFewRows * W];  // lanes of every row's sum of probabilities; summed across at the end
  alignas(64) float query_scale[kFewRows];     // of codes, times the softmax scale
};

struct FewRows : TileAttention {
  FewState states[kMostHeads];
  uint32_t* const all_queries;
  float* const all_sums;
  float *lane_total, *query_scale;  // of the head that was selected

  FewRows(const TileAttention& base, int64_t heads) : TileAttention(base), all_queries(queries), all_sums(sums) {
    for (int64_t h = 0; h < heads; ++h) {
      store(states[h].maximum, set1(-__builtin_inff()));
      store(states[h].total, zero());
      for (int i = 0; i < kFewRows; ++i) store(states[h].lane_total + i * W, zero());
    }
    for (int64_t at = 0; at < kKeyBlock / kTileK * kTileWords; at += W) store((float*)prob_tile(0, 0) + at, zero());
  }

  // Everything below is about this head of the item.
  void select(int64_t h) {
    FewState& state = states[h];
    queries = all_queries + h * steps() * kTileWords;
    sums = all_sums + h * kFewRows * padded;
    maximum = state.maximum;
    total = state.total;
    rescale = state.rescale;
    lane_total = state.lane_total;
    query_scale = state.query_scale;
  }

  // Keys j0..j0+num_keys, which do not cross a multiple of kKeyBlock. What row i sees of them is visible[i], and what
  // is added to its scores, where that is some, bias_of[i].
  void few_keys(int64_t j0, int num_keys, const Run<bf16>* key, const Run<bf16>* value, const Visible* visible,
                const float* const* bias_of) {
    const bool padded_rows = a.D % kTileK != 0;
    const int whole = padded_rows ? 0 : num_keys / kTile, tiles = (num_keys + kTile - 1) / kTile;
    next.look_ahead_of(j0);
    if (whole > 0) make_scores(0, 1, key, whole, scores);
    if (tiles > whole) {
      Run<bf16> copied[kMostRuns];
      copy_keys(key + whole, num_keys - whole * kTile, tiles - whole, copied);
      make_scores(0, 1, copied, tiles - whole, scores + whole * 2 * kTileWords);
    }
    // A tile that was just stored, and words for a tile that were, are not there yet: packing values fills the time.
    const int half = num_keys / 4 * 2;
    pack_pairs(value, 0, half, num_keys);
    softmax_rows(tiles, num_keys, visible, bias_of);
    if (started[0]) scale_sums(0, rows);
    pack_pairs(value, half, num_keys, num_keys);
    add_few_values((num_keys + 1) / 2);
  }

  void add_few_values(int words) {
    for (int64_t d = 0; d < padded; d += 2 * kTile) {
      if (started[0]) {
        tile_load<1>(sums + d, 4 * padded);
        tile_load<3>(sums + d + kTile, 4 * padded);
      } else {
        tile_zero<1>();
        tile_zero<3>();
      }
      for (int s = 0; s * kTile < words; ++s) {
        const uint32_t* v = values + s * kTile * padded + d;
        tile_load<7>(prob_tile(0, s), 64);
        next.rows(2);
        tile_load<5>(v, 4 * padded);
        tile_step<1, 7, 5>();
        next.rows(2);
        tile_load<6>(v + kTile, 4 * padded);
        tile_step<3, 7, 6>();
      }
      tile_store<1>(sums + d, 4 * padded);
      tile_store<3>(sums + d + kTile, 4 * padded);
    }
  }

  // Scores [row][64 keys], times `scale` and with what hides some: moves the maximum, says by what the sums so far are
  // scaled, and what is to be taken from the scores of each row.
  void move_maximum(float* lines, int tiles, int num_keys, const Visible* visible, const float* const* bias_of, F scale,
                    float* from) {
    const F hidden = set1(-__builtin_inff()), log2e = set1(1.44269504088896341f);
    alignas(64) float now[W];
    const F before = load(maximum);
    store(now, before);
    for (int i = 0; i < rows; ++i) {
      F top = hidden;
      if (visible[i] == kNothing) continue;
      for (int t = 0; t < tiles; ++t) {
        float* at = lines + i * kKeyBlock + t * W;
        F s = mul(load(at), scale);
        if (visible[i] == kSome) s = add(s, load(bias_of[i] + t * W));
        if ((t + 1) * W > num_keys) s = _mm512_mask_mov_ps(hidden, lanes(num_keys - t * W), s);
        store(at, s);
        top = vmax(s, top);
      }
      const float most = hmax(top);
      if (!(most <= now[i])) now[i] = most;
    }
    const F latest = load(now);
    // A row that has seen nothing: any finite number does, its probabilities are 0.
    const F base = _mm512_mask_mov_ps(latest, _mm512_cmp_ps_mask(latest, hidden, _CMP_EQ_OQ), zero());
    store(from, base);
    store(maximum, latest);
    store(rescale, exp2_below(mul(sub(before, base), log2e)));
  }

  void softmax_rows(int tiles, int num_keys, const Visible* visible, const float* const* bias_of) {
    alignas(64) float lines[kTile * kKeyBlock];
    for (int t = 0; t < tiles; ++t) {
      const uint32_t* at[kTile];
      for (int j = 0; j < kTile; ++j) at[j] = (const uint32_t*)(scores + t * 2 * kTileWords + j * kTile);
      next.rows(4);
      transpose(at, kTile, rows, (uint32_t*)lines + t * kTile, kKeyBlock);
      next.rows(4);
    }
    alignas(64) float from[W];
    move_maximum(lines, tiles, num_keys, visible, bias_of, set1(a.scale), from);
    const F log2e = set1(1.44269504088896341f);
    for (int i = 0; i < rows; ++i) {
      const F least = set1(from[i]);
      F sum = mul(load(lane_total + i * W), set1(rescale[i]));
      for (int t = 0; t < tiles; t += 2) {
        const float* at = lines + i * kKeyBlock + t * W;
        F p0 = zero(), p1 = zero();
        if (visible[i] != kNothing) {
          p0 = exp2_below(mul(sub(load(at), least), log2e));
          if (t + 1 < tiles) p1 = exp2_below(mul(sub(load(at + W), least), log2e));
        }
        sum = add(sum, add(p0, p1));
        _mm512_store_si512(prob_tile(0, t / 2) + i * kTile, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
      }
      store(lane_total + i * W, sum);
    }
  }

  void went_on() { started[0] = true; }  // all heads have seen a block
  void begin(const bf16* const* query) const { pack_queries(query); }
  void end() {
    for (int i = 0; i < rows; ++i) total[i] = hsum(load(lane_total + i * W));
    finish();
  }
};

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
