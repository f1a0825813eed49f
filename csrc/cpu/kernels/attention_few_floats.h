// Attention of up to eight rows of a head in vectors of floats: decoding, where no tiles are for it. Keys and values
// are read where they lie, widened once for up to four rows, and lines of the blocks to come are asked for all along.
// Several heads go through the keys together, block by block, since the heads of a page lie one after the other.
#pragma once

#include "attention_rows.h"
#include "attention_stream.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr int kFewAtOnce = 4;            // rows whose sums stay in registers
constexpr int kPairs = W == 16 ? 8 : 4;  // pairs of vectors of sums in registers: of 32, or of 16

// Two vectors of a row of values E. kApart: the even and the odd ones.
template <class E>
struct Columns {
  static constexpr bool kApart = false;
  static Pair load(const E* p) { return load_pair(p); }
  static Pair load_n(const E* p, int n) { return load_pair_n(p, n); }
};
#if defined(QWENOPT_ISA_AVX512) || defined(QWENOPT_ISA_AVX2)
template <>
struct Columns<bf16> {
  static constexpr bool kApart = true;
  static Pair load(const bf16* p) { return load_apart(p); }
  static Pair load_n(const bf16* p, int n) { return load_apart_n(p, n); }
};
#endif

// What a key E and a query T are multiplied as.
template <class T, class E>
struct KeyDot : Dot<T> {
  static typename Dot<T>::X query(const T* p, int n) { return Dot<T>::load_n(p, n); }
};
template <class T>
struct KeyDot<T, int8_t> : PairDot<int8_t> {
  static Pair query(const T* p, int n) { return load_pair_n(p, n); }
};

// What one head has come to.
struct FewFloatsState {
  float maximum[kFewRows], total[kFewRows];
  alignas(64) float lane_total[kFewRows * W];  // lanes of every row's sum of probabilities; summed across at the end
};

// The rows of a work item, query elements T over keys and values E; see Work and Block.
template <class T, class E>
struct FewFloats {
  using Q = KeyDot<T, E>;
  using X = typename Q::X;
  static constexpr bool kCodes = sizeof(E) == 1;
  const AttentionArgs& a;
  const int rows;
  const int64_t padded;
  uint32_t* const all_queries;
  float* const all_sums;
  float* const scores;  // [row][kKeyBlock], then probabilities
  KeyStream& next;
  FewFloatsState states[kMostHeads];
  float rescale[kFewRows];
  FewFloatsState* state = states;  // of the head that was selected, as are
  X* queries = nullptr;            // [row][step]
  float* sums = nullptr;           // [row][padded], columns as Columns<E> has them
  float *maximum = nullptr, *total = nullptr;
  alignas(64) float key_scale[kKeyBlock], value_scale[kKeyBlock];  // of codes of the block, for the caller to fill

  int passes() const { return rows > kFewAtOnce ? 2 : 1; }  // over keys and values of one head
  int64_t steps() const { return (a.D + Q::STEP - 1) / Q::STEP; }

  void select(int64_t h) {
    state = states + h;
    queries = (X*)all_queries + h * rows * steps();
    sums = all_sums + h * rows * padded;
    maximum = state->maximum;
    total = state->total;
  }

  void begin(const T* const* query) {
    for (int i = 0; i < rows; ++i) {
      maximum[i] = kMinusInfinity;
      store(state->lane_total + i * W, zero());
      for (int64_t d = 0; d < padded; d += W) store(sums + i * padded + d, zero());
      for (int64_t s = 0; s < steps(); ++s) {
        const int64_t left = a.D - s * Q::STEP;
        queries[i * steps() + s] = Q::query(query[i] + s * Q::STEP, int(left < Q::STEP ? left : Q::STEP));
      }
    }
  }

