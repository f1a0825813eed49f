// One token of one head into its place in a pool: as it is, or as codes with a scale.
#pragma once

#include "rows.cuh"

namespace qwenopt {

struct KvAppendArgs {
  void *k_pool, *v_pool;     // [pages, G, page_size, D], strides in elements, the last one 1
  float *k_scale, *v_scale;  // [pages, G, page_size], only with int8 pools
  const void *k, *v;         // [B, G, S, D]
  const int64_t* slots;      // [B * S]; negative: nowhere
  int64_t B, G, S, D, pages, page_size;
  int64_t kp_sp, kp_sg, kp_ss, vp_sp, vp_sg, vp_ss;
  int64_t k_sb, k_sg, k_ss, v_sb, v_sg, v_ss;
};

constexpr float kMostCode = 127.0f;

// What a lane holds of a row of `dim`: N values in P runs of N / P; run p begins at p * step + lane * N / P.
template <int N, int P>
struct Held {
  static constexpr int kRun = N / P;
  int64_t dim, step;

  QWENOPT_FN_MEMBER int64_t begin(int p) const { return p * step + lane_id() * kRun; }
  // How many of run p are there.
  QWENOPT_FN_MEMBER int64_t count(int p) const {
    const int64_t end = least(dim, (p + 1) * step) - begin(p);
    return end < 0 ? 0 : least(end, kRun);
  }
};

template <class T, int N, int P>
QWENOPT_FN void load_row(const T* from, const Held<N, P>& held, float (&x)[P][N / P]) {
#pragma unroll
  for (int p = 0; p < P; ++p) load_few(from + held.begin(p), held.count(p), x[p]);
}

template <class T, int N, int P>
QWENOPT_FN void store_row(const float (&x)[P][N / P], const Held<N, P>& held, T* to) {
#pragma unroll
  for (int p = 0; p < P; ++p) store_few(x[p], to + held.begin(p), held.count(p));
}

// Into a pool of floating point numbers; what is not there of x is 0.
template <class To, int N, int P>
QWENOPT_FN void append_row(const float (&x)[P][N / P], const Held<N, P>& held, To* to, float*) {
  store_row(x, held, to);
}

// Into a pool of codes -127..127 with one scale, value = code * scale, in the order of the reference: 127 / largest is
// a reciprocal times 127, codes are rounded to even.
template <int N, int P>
QWENOPT_FN void append_row(const float (&x)[P][N / P], const Held<N, P>& held, int8_t* to, float* scale) {
  float top = 0.0f, finite = 0.0f;
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int i = 0; i < N / P; ++i) {
      top = fmaxf(top, fabsf(x[p][i]));
      finite += x[p][i] * 0.0f;
    }
  }
  const float largest = warp_max(top) + warp_sum(finite);  // a NaN, and an infinity, make the scale a NaN
  if (lane_id() == 0) *scale = largest / kMostCode;
  const float inverse = 1.0f / largest * kMostCode;
  // No codes for rows of zeros, of what is no number, and of numbers so small that the inverse overflows.
  const bool coded = largest > 0.0f && inverse <= 3.4e38f;
  float codes[P][N / P];
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int i = 0; i < N / P; ++i) codes[p][i] = coded ? rintf(x[p][i] * inverse) : 0.0f;
  }
  store_row(codes, held, to);
}

// Where a token of a head goes.
struct KvPlace {
  int64_t page, place;
  bool there;

  // Nowhere: a slot below 0, or one that the pool has not.
  QWENOPT_FN_MEMBER KvPlace(const KvAppendArgs& a, int64_t token) {
    const int64_t slot = a.slots[token];
    page = slot / a.page_size;
    place = slot % a.page_size;
    there = slot >= 0 && page < a.pages;
  }
  template <class To>
  QWENOPT_FN_MEMBER To* key(const KvAppendArgs& a, int64_t g) const {
    return static_cast<To*>(a.k_pool) + page * a.kp_sp + g * a.kp_sg + place * a.kp_ss;
  }
  template <class To>
  QWENOPT_FN_MEMBER To* value(const KvAppendArgs& a, int64_t g) const {
    return static_cast<To*>(a.v_pool) + page * a.vp_sp + g * a.vp_sg + place * a.vp_ss;
  }
  QWENOPT_FN_MEMBER int64_t scale(const KvAppendArgs& a, int64_t g) const {
    return (page * a.G + g) * a.page_size + place;
  }
};

}  // namespace qwenopt
