// Attention of up to eight rows over int8 keys and values in AMX tiles: the codes are multiplied as they are. Making
// bfloat16 of them takes longer than reading them does.
//
// Queries and probabilities become two planes of int8, high and low, of one scale a row: 128 * high + low, 14 bits
// below the largest, which is finer than the bfloat16 that they would be otherwise. The planes are rows (columns) of
// one tile, so both products are one. Scales of keys go into the scores, those of values into the probabilities.
#pragma once

#include "attention_few.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr int kTileCodes = 64;                 // of one tile row
constexpr float kMostPlanes = 127 * 128 + 63;  // largest 128 * high + low

template <int Sum, int A, int B>
static inline void tile_step_codes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

struct CodedRows : FewRows {
  alignas(64) float prob_scale[kFewRows];
  alignas(64) float key_scale[kKeyBlock], value_scale[kKeyBlock];  // of the block, for the caller to fill

  using FewRows::FewRows;

  static bool fits(const AttentionArgs& a, int rows) {
    return a.pages.k_scale && rows <= kFewRows && a.D % kTileCodes == 0;
  }

  // x times `by` (whole numbers up to kMostPlanes) -> 16 codes of each plane.
  static void split(F x, F by, int8_t* high, int8_t* low) {
    const __m512i whole = _mm512_cvtps_epi32(mul(x, by));
    const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
    const __m512i rest = _mm512_sub_epi32(whole, _mm512_slli_epi32(top, 7));
    _mm_store_si128((__m128i*)high, _mm512_cvtepi32_epi8(top));
    _mm_store_si128((__m128i*)low, _mm512_cvtepi32_epi8(rest));
  }

  // Queries -> right operands [step of 64 codes][four codes][16 columns]: high planes in columns 0.., low in rows...
  void begin(const bf16* const* query) {
    alignas(64) int8_t planes[2 * kFewRows][kMaxHeadDim];
    for (int i = 0; i < rows; ++i) {
      F top = zero(), number = zero();
      for (int64_t d = 0; d < a.D; d += W) {
        const F x = load(query[i] + d);
        top = vmax(vmax(x, sub(zero(), x)), top);
        number = add(number, mul(x, zero()));
      }
      const float most = hmax(top) + hsum(number);  // a NaN stays one
      const F by = set1(most > 0.0f ? kMostPlanes / most : 0.0f);
      for (int64_t d = 0; d < a.D; d += W) split(load(query[i] + d), by, planes[i] + d, planes[rows + i] + d);
      query_scale[i] = most / kMostPlanes * a.scale;
    }
    for (int64_t s = 0; s < a.D / kTileCodes; ++s) {
      const uint32_t* at[kTile];
      for (int m = 0; m < kTile; ++m) at[m] = (const uint32_t*)(planes[m < 2 * rows ? m : 0] + s * kTileCodes);
      transpose(at, 2 * rows, W, query_tile(0, s), kTile);
    }
  }

  // Keys j0..j0+num_keys of a block; see FewRows. A run has 16 rows that can be read, so what lies behind the last key
  // is multiplied, and left out.
  void few_keys(int64_t j0, int num_keys, const Run<int8_t>* key, const Run<int8_t>* value, const Visible* visible,
                const float* const* bias_of) {
    const int tiles = (num_keys + kTile - 1) / kTile;
    next.look_ahead_of(j0);
    for (int t = 0; t < tiles; ++t) {
      tile_zero<0>();
      for (int64_t s = 0; s < a.D / kTileCodes; ++s) {
        next.rows(int(16 * kTileCodes / a.D));
        tile_load<4>(key[t].row + s * kTileCodes, key[t].stride);
        tile_load<6>(query_tile(0, s), 64);
        tile_step_codes<0, 4, 6>();
      }
      tile_store<0>(scores + t * kTileWords, 64);
    }
    pack_codes(value, tiles / 2 > 0 ? tiles / 2 : tiles, 0);
    softmax_planes(tiles, num_keys, visible, bias_of);
    pack_codes(value, tiles, tiles / 2 > 0 ? tiles / 2 : tiles);
    add_coded_values();
  }

