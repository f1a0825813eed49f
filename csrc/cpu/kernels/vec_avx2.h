// Eight floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

namespace qwenopt {
namespace QWENOPT_ISA_NS {

using F = __m256;
constexpr int W = 8;
constexpr int kStreamRows = 2;  // of Dot: rows of x up to which weights are read row by row
constexpr int kTileRows = 4, kTileCols = 2;
constexpr int kOuterRows = 6, kOuterVecs = 2;

struct Pair {
  F first, second;
};

static inline F set1(float x) { return _mm256_set1_ps(x); }
static inline F zero() { return _mm256_setzero_ps(); }
static inline F add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F div(F a, F b) { return _mm256_div_ps(a, b); }
static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline F vmax(F a, F b) { return _mm256_max_ps(a, b); }
static inline F vmin(F a, F b) { return _mm256_min_ps(a, b); }

// Always the same tree: lanes i and i + 4, then i + 2, then i + 1.
static inline float hsum(F x) {
  __m128 v = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}
// Lane i is hsum(x[i]).
__attribute__((always_inline)) static inline F hsums(const F* x) {
  F half[4], two[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const F a = x[i], b = x[i + 4];
    half[i] = _mm256_add_ps(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const F a = half[2 * i], b = half[2 * i + 1];
    two[i] = _mm256_add_ps(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(two[0], two[1], 0x88), _mm256_shuffle_ps(two[0], two[1], 0xdd));
}
static inline float hmax(F x) {
  __m128 v = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}
// A bit for each lane where x > t, or where one of the two is a NaN.
static inline uint32_t lanes_above(F x, F t) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x, t, _CMP_NLE_UQ))); }
static inline __m256i lane_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline F widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
static inline F load(const float* p) { return _mm256_loadu_ps(p); }
static inline F load(const bf16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
static inline F load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline F load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static inline F load_n(const float* p, int n) { return _mm256_maskload_ps(p, lane_mask(n)); }
template <class T>
static inline F load_n(const T* p, int n) {
  T copy[8] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
}

// Bits of x rounded to bfloat16, in the upper half of each lane.
static inline __m256i bf16_bits(F x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
}
static inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
static inline void store_n(float* p, F x, int n) { _mm256_maskstore_ps(p, lane_mask(n), x); }
static inline void store(bf16* p, F x) {
  const __m256i words = _mm256_srli_epi32(bf16_bits(x), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT;
static inline __m128i fp16_words(F x) { return _mm256_cvtps_ph(x, kNearest); }
static inline void store(fp16* p, F x) { _mm_storeu_si128((__m128i*)p, fp16_words(x)); }
static inline float widen_one(fp16 x) { return _cvtsh_ss(x.bits); }
static inline fp16 narrow_one(float x) { return fp16{_cvtss_sh(x, kNearest)}; }
template <class T>
static inline void store_n(T* p, F x, int n) {
  T copy[8];
  store(copy, x);
  for (int i = 0; i < n; ++i) p[i] = copy[i];
}

template <class T>
static inline F round_to(F x);
template <>
inline F round_to<float>(F x) {
  return x;
}
template <>
inline F round_to<bf16>(F x) {
  return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits(x), _mm256_set1_epi32(int(0xffff0000))));
}
template <>
inline F round_to<fp16>(F x) {
  return _mm256_cvtph_ps(fp16_words(x));
}

static inline F round_int(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p * 2^n in two steps, because 2^n alone may leave the float range.
static inline F scale2(F p, F n) {
  const __m256i k = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(k, 1), rest = _mm256_sub_epi32(k, half);
  const __m256i bias = _mm256_set1_epi32(127);
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}

template <class T>
struct Dot;
template <>
struct Dot<float> {
  using X = F;
  static constexpr int STEP = W;
  static X load(const float* p) { return _mm256_loadu_ps(p); }
  static X load_n(const float* p, int n) { return QWENOPT_ISA_NS::load_n(p, n); }
  static F step(F acc, X a, X b) { return fma(a, b, acc); }
};

// Sixteen elements as eight even and eight odd ones: a shift and a mask widen them, no shuffle.
static inline Pair load_apart(const bf16* p) {
  const __m256i v = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))))};
}
static inline Pair load_apart_n(const bf16* p, int n) {
  bf16 copy[16] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return load_apart(copy);
}
template <>
struct Dot<bf16> {
  using X = Pair;
  static constexpr int STEP = 16;
  static X load(const bf16* p) { return load_apart(p); }
  static X load_n(const bf16* p, int n) { return load_apart_n(p, n); }
  static F step(F acc, X a, X b) { return fma(a.second, b.second, fma(a.first, b.first, acc)); }
};

// rows[j][0..cols) of 32-bit words, cols <= W -> out[c * stride + j]; missing rows are zero.
static inline void transpose(const uint32_t* const* rows, int num_rows, int cols, uint32_t* out, int64_t stride) {
  F v[8], t[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) v[j] = j < num_rows ? load_n((const float*)rows[j], cols) : zero();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[2 * j] = _mm256_unpacklo_ps(v[2 * j], v[2 * j + 1]);
    t[2 * j + 1] = _mm256_unpackhi_ps(v[2 * j], v[2 * j + 1]);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) {
    v[j + 0] = _mm256_shuffle_ps(t[j], t[j + 2], 0x44);
    v[j + 1] = _mm256_shuffle_ps(t[j], t[j + 2], 0xee);
    v[j + 2] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0x44);
    v[j + 3] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm256_permute2f128_ps(v[j], v[j + 4], 0x20);
    t[j + 4] = _mm256_permute2f128_ps(v[j], v[j + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) {
    if (c < cols) _mm256_storeu_ps((float*)out + c * stride, t[c]);
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
