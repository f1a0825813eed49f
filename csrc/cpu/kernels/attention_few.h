// Attention of up to eight rows in AMX tiles: decoding. Reading keys and values is what takes time, so everything else
// is kept short and stays in L1, and lines of the blocks to come are asked for all along. Scores come out with the rows
// in the lanes, of which most would be idle: they are turned round, and exp is taken of as many vectors as there are.
// Neither keys nor values are packed. Two sums at a time: four are slower where another thread shares the core.
//
// Several heads go through the keys together, block by block, since the heads of a page lie one after the other: 1.05
// to 1.1 times as fast as head by head with 16 rows of 2048 keys in consecutive pages of 16, the same with pages in
// random order (2 cores of Granite Rapids, 2026-11-25).
#pragma once

#include "attention_tiles.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

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
  bool mixed =
      false;  // some sum is a NaN, perhaps for a value of the column beside it: the caller begins again without

  FewRows(const TileAttention& base, int64_t heads) : TileAttention(base), all_queries(queries), all_sums(sums) {
    for (int64_t h = 0; h < heads; ++h) {
      store(states[h].maximum, set1(-__builtin_inff()));
      store(states[h].total, zero());
      for (int i = 0; i < kFewRows; ++i) store(states[h].lane_total + i * W, zero());
    }
    for (int64_t at = 0; at < kKeyBlock / kTile * kTileWords; at += W) store((float*)prob_tile(0, 0) + at, zero());
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
    next.look_ahead_of(j0);
    each_tile(key, num_keys, keys, [this](const Run<bf16>* key, int from, int tiles) {
      make_scores(0, 1, key, tiles, scores + from * 2 * kTileWords);
    });
    softmax_rows((num_keys + kTile - 1) / kTile, num_keys, visible, bias_of);
    if (started[0]) scale_sums();
    each_tile(value, num_keys, values, [this](const Run<bf16>* value, int from, int tiles) {
      add_few_values(value, from, tiles, started[0] || from > 0);
    });
  }

  // use(runs, from, tiles): whole tiles where they lie, then those that are not, in `copies`.
  template <class Use>
  void each_tile(const Run<bf16>* run, int num_keys, uint32_t* copies, Use use) const {
    const int whole = a.D % kTileK != 0 ? 0 : num_keys / kTile, tiles = (num_keys + kTile - 1) / kTile;
    if (whole > 0) use(run, 0, whole);
    if (tiles == whole) return;
    Run<bf16> copied[kMostRuns];
    copy_rows(run + whole, num_keys - whole * kTile, tiles - whole, copies, copied);
    use(copied, whole, tiles - whole);
  }

  // Values are right operands as they lie: a word of a row, columns 2c and 2c + 1 of a key, counts as a pair in k of
  // which the left operand leaves out one. Its first rows have (p, 0) for each key and give even columns, the last
  // eight (0, p) and give odd ones. To leave out is to multiply by zero, which makes a NaN of what is not finite; see
  // `mixed`.
  void add_few_values(const Run<bf16>* value, int from, int tiles, bool add) {
    const int64_t stride = 2 * padded;  // bytes from one row of sums to the next: of 16 with half of the columns
    for (int64_t d = 0; d < steps(); d += 2) {
      float* to = sums + d * kTile;
      const bool two = d + 1 < steps();
      if (add) {
        tile_load<0>(to, stride);
        if (two) tile_load<2>(to + kTile, stride);
      } else {
        tile_zero<0>();
        tile_zero<2>();
      }
      for (int t = 0; t < tiles; ++t) {
        const bf16* row = value[t].row + d * kTileK;
        tile_load<4>(prob_tile(0, from + t), 64);
        next.rows(4);
        tile_load<5>(row, 2 * value[t].stride);
        tile_step<0, 4, 5>();
        if (!two) continue;
        next.rows(4);
        tile_load<6>(row + kTileK, 2 * value[t].stride);
        tile_step<2, 4, 6>();
      }
      tile_store<0>(to, stride);
      if (two) tile_store<2>(to + kTile, stride);
    }
  }

  void scale_sums() const {
    const int64_t half = padded / 2;
    for (int i = 0; i < rows; ++i) {
      if (rescale[i] == 1.0f) continue;
      const F by = set1(rescale[i]);
      float *even = sums + i * half, *odd = even + kFewRows * half;
      for (int64_t d = 0; d < half; d += W) {
        store(even + d, mul(load(even + d), by));
        store(odd + d, mul(load(odd + d), by));
      }
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
      for (int t = 0; t < tiles; ++t) {
        F p = zero();
        if (visible[i] != kNothing) p = exp2_below(mul(sub(load(lines + i * kKeyBlock + t * W), least), log2e));
        sum = add(sum, p);
        const __m512i word = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(p));
        _mm512_store_si512(prob_tile(0, t) + i * kTile, word);
        _mm512_store_si512(prob_tile(0, t) + (kFewRows + i) * kTile, _mm512_slli_epi32(word, 16));
      }
      store(lane_total + i * W, sum);
    }
  }

  void went_on() { started[0] = true; }  // all heads have seen a block
  void begin(const bf16* const* query) const { pack_queries(query); }
  // Sums in the order that Block::finish expects: of each 32 columns the even ones, then the odd ones.
  void end() {
    sum_lanes();
    finish();
    if (!started[0]) return;
    const int64_t half = padded / 2;
    alignas(64) float all[kFewRows * kMaxHeadDim];
    for (int i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < half; d += W) {
        const F even = load(sums + i * half + d), odd = load(sums + (kFewRows + i) * half + d);
        mixed = mixed || _mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q) != 0;
        store(all + i * padded + 2 * d, even);
        store(all + i * padded + 2 * d + W, odd);
      }
    }
    __builtin_memcpy(sums, all, size_t(rows * padded) * 4);
  }
  void sum_lanes() const {
    for (int i = 0; i < rows; ++i) total[i] = hsum(load(lane_total + i * W));
  }
};

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
