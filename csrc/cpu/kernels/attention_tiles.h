// One key block of attention in AMX tiles, for many rows. Scores are made transposed, keys (as they lie) times packed
// queries, so that queries lie in the lanes: maximum, exp and sum of the softmax need no horizontal steps, and what has
// to be transposed are the probabilities, as pairs of bfloat16 a quarter of what the keys would be.
#pragma once

#include "attention_mask.h"
#include "attention_pack.h"
#include "attention_stream.h"
#include "tile_block.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr int kTileKeys = 2 * kKeyBlock;  // keys of one pass, cut at multiples of it
constexpr int kTileQueries = 2 * kTile;   // rows that go through scores, softmax and values together

// 2^x for x <= 0, to about 1e-7; below 2^-125 it gives 0, and a NaN stays one. The lanes that give 0 are masked out of
// the scaling: a result that underflows there costs a microcode assist, and every hidden key is one (see exp_below).
static inline F exp2_below(F x) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x, set1(-125.0f), _CMP_NLT_UQ);
  const F n = round_int(x), r = sub(x, n);
  F p = set1(1.32764720e-3f);
  p = fma(p, r, set1(9.67554138e-3f));
  p = fma(p, r, set1(5.55071327e-2f));
  p = fma(p, r, set1(2.40221197e-1f));
  p = fma(p, r, set1(6.93146967e-1f));
  p = fma(p, r, set1(1.00000007f));
  return _mm512_maskz_scalef_ps(kept, p, n);
}

// Two rows of probabilities -> words of pairs. The instruction takes subnormals as zero, as the product would.
static inline __m512i join_probs(F even, F odd) {
  alignas(64) static const uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kPairs), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// The rows of a work item and its buffers; see Work and Block.
struct TileAttention {
  const AttentionArgs& a;
  int64_t b, g, q0;
  int group, rows;
  const Order* order;
  uint32_t *queries, *keys, *values;
  float *scores, *bias, *sums;
  bf16* probs;
  float *maximum, *total, *rescale;
  int64_t padded;
  KeyStream& next;
  int64_t behind;                           // a block before this key holds keys behind the window of some row
  bool started[kQueryRows / kTileQueries];  // whether there are sums yet

  int64_t steps() const { return (a.D + kTileK - 1) / kTileK; }

  void pack_queries(const bf16* const* query) const {
    for (int i = 0; i < rows; i += kTile) {
      const int n = rows - i < kTile ? rows - i : kTile;
      const bf16* at[kTile];
      for (int m = 0; m < n; ++m) at[m] = query[i + m];
      for (int64_t s = 0; s < steps(); ++s) {
        const int64_t left = a.D - s * kTileK;
        pack_tile(at, n, left < kTileK ? int(left) : kTileK, query_tile(i, s));
        for (int m = 0; m < n; ++m) at[m] += kTileK;
      }
    }
  }
  uint32_t* query_tile(int row, int64_t step) const { return queries + (row / kTile * steps() + step) * kTileWords; }

  // Keys j0..j0+num_keys, which do not cross a multiple of kTileKeys.
  void keys_from(int64_t j0, int num_keys, const Run<bf16>* key, const Run<bf16>* value) {
    const int tiles = (num_keys + kTile - 1) / kTile;
    const bool copied = a.D % kTileK != 0 || num_keys % kTile != 0;  // else a tile would reach past a row or the last
    const bool biased = a.mask_kind != kNoMask || j0 < behind;
    Run<bf16> copies[kMostRuns];
    int64_t words = 0;
    next.look_ahead_of(j0);
    for (int i = 0; i < rows; i += kTileQueries) {
      const int left = rows - i, q_tiles = left > kTile ? 2 : 1;
      if (biased && !fill(i, j0, num_keys)) continue;
      if (copied && words == 0) copy_rows(key, num_keys, tiles, keys, copies);
      make_scores(i, q_tiles, copied ? copies : key, tiles, scores);
      for (int t = 0; t < q_tiles; ++t) softmax(i + t * kTile, t, j0, num_keys, biased);
      bool& has_sums = started[i / kTileQueries];
      if (has_sums) scale_sums(i, left < kTileQueries ? left : kTileQueries);
      if (words == 0) {
        pack_pairs(value, num_keys);
        words = (num_keys + 1) / 2;
      }
      add_values(i, q_tiles, words, has_sums);
      has_sums = true;
    }
  }

  // Rows that have seen no key: their sums are zero.
  void finish() const {
    for (int i = 0; i < rows; i += kTileQueries) {
      if (started[i / kTileQueries]) continue;
      for (int m = i; m < rows && m < i + kTileQueries; ++m) {
        for (int64_t d = 0; d < padded; d += W) store(sums + m * padded + d, zero());
      }
    }
  }