  // Keys j0..j0+num_keys, which do not cross a multiple of kKeyBlock, by all rows. What row i sees of them is
  // visible[i], and what is added to its scores, where that is some, bias_of[i].
  void few_keys(int64_t j0, int num_keys, const Run<E>* key, const Run<E>* value, const Visible* visible,
                const float* const* bias_of) {
    next.look_ahead_of(j0);
    for (int i = 0; i < rows; i += kFewAtOnce) {
      make_scores(i, rows - i < kFewAtOnce ? rows - i : kFewAtOnce, key, num_keys);
    }
    for (int i = 0; i < rows; ++i) softmax(i, num_keys, visible[i], bias_of[i]);
    for (int i = 0; i < rows; i += kFewAtOnce) {
      add_values(i, rows - i < kFewAtOnce ? rows - i : kFewAtOnce, value, num_keys);
    }
  }

  void make_scores(int i, int count, const Run<E>* key, int num_keys) {
    if (a.D % Q::STEP == 0) return make_scores<0>(i, count, key, num_keys);
    make_scores<1>(i, count, key, num_keys);
  }
  template <int Tail>
  void make_scores(int i, int count, const Run<E>* key, int num_keys) {
    static_assert(kFewAtOnce == 4, "cases below");
    if (count == 1) return make_scores<1, W, Tail>(i, key, num_keys);
    if (count == 2) return make_scores<2, W / 2, Tail>(i, key, num_keys);
    if (count == 3) return make_scores<3, W / 4, Tail>(i, key, num_keys);
    make_scores<4, W / 4, Tail>(i, key, num_keys);
  }

  // Scores of rows i..i+MR by NR keys at a time: a vector of sums for each, summed across all together. Tail: of D a
  // part of a step is left over.
  template <int MR, int NR, int Tail>
  void make_scores(int i, const Run<E>* key, int num_keys) {
    const X* query[MR];
    for (int m = 0; m < MR; ++m) query[m] = queries + (i + m) * steps();
    const int64_t share = passes() * steps();  // steps between two asks, so that each pass asks for its share
    int64_t turn = 0;
    float* to = scores + i * kKeyBlock;
    for (int j = 0; j < num_keys; j += NR) {
      const Run<E>& run = key[j / kRun];
      const E* row = run.row + j % kRun * run.stride;
      const int last = num_keys - j - 1;
      const auto each = [&](int n) { return row + n * run.stride; };
      const auto up_to_last = [&](int n) { return row + (n < last ? n : last) * run.stride; };
      const F sums = last >= NR - 1 ? key_sums<MR, NR, Tail>(query, each, share, turn)
                                    : key_sums<MR, NR, Tail>(query, up_to_last, share, turn);
      store_rows<MR, NR>(sums, to + j);
    }
  }

