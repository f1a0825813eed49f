// Where keys and values lie: runs of 16, each at a place of its own, so that one kernel reads rows that lie as one
// piece and rows in pages. A run is copied first where it holds int8, lies in several pages, or holds keys of pages
// that nobody may see: these may never have been written, and a NaN times a probability of zero is a NaN.
#pragma once

#include "attention_mask.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr int kMostKeys = 2 * kKeyBlock;  // of one block
constexpr int kMostRuns = kMostKeys / kRun;

template <class T>
struct Run {
  const T* row;  // the first of up to kRun
  int64_t stride;
};

// Key j of a row is number `at` of `page`; up to `left` keys from there on lie one after the other.
struct KeyPlace {
  int64_t page, at, left;
};

static inline KeyPlace key_place(const AttentionArgs& a, int64_t row, int64_t j) {
  const AttentionPages& pages = a.pages;
  if (!pages.table) return {row, j, a.L};
  const uint32_t size = uint32_t(pages.page_size), n = uint32_t(j) / size, at = uint32_t(j) - n * size;
  const int64_t page = pages.table[row * pages.table_stride + n];
  return {page < 0 ? 0 : page < pages.num_pages ? page : pages.num_pages - 1, at, int64_t(size - at)};
}

static inline int64_t key_offset(const AttentionArgs& a, int64_t g, KeyPlace p) {
  return p.page * a.k_sb + g * a.k_sh + p.at * a.k_ss;
}
static inline int64_t value_offset(const AttentionArgs& a, int64_t g, KeyPlace p) {
  return p.page * a.v_sb + g * a.v_sh + p.at * a.v_ss;
}
static inline int64_t scale_offset(const AttentionArgs& a, int64_t g, KeyPlace p) {
  return (p.page * a.G + g) * a.pages.page_size + p.at;
}