  // Values of num_keys keys as pairs; a whole step of pairs is filled with zeros.
  void pack_pairs(const Run<bf16>* value, int num_keys) {
    for (int j = 0; j < num_keys; j += 2) {
      next.rows(1);
      const Run<bf16>& run = value[j / kRun];
      const bf16* row = run.row + j % kRun * run.stride;
      pair_rows(row, j + 1 < num_keys ? row + run.stride : nullptr, a.D, values + j / 2 * padded);
    }
    const int64_t words = (num_keys + 1) / 2, whole = (words + kTile - 1) / kTile * kTile;
    for (int64_t d = words * padded; d < whole * padded; d += W) store((float*)values + d, zero());
  }

  // Whole tiles of keys or values, in `copies`, with zeros behind the end of a row and behind the last one.
  void copy_rows(const Run<bf16>* run, int num_keys, int tiles, uint32_t* copies, Run<bf16>* to) const {
    char* row = (char*)copies;
    for (int t = 0; t < tiles; ++t) {
      to[t] = {(const bf16*)row, steps() * kTileK};
      const bf16* from = run[t].row;
      for (int j = t * kTile; j < (t + 1) * kTile; ++j, from += run[t].stride) {
        for (int64_t d = 0; d < a.D; d += kTileK, row += 64) {
          const __mmask32 some = j < num_keys ? half_lanes(int(a.D - d < kTileK ? a.D - d : kTileK)) : 0;
          _mm512_store_si512(row, _mm512_maskz_loadu_epi16(some, from + d));
        }
      }
    }
  }

  // scores [key tile][q tile][16 keys][16 rows]
  void make_scores(int i, int q_tiles, const Run<bf16>* key, int tiles, float* scores) {
    static_assert(kRun == kTile, "a tile of keys is a run");
    const int64_t second = q_tiles == 2 ? steps() * kTileWords : 0;
    for (int j = 0; j < tiles; j += 2) {
      const bool two = j + 1 < tiles;
      const Run<bf16> run = key[j], run2 = key[two ? j + 1 : j];
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
      for (int64_t s = 0; s < steps(); ++s) {
        next.rows(4);
        tile_load<4>(run.row + s * kTileK, 2 * run.stride);
        tile_load<6>(query_tile(i, s), 64);
        tile_step<0, 4, 6>();
        if (q_tiles == 2) {
          tile_load<7>(query_tile(i, s) + second, 64);
          tile_step<1, 4, 7>();
        }
        if (!two) continue;
        tile_load<5>(run2.row + s * kTileK, 2 * run2.stride);
        tile_step<2, 5, 6>();
        if (q_tiles == 2) tile_step<3, 5, 7>();
      }
      float* to = scores + j * 2 * kTileWords;
      tile_store<0>(to, 64);
      if (q_tiles == 2) tile_store<1>(to + kTileWords, 64);
      if (two) tile_store<2>(to + 2 * kTileWords, 64);
      if (two && q_tiles == 2) tile_store<3>(to + 3 * kTileWords, 64);
    }
  }

  // What is added to the scores of rows i.. (as the scores lie); false when none of them sees any of these keys.
  bool fill(int i, int64_t j0, int num_keys) const {
    alignas(64) float row[kTile * kKeyBlock];
    bool any = false;
    for (int t = 0; t < 2 && i + t * kTile < rows; ++t) {
      for (int j = 0; j < num_keys; j += kKeyBlock) {
        const int keys_here = num_keys - j < kKeyBlock ? num_keys - j : kKeyBlock;
        const uint32_t* at[kTile];
        for (int m = 0; m < kTile; ++m) {
          const int r = i + t * kTile + m;
          float* to = row + m * kKeyBlock;
          at[m] = (const uint32_t*)to;
          if (m > 0 && a.m_sh == 0 && r % group != 0) {  // the heads of a group share one mask row
            at[m] = at[m - 1];
            continue;
          }
          Visible seen = kNothing;
          if (r < rows) {
            seen = row_bias(a, b, g * group + r % group, q0 + r / group, order[r], j0 + j, keys_here, to);
          }
          any = any || seen != kNothing;
          if (seen == kSome) continue;
          const F all = set1(seen == kEverything ? 0.0f : -__builtin_inff());
          for (int k = 0; k < kKeyBlock; k += W) store(to + k, all);
        }
        for (int k = 0; k < keys_here; k += W) {
          const uint32_t* from[kTile];
          for (int m = 0; m < kTile; ++m) from[m] = at[m] + k;
          transpose(from, kTile, W, (uint32_t*)bias + ((j + k) / kTile * 2 + t) * kTileWords, kTile);
        }
      }
    }
    return any;
  }