  // Lane m * NR + n: row m times key n, which lies at `key(n)`.
  template <int MR, int NR, int Tail, class Key>
  __attribute__((always_inline)) F key_sums(const X* const* query, Key key, int64_t share, int64_t& turn) {
    constexpr int kLines = NR < 4 ? NR : 4;  // after which it is seen whether to ask
    const int64_t whole = a.D / Q::STEP;
    F acc[W];
#pragma GCC unroll 16
    for (int n = 0; n < W; ++n) acc[n] = zero();
    for (int64_t s = 0; s < whole + Tail; ++s) {
      X x[MR];
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) x[m] = query[m][s];
#pragma GCC unroll 16
      for (int n = 0; n < NR; ++n) {
        const E* from = key(n) + s * Q::STEP;
        const X y = Tail && s == whole ? Q::load_n(from, int(a.D - whole * Q::STEP)) : Q::load(from);
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) acc[m * NR + n] = Q::step(acc[m * NR + n], x[m], y);
        if ((n + 1) % kLines == 0) {
          for (turn -= kLines; turn < 0; turn += share) next.ask_row();
        }
      }
    }
    return hsums(acc);
  }

  // MR pieces of NR lanes to rows of scores.
  template <int MR, int NR>
  static void store_rows(F sums, float* to) {
    alignas(64) float lane[W];
    store(lane, sums);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) __builtin_memcpy(to + m * kKeyBlock, lane + m * NR, NR * sizeof(float));
  }

  // Scores of row i -> probabilities relative to the largest so far, times the scales of the values where they have
  // any.
  void softmax(int i, int num_keys, Visible seen, const float* bias) {
    float* row = scores + i * kKeyBlock;
    rescale[i] = 1.0f;
    const int whole = (num_keys + W - 1) / W * W;
    F top = set1(kMinusInfinity);
    for (int j = num_keys; j < whole; ++j) row[j] = kMinusInfinity;
    for (int j = 0; j < whole && seen != kNothing; j += W) {
      F s = mul(load(row + j), set1(a.scale));
      if (kCodes) s = mul(s, load(key_scale + j));
      if (seen == kSome) s = add(s, load(bias + j));
      store(row + j, s);
      top = vmax(s, top);
    }
    const float before = maximum[i], most = hmax(top), now = most > before ? most : before;
    if (seen == kNothing || now == kMinusInfinity) {
      for (int j = 0; j < whole; j += W) store(row + j, zero());
      return;
    }
    if (now != before) {
      rescale[i] = exp1(before - now);
      maximum[i] = now;
    }
    F sum = mul(load(state->lane_total + i * W), set1(rescale[i]));
    for (int j = 0; j < whole; j += W) {
      const F p = exp_below(sub(load(row + j), set1(now)));
      sum = add(sum, p);
      store(row + j, kCodes ? mul(p, load(value_scale + j)) : p);
    }
    store(state->lane_total + i * W, sum);
  }

  void add_values(int i, int count, const Run<E>* value, int num_keys) {
    if (count == 1) return add_columns<1, 4>(i, 0, value, num_keys);
    if (count == 2) return add_columns<2, kPairs / 2>(i, 0, value, num_keys);
    if (count == 3) return add_columns<3, kPairs / 4>(i, 0, value, num_keys);
    add_columns<4, kPairs / 4>(i, 0, value, num_keys);
  }

  // sums of rows i..i+MR = sums * rescale + probabilities * values, from column d on, NV pairs of vectors at a time.
  template <int MR, int NV>
  void add_columns(int i, int64_t d, const Run<E>* value, int num_keys) {
    for (; d + NV * 2 * W <= a.D; d += NV * 2 * W) add_pairs<MR, NV>(i, d, 2 * W, value, num_keys);
    if constexpr (NV > 1) return add_columns<MR, NV / 2>(i, d, value, num_keys);
    if (d < a.D) add_pairs<MR, 1>(i, d, int(a.D - d), value, num_keys);
  }

  template <int MR, int NV>
  void add_pairs(int i, int64_t d, int width, const Run<E>* value, int num_keys) {
    F acc[MR][2 * NV];
    float* to = sums + i * padded + d;
    const float* prob = scores + i * kKeyBlock;
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * NV; ++v) acc[m][v] = mul(load(to + m * padded + v * W), set1(rescale[i + m]));
    }
    const int64_t every = passes() * a.D / (NV * 2 * W);  // passes over the values, so that each asks for its share
    int64_t turn = 0;
    for (int j = 0; j < num_keys; ++j) {
      const Run<E>& run = value[j / kRun];
      const E* row = run.row + j % kRun * run.stride + d;
      if (--turn < 0) {
        next.ask_row();
        turn = every - 1;
      }
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Pair x = NV == 1 && width < 2 * W ? Columns<E>::load_n(row, width) : Columns<E>::load(row + v * 2 * W);
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) {
          const F p = set1(prob[m * kKeyBlock + j]);
          acc[m][2 * v] = fma(p, x.first, acc[m][2 * v]);
          acc[m][2 * v + 1] = fma(p, x.second, acc[m][2 * v + 1]);
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * NV; ++v) store(to + m * padded + v * W, acc[m][v]);
    }
  }

  void went_on() const {}
  void end() {
    for (int i = 0; i < rows; ++i) total[i] = hsum(load(state->lane_total + i * W));
    if (!Columns<E>::kApart) return;
    alignas(64) float row[kMaxHeadDim];
    for (int i = 0; i < rows; ++i) {
      float* own = sums + i * padded;
      for (int64_t d = 0; d < padded; ++d) row[d] = own[d / (2 * W) * (2 * W) + d % 2 * W + d % (2 * W) / 2];
      __builtin_memcpy(own, row, size_t(padded) * 4);
    }
  }
};

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