  // Values -> right operands [four keys][D words]; of each 64 columns those of a quarter word lie together, see column.
  void pack_codes(const Run<int8_t>* value, int tiles, int from) {
    for (int t = from; t < tiles; ++t) {
      for (int j = 0; j < kTile; j += 4) {
        next.rows(4);
        const int8_t* row = value[t].row + j * value[t].stride;
        uint32_t* to = values + (t * 4 + j / 4) * a.D;
        for (int64_t d = 0; d < a.D; d += kTileCodes, to += kTileCodes) {
          const __m512i r0 = _mm512_loadu_si512(row + d), r1 = _mm512_loadu_si512(row + value[t].stride + d);
          const __m512i r2 = _mm512_loadu_si512(row + 2 * value[t].stride + d);
          const __m512i r3 = _mm512_loadu_si512(row + 3 * value[t].stride + d);
          const __m512i low01 = _mm512_unpacklo_epi8(r0, r1), high01 = _mm512_unpackhi_epi8(r0, r1);
          const __m512i low23 = _mm512_unpacklo_epi8(r2, r3), high23 = _mm512_unpackhi_epi8(r2, r3);
          _mm512_storeu_si512(to, _mm512_unpacklo_epi16(low01, low23));
          _mm512_storeu_si512(to + W, _mm512_unpackhi_epi16(low01, low23));
          _mm512_storeu_si512(to + 2 * W, _mm512_unpacklo_epi16(high01, high23));
          _mm512_storeu_si512(to + 3 * W, _mm512_unpackhi_epi16(high01, high23));
        }
      }
    }
  }
  // Where column d lies among sums.
  static int64_t column(int64_t d) { return d / 64 * 64 + d % 16 / 4 * 16 + d % 64 / 16 * 4 + d % 4; }

  void softmax_planes(int tiles, int num_keys, const Visible* visible, const float* const* bias_of) {
    alignas(64) float lines[kTile * kKeyBlock];
    for (int t = 0; t < tiles; ++t) {
      const uint32_t* at[kTile];
      for (int j = 0; j < kTile; ++j) at[j] = (const uint32_t*)(scores + t * kTileWords + j * kTile);
      transpose(at, kTile, 2 * rows, (uint32_t*)lines + t * kTile, kKeyBlock);
    }
    for (int i = 0; i < rows; ++i) {
      for (int t = 0; t < tiles; ++t) {
        float* at = lines + i * kKeyBlock + t * W;
        const F high = _mm512_cvtepi32_ps(_mm512_load_si512(at));
        const F low = _mm512_cvtepi32_ps(_mm512_load_si512(at + rows * kKeyBlock));
        store(at, mul(fma(high, set1(128.0f), low), mul(load(key_scale + t * W), set1(query_scale[i]))));
      }
    }
    alignas(64) float least[W];
    move_maximum(lines, tiles, num_keys, visible, bias_of, set1(1.0f), least);
    int8_t* planes = (int8_t*)probs;  // [2 * rows of 16][64 keys]
    const F log2e = set1(1.44269504088896341f);
    for (int i = 0; i < rows; ++i) {
      F p[kKeyBlock / W], sum = mul(load(lane_total + i * W), set1(rescale[i])), top = zero(), number = zero();
      for (int t = 0; t < kKeyBlock / W; ++t) {
        p[t] = zero();
        if (t >= tiles || visible[i] == kNothing) continue;
        p[t] = exp2_below(mul(sub(load(lines + i * kKeyBlock + t * W), set1(least[i])), log2e));
        sum = add(sum, p[t]);
        p[t] = mul(p[t], load(value_scale + t * W));
        top = vmax(p[t], top);
        number = add(number, mul(p[t], zero()));
      }
      store(lane_total + i * W, sum);
      const float most = hmax(top) + hsum(number);
      const F by = set1(most > 0.0f ? kMostPlanes / most : 0.0f);
      prob_scale[i] = most / kMostPlanes;
      for (int t = 0; t < kKeyBlock / W; ++t) {
        split(p[t], by, planes + i * kKeyBlock + t * W, planes + (rows + i) * kKeyBlock + t * W);
      }
    }
  }

  void add_coded_values() {
    alignas(64) int32_t product[kTileWords];
    tile_load<7>(probs, 64);
    for (int64_t d = 0; d < a.D; d += kTile) {
      tile_load<5>(values + d, 4 * a.D);
      tile_zero<1>();
      tile_step_codes<1, 7, 5>();
      tile_store<1>(product, 64);
      for (int i = 0; i < rows; ++i) {
        const F high = _mm512_cvtepi32_ps(_mm512_load_si512(product + i * W));
        const F low = _mm512_cvtepi32_ps(_mm512_load_si512(product + (rows + i) * W));
        const F sum = mul(fma(high, set1(128.0f), low), set1(prob_scale[i]));
        float* to = sums + i * padded + d;
        store(to, started[0] ? fma(load(to), set1(rescale[i]), sum) : sum);
      }
    }
  }

  // Sums in the order that Block::finish expects: of each 32 columns the even ones, then the odd ones.
  void end() {
    alignas(64) float row[kMaxHeadDim];
    for (int i = 0; i < rows && started[0]; ++i) {
      float* own = sums + i * padded;
      for (int64_t d = 0; d < a.D; ++d) row[d / 32 * 32 + d % 2 * 16 + d % 32 / 2] = own[column(d)];
      __builtin_memcpy(own, row, size_t(a.D) * 4);
    }
    sum_lanes();
    finish();
  }
};

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
