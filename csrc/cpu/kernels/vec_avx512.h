// Sixteen floats: AVX-512 F, BW, VL, DQ, F16C for single numbers, and VDPBF16PS where the build says so
// (QWENOPT_ISA_BF16).
#pragma once

#include <immintrin.h>

namespace qwenopt {
namespace QWENOPT_ISA_NS {

using F = __m512;
constexpr int W = 16;
constexpr int kStreamRows = 3;  // of Dot: rows of x up to which weights are read row by row
#if defined(QWENOPT_ISA_BF16)
constexpr int kTileRows = 6, kTileCols = 4;
#else
constexpr int kTileRows = 4, kTileCols = 4;  // a widened bfloat16 operand takes two registers
#endif
constexpr int kOuterRows = 6, kOuterVecs = 4;

struct Pair {
  F first, second;
};

static inline F set1(float x) { return _mm512_set1_ps(x); }
static inline F zero() { return _mm512_setzero_ps(); }
static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F vmax(F a, F b) { return _mm512_max_ps(a, b); }
static inline F vmin(F a, F b) { return _mm512_min_ps(a, b); }

// Always the same tree: lanes i and i + 8, then i + 4, i + 2, i + 1. hsum4 does it for four vectors at once.
static inline __m128 quarter_sum(F x) {
  const __m256 v = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
static inline float hsum(F x) {
  const __m128 q = quarter_sum(x), v = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
static inline float hmax(F x) {
  const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 v = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}
// A bit for each lane where x > t, or where one of the two is a NaN.
static inline uint32_t lanes_above(F x, F t) { return _mm512_cmp_ps_mask(x, t, _CMP_NLE_UQ); }
static inline void hsum4(F a, F b, F c, F d, float* out) {
  const F ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const F cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  // Quarters of abcd: the four partial sums of a, b, c and d.
  const F abcd = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const F two = _mm512_add_ps(abcd, _mm512_permute_ps(abcd, 0x4e));
  const F one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
  const __m512i pick = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(pick, one)));
}

// Lane i is hsum(x[i]). A blend takes the halves that stay, so that only half of the work is shuffles, which have one
// port.
__attribute__((always_inline)) static inline F hsums(const F* x) {
  const __m512i pairs = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  F half[8], quarter[4], two[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const F a = x[i], b = x[i + 8];
    half[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const F a = half[i], b = half[i + 4];
    quarter[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, a, b), _mm512_permutex2var_ps(a, pairs, b));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const F a = quarter[2 * i], b = quarter[2 * i + 1];
    two[i] = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
  }
  return _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xdd));
}

static inline __mmask16 lanes(int n) { return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }
static inline F widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline F load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
static inline F load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline F load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline F load_n(const int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)));
}
static inline F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
static inline F load_n(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p)); }
static inline F load_n(const fp16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p)); }

// Bits of x rounded to bfloat16, in the upper half of each lane. Not VCVTNEPS2BF16: that one flushes denormals.
static inline __m512i bf16_bits(F x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
static inline __m256i bf16_words(F x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(x), 16)); }
static inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
static inline void store_n(float* p, F x, int n) { _mm512_mask_storeu_ps(p, lanes(n), x); }
static inline void store(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, bf16_words(x)); }
static inline void store_n(bf16* p, F x, int n) { _mm256_mask_storeu_epi16(p, lanes(n), bf16_words(x)); }

constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
static inline __m256i fp16_words(F x) { return _mm512_cvtps_ph(x, kNearest); }
static inline void store(fp16* p, F x) { _mm256_storeu_si256((__m256i*)p, fp16_words(x)); }
static inline void store_n(fp16* p, F x, int n) { _mm256_mask_storeu_epi16(p, lanes(n), fp16_words(x)); }
static inline float widen_one(fp16 x) { return _cvtsh_ss(x.bits); }
static inline fp16 narrow_one(float x) { return fp16{_cvtss_sh(x, kNearest)}; }

template <class T>
static inline F round_to(F x);
template <>
inline F round_to<float>(F x) {
  return x;
}
template <>
inline F round_to<bf16>(F x) {
  return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits(x), _mm512_set1_epi32(int(0xffff0000))));
}
template <>
inline F round_to<fp16>(F x) {
  return _mm512_cvtph_ps(fp16_words(x));
}

static inline F round_int(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F scale2(F p, F n) { return _mm512_scalef_ps(p, n); }

template <class T>
struct Dot;
template <>
struct Dot<float> {
  using X = F;
  static constexpr int STEP = W;
  static X load(const float* p) { return _mm512_loadu_ps(p); }
  static X load_n(const float* p, int n) { return QWENOPT_ISA_NS::load_n(p, n); }
  static F step(F acc, X a, X b) { return fma(a, b, acc); }
};

static inline __mmask32 half_lanes(int n) { return n >= 32 ? __mmask32(~0u) : __mmask32((1u << n) - 1); }

// Thirty-two elements as sixteen even and sixteen odd ones: a shift and a mask widen them, no shuffle.
static inline Pair apart(__m512i v) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))))};
}
static inline Pair load_apart(const bf16* p) { return apart(_mm512_loadu_si512(p)); }
static inline Pair load_apart_n(const bf16* p, int n) { return apart(_mm512_maskz_loadu_epi16(half_lanes(n), p)); }

#if defined(QWENOPT_ISA_BF16)
template <>
struct Dot<bf16> {
  using X = __m512i;
  static constexpr int STEP = 32;
  static X load(const bf16* p) { return _mm512_loadu_si512(p); }
  static X load_n(const bf16* p, int n) { return _mm512_maskz_loadu_epi16(half_lanes(n), p); }
  static F step(F acc, X a, X b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
};
#else
template <>
struct Dot<bf16> {
  using X = Pair;
  static constexpr int STEP = 32;
  static X load(const bf16* p) { return load_apart(p); }
  static X load_n(const bf16* p, int n) { return load_apart_n(p, n); }
  static F step(F acc, X a, X b) { return fma(a.second, b.second, fma(a.first, b.first, acc)); }
};
#endif

// rows[j][0..cols) of 32-bit words, cols <= W -> out[c * stride + j]; missing rows are zero.
static inline void transpose(const uint32_t* const* rows, int num_rows, int cols, uint32_t* out, int64_t stride) {
  __m512i v[16], t[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; ++j) {
    v[j] = j < num_rows ? _mm512_maskz_loadu_epi32(lanes(cols), rows[j]) : _mm512_setzero_si512();
  }
#pragma GCC unroll 8
  for (int j = 0; j < 16; j += 2) {
    t[j] = _mm512_unpacklo_epi32(v[j], v[j + 1]);
    t[j + 1] = _mm512_unpackhi_epi32(v[j], v[j + 1]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4) {
    v[j + 0] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
    v[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
    v[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
    v[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
  }
  // v[4g + i] holds column 4q + i of rows 4g..4g+3 in its quarter q.
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i lo01 = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x44), hi01 = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xee);
    const __m512i lo23 = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x44);
    const __m512i hi23 = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xee);
    t[i] = _mm512_shuffle_i32x4(lo01, lo23, 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(lo01, lo23, 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(hi01, hi23, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(hi01, hi23, 0xdd);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    if (c < cols) _mm512_storeu_si512(out + c * stride, t[c]);
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