  // Scores of q tile t (rows i..) -> probabilities [q tile][step of 32 keys][16 rows][16 pairs].
  void softmax(int i, int t, int64_t j0, int num_keys, bool biased) {
    const int whole = (num_keys + kTileK - 1) / kTileK * kTileK;
    alignas(64) int32_t sees[kTile];
    int least = whole;
    for (int m = 0; m < kTile; ++m) {
      const int64_t n = i + m < rows ? order[i + m].limit - j0 : 0;
      sees[m] = n < 0 ? 0 : n < num_keys ? int(n) : num_keys;
      if (i + m < rows && sees[m] < least) least = sees[m];
    }
    float* score = scores + t * kTileWords;
    const F scale = set1(a.scale), hidden = set1(-__builtin_inff());
    const __m512i end = _mm512_load_si512(sees);
    auto at = [](int j) { return j / kTile * 2 * kTileWords + j % kTile * kTile; };
    F top0 = hidden, top1 = hidden;
    if (!biased && least == whole) {
      for (int j = 0; j < whole; j += 2) {
        top0 = vmax(mul(load(score + at(j)), scale), top0);
        top1 = vmax(mul(load(score + at(j + 1)), scale), top1);
      }
    } else {
      for (int j = 0; j < whole; ++j) {
        F s = mul(load(score + at(j)), scale);
        if (biased && j < num_keys) s = add(s, load(bias + t * kTileWords + at(j)));
        s = _mm512_mask_mov_ps(hidden, _mm512_cmpgt_epi32_mask(end, _mm512_set1_epi32(j)), s);
        store(score + at(j), s);
        top0 = vmax(s, top0);
      }
    }
    const bool scaled = biased || least < whole;
    const F before = load(maximum + i), now = vmax(before, vmax(top0, top1));
    // A row that has seen nothing: any finite number does, its probabilities are 0.
    const F base = _mm512_mask_mov_ps(now, _mm512_cmp_ps_mask(now, hidden, _CMP_EQ_OQ), zero());
    const F log2e = set1(1.44269504088896341f), factor = scaled ? set1(1.0f) : scale;
    alignas(64) uint32_t words[kTileKeys / 2 * kTile];
    F sum0 = zero(), sum1 = zero();
    for (int j = 0; j < whole; j += 2) {
      next.rows(1);
      const F p0 = exp2_below(mul(sub(mul(load(score + at(j)), factor), base), log2e));
      const F p1 = exp2_below(mul(sub(mul(load(score + at(j + 1)), factor), base), log2e));
      sum0 = add(sum0, p0);
      sum1 = add(sum1, p1);
      _mm512_store_si512(words + j / 2 * kTile, join_probs(p0, p1));
    }
    for (int j = 0; j < whole; j += kTileK) {
      const uint32_t* from[kTile];
      for (int m = 0; m < kTile; ++m) from[m] = words + (j / 2 + m) * kTile;
      transpose(from, kTile, kTile, prob_tile(t, j / kTileK), kTile);
    }
    const F keep = exp2_below(mul(sub(before, base), log2e));
    store(maximum + i, now);
    store(rescale + i, keep);
    store(total + i, fma(load(total + i), keep, add(sum0, sum1)));
  }
  uint32_t* prob_tile(int t, int step) const {
    return (uint32_t*)probs + (t * (kTileKeys / kTileK) + step) * kTileWords;
  }

  void scale_sums(int i, int n) const {
    for (int m = i; m < i + n; ++m) {
      if (rescale[m] == 1.0f) continue;
      const F by = set1(rescale[m]);
      for (int64_t d = 0; d < padded; d += W) store(sums + m * padded + d, mul(load(sums + m * padded + d), by));
    }
  }

  // sums of rows i.. (+)= probabilities times values
  void add_values(int i, int q_tiles, int64_t words, bool has_sums) {
    float *c0 = sums + i * padded, *c1 = c0 + kTile * padded;
    for (int64_t d = 0; d < padded; d += 2 * kTile) {
      if (has_sums) {
        tile_load<0>(c0 + d, 4 * padded);
        tile_load<1>(c0 + d + kTile, 4 * padded);
      } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
      }
      if (has_sums && q_tiles == 2) {
        tile_load<2>(c1 + d, 4 * padded);
        tile_load<3>(c1 + d + kTile, 4 * padded);
      }
      for (int64_t s = 0; s * kTile < words; ++s) {
        const uint32_t* v = values + s * kTile * padded + d;
        next.rows(4);
        tile_load<4>(prob_tile(0, int(s)), 64);
        tile_load<6>(v, 4 * padded);
        tile_load<7>(v + kTile, 4 * padded);
        tile_step<0, 4, 6>();
        tile_step<1, 4, 7>();
        if (q_tiles == 1) continue;
        tile_load<5>(prob_tile(1, int(s)), 64);
        tile_step<2, 5, 6>();
        tile_step<3, 5, 7>();
      }
      tile_store<0>(c0 + d, 4 * padded);
      tile_store<1>(c0 + d + kTile, 4 * padded);
      if (q_tiles == 2) {
        tile_store<2>(c1 + d, 4 * padded);
        tile_store<3>(c1 + d + kTile, 4 * padded);
      }
    }
  }
};

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
