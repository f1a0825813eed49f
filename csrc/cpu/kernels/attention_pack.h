// Copies of a key or value block with the keys (scores) or the head (output) in the lanes, and of the query rows.
#pragma once

#include "attention_runs.h"
#include "exp_below.h"
#include "outer_block.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

#if defined(QWENOPT_ISA_BF16) && !defined(QWENOPT_ISA_AMX)
// out[d] = (a[d], b[d]) for d < n; whole vectors of 32 are written, zeros past n. b null: zeros.
static inline void interleave(const bf16* a, const bf16* b, int64_t n, uint32_t* out) {
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < n; d += 32) {
    const __mmask32 some = half_lanes(int(n - d < 32 ? n - d : 32));
    const __m512i va = _mm512_maskz_loadu_epi16(some, a + d);
    const __m512i vb = b ? _mm512_maskz_loadu_epi16(some, b + d) : _mm512_setzero_si512();
    _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(va, low, vb));
    _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(va, high, vb));
  }
}
#endif

#if defined(QWENOPT_ISA_AMX)
// Rows a and b of values (b null: zeros), neighbours in the sum, as words of pairs; of each 32 columns first the even
// ones, then the odd ones. Shifts and masks do it; interleaving in order takes shuffles of several steps, and with its
// masked loads 64 keys of 128 took 302 ns where this takes 184 (a core of Granite Rapids, 2026-11-24). That columns lie
// apart is made up for when sums are rounded: there they have to be joined in pairs anyway (store_halves).
static inline void pair_rows(const bf16* a, const bf16* b, int64_t n, uint32_t* out) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  auto pair = [&](__m512i va, __m512i vb, uint32_t* to) {
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_andnot_si512(high, va), _mm512_slli_epi32(vb, 16)));
    _mm512_storeu_si512(to + W, _mm512_or_si512(_mm512_srli_epi32(va, 16), _mm512_and_si512(high, vb)));
  };
  int64_t d = 0;
  for (; b && d + 32 <= n; d += 32) pair(_mm512_loadu_si512(a + d), _mm512_loadu_si512(b + d), out + d);
  for (; d < n; d += 32) {
    const __mmask32 some = half_lanes(int(n - d < 32 ? n - d : 32));
    const __m512i vb = b ? _mm512_maskz_loadu_epi16(some, b + d) : _mm512_setzero_si512();
    pair(_mm512_maskz_loadu_epi16(some, a + d), vb, out + d);
  }
}

// What pair_rows took apart: columns of sums, even ones before odd ones, times `by`, in order.
static inline void store_halves(const float* sums, F by, int64_t n, bf16* out) {
  for (int64_t d = 0; d < n; d += 32) {
    const __m512i even = bf16_bits(mul(load(sums + d), by)), odd = bf16_bits(mul(load(sums + d + W), by));
    const __m512i high = _mm512_and_si512(odd, _mm512_set1_epi32(int(0xffff0000)));
    _mm512_mask_storeu_epi16(out + d, half_lanes(int(n - d < 32 ? n - d : 32)),
                             _mm512_or_si512(_mm512_srli_epi32(even, 16), high));
  }
}
static inline void store_halves(const float* sums, int64_t padded, float* out) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t d = 0; d < padded; d += 32) {
    const F even = load(sums + d), odd = load(sums + d + W);
    store(out + d, _mm512_permutex2var_ps(even, low, odd));
    store(out + d + W, _mm512_permutex2var_ps(even, high, odd));
  }
}
#endif

// keys [num_keys, D] -> out[word][kKeyBlock], keys past num_keys zero. Values from j0 on are asked for meanwhile.
template <class T>
static inline void pack_keys(const Run<T>* keys, int num_keys, int64_t D, uint32_t* out, const Runs<T>& runs,
                             int64_t j0) {
  constexpr int kPack = Compute<T>::PACK;
  const int64_t words = D / kPack;
  alignas(64) float wide[W * kMaxHeadDim];
  for (int j = 0; j < num_keys; j += W) {
    const int rows = num_keys - j < W ? num_keys - j : W;
    const Run<T> from{keys[j / kRun].row + j % kRun * keys[j / kRun].stride, keys[j / kRun].stride};
    if (j % kRun == 0) runs.ask_values(j0 + j, num_keys - j < kRun ? num_keys - j : kRun);
    const uint32_t* row[W];
    for (int i = 0; i < W; ++i) {
      const T* key = from.row + (i < rows ? i : 0) * from.stride;
      if (sizeof(T) == 2 && kPack == 1) {
        if (i < rows) widen_row(key, D, wide + i * kMaxHeadDim);
        row[i] = (const uint32_t*)(wide + i * kMaxHeadDim);
      } else {
        row[i] = (const uint32_t*)key;
      }
    }
    for (int64_t c = 0; c < words; c += W) {
      const uint32_t* at[W];
      for (int i = 0; i < W; ++i) at[i] = row[i] + c;
      transpose(at, rows, int(words - c < W ? words - c : W), out + c * kKeyBlock + j, kKeyBlock);
    }
  }
}

// values [num_keys, D] -> out[word of keys][padded D]; returns the number of words.
template <class T>
static inline int64_t pack_values(const Run<T>* values, int num_keys, int64_t D, int64_t padded, uint32_t* out) {
#if defined(QWENOPT_ISA_BF16) && !defined(QWENOPT_ISA_AMX)
  if constexpr (sizeof(T) == 2) {
    for (int j = 0; j < num_keys; j += 2) {
      const Run<T>& run = values[j / kRun];
      const T* a = run.row + j % kRun * run.stride;
      interleave(a, j + 1 < num_keys ? a + run.stride : nullptr, D, out + j / 2 * padded);
    }
    return (num_keys + 1) / 2;
  }
#endif
  for (int j = 0; j < num_keys; ++j) {
    float* row = (float*)(out + j * padded);
    widen_row(values[j / kRun].row + j % kRun * values[j / kRun].stride, D, row);
    for (int64_t d = (D + W - 1) / W * W; d < padded; d += W) store(row + d, zero());
  }
  return num_keys;
}

// One query row of T -> words as outer_block reads them.
template <class T>
static inline void pack_query(const T* q, int64_t D, uint32_t* out) {
  if constexpr (Compute<T>::PACK == 2) {
    __builtin_memcpy(out, q, size_t(D) * sizeof(T));
  } else {
    widen_row(q, D, (float*)out);
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