// codes * scale, rounded to T
template <class T>
static inline void widen_codes(const int8_t* codes, float scale, int64_t n, T* out) {
  int64_t d = 0;
#if defined(QWENOPT_ISA_BF16)
  for (; sizeof(T) == 2 && d + 32 <= n; d += 32) {
    const F low = mul(load(codes + d), set1(scale)), high = mul(load(codes + d + W), set1(scale));
    _mm512_storeu_si512(out + d, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
#endif
  for (; d + W <= n; d += W) store(out + d, mul(load(codes + d), set1(scale)));
  for (; d < n; ++d) out[d] = from_float<T>(float(codes[d]) * scale);
}

// The scales of n <= kRun codes (1 behind them), 0 where nobody sees the key: what was never written must not count.
static inline void copy_scales(const float* from, int n, const uint8_t* seen, float* to) {
  if (!seen && n >= kRun) {
    __builtin_memcpy(to, from, kRun * sizeof(float));
    return;
  }
  for (int j = 0; j < kRun; ++j) to[j] = j >= n ? 1.0f : seen && !seen[j] ? 0.0f : from[j];
}

// The runs of one block of keys, and memory for the copies.
template <class T>
struct Runs {
  const AttentionArgs& a;
  int64_t row, g;
  T *key_copies, *value_copies;  // [keys of a block][copy_stride]
  int64_t copy_stride;

  Runs of_head(int64_t head) const { return {a, row, head, key_copies, value_copies, copy_stride}; }
  bool coded() const { return a.pages.k_scale != nullptr; }

  // Keys (or values) j0..j0+num_keys; `seen` says which of them anybody may see, or is null: all.
  void keys(int64_t j0, int num_keys, const uint8_t* seen, Run<T>* to) const {
    for (int j = 0; j < num_keys; j += kRun) {
      const int n = num_keys - j < kRun ? num_keys - j : kRun;
      to[j / kRun] = run(a.k, key_offset, a.k_ss, a.pages.k_scale, j0, j, n, seen, key_copies);
    }
  }
  void values(int64_t j0, int num_keys, const uint8_t* seen, Run<T>* to) const {
    for (int j = 0; j < num_keys; j += kRun) {
      const int n = num_keys - j < kRun ? num_keys - j : kRun;
      to[j / kRun] = run(a.v, value_offset, a.v_ss, a.pages.v_scale, j0, j, n, seen, value_copies);
    }
  }

  // Codes and the scales of each. A run has kRun rows that can be read, where it lies or as a copy.
  void codes(int64_t j0, int num_keys, const uint8_t* seen, Run<int8_t>* keys, Run<int8_t>* values, float* key_scale,
             float* value_scale) const {
    for (int j = 0; j < num_keys; j += kRun) {
      const int n = num_keys - j < kRun ? num_keys - j : kRun;
      const uint8_t* any = seen ? seen + j : nullptr;
      const KeyPlace p = key_place(a, row, j0 + j);
      if (p.left >= kRun) {
        keys[j / kRun] = {(const int8_t*)a.k + key_offset(a, g, p), a.k_ss};
        values[j / kRun] = {(const int8_t*)a.v + value_offset(a, g, p), a.v_ss};
        copy_scales(a.pages.k_scale + scale_offset(a, g, p), n, any, key_scale + j);
        copy_scales(a.pages.v_scale + scale_offset(a, g, p), n, any, value_scale + j);
        continue;
      }
      int8_t *key = (int8_t*)key_copies + j * copy_stride, *value = (int8_t*)value_copies + j * copy_stride;
      keys[j / kRun] = {key, copy_stride};
      values[j / kRun] = {value, copy_stride};
      for (int i = 0; i < kRun; ++i, key += copy_stride, value += copy_stride) {
        key_scale[j + i] = value_scale[j + i] = i < n ? 0.0f : 1.0f;
        if (i >= n || (any && !any[i])) continue;  // whatever lies there, a code is a number
        const KeyPlace at = key_place(a, row, j0 + j + i);
        __builtin_memcpy(key, (const int8_t*)a.k + key_offset(a, g, at), size_t(a.D));
        __builtin_memcpy(value, (const int8_t*)a.v + value_offset(a, g, at), size_t(a.D));
        key_scale[j + i] = a.pages.k_scale[scale_offset(a, g, at)];
        value_scale[j + i] = a.pages.v_scale[scale_offset(a, g, at)];
      }
    }
  }

  template <class Offset>
  Run<T> run(const void* pool, Offset offset, int64_t stride, const float* scales, int64_t j0, int j, int n,
             const uint8_t* seen, T* copies) const {
    KeyPlace p = key_place(a, row, j0 + j);
    bool whole = n <= p.left;
    if (seen) {
      for (int i = 0; i < n; ++i) whole = whole && seen[j + i];
    }
    if (!coded() && whole) return {(const T*)pool + offset(a, g, p), stride};
    T* out = copies + j * copy_stride;
    for (int i = 0; i < n; ++i, ++p.at, --p.left) {
      if (p.left == 0) p = key_place(a, row, j0 + j + i);
      T* to = out + i * copy_stride;
      if (seen && !seen[j + i]) {
        __builtin_memset(to, 0, size_t(a.D) * sizeof(T));
      } else if (coded()) {
        widen_codes((const int8_t*)pool + offset(a, g, p), scales[scale_offset(a, g, p)], a.D, to);
      } else {
        __builtin_memcpy(to, (const T*)pool + offset(a, g, p), size_t(a.D) * sizeof(T));
      }
    }
    return {out, copy_stride};
  }

  // Asks for the keys or values j..j+n of a run, which are read soon.
  void ask_keys(int64_t j, int n) const {
    const KeyPlace p = key_place(a, row, j);
    ask(a.k, key_offset(a, g, p), a.k_ss, n);
  }
  void ask_values(int64_t j, int n) const {
    const KeyPlace p = key_place(a, row, j);
    ask(a.v, value_offset(a, g, p), a.v_ss, n);
  }
  void ask(const void* pool, int64_t offset, int64_t stride, int n) const {
    const int64_t size = coded() ? 1 : int64_t(sizeof(T));
    const char* at = (const char*)pool + offset * size;
    for (int i = 0; i < n; ++i) {
      for (int64_t d = 0; d < a.D * size; d += 64) __builtin_prefetch(at + i * stride * size + d, 0, 3);
    }
  }
};

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
