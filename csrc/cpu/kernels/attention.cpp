#include "attention.h"

#include "attention_few_floats.h"
#include "attention_mask.h"
#include "attention_pack.h"
#include "attention_rows.h"
#if defined(QWENOPT_ISA_AMX)
#include "attention_coded.h"
#endif

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

template <class T>
struct Work {
  uint32_t *queries, *keys, *values;
  float *scores, *bias, *sums;  // sums: [rows][padded] unnormalised output
  typename Compute<T>::Type* probs;
  float *maximum, *total, *rescale;
  T *key_copies, *value_copies;  // there for pages alone
  int64_t padded;

  Work(char* at, int64_t D) {
    padded = QWENOPT_ATTENTION_PADDED(D);
    auto take = [&at](int64_t words) {
      char* start = at;
      at += words * 4;
      return start;
    };
    queries = (uint32_t*)take(kQueryRows * padded);
    keys = (uint32_t*)take(kKeyBlock * padded);
    values = (uint32_t*)take(kKeyBlock * padded);
    sums = (float*)take(kQueryRows * padded);
    scores = (float*)take(kQueryRows * kKeyBlock);
    bias = (float*)take(kQueryRows * kKeyBlock);
    char* separate = take(kQueryRows * kKeyBlock / 2);
    probs = (typename Compute<T>::Type*)(Compute<T>::PACK == 2 ? separate : (char*)scores);
    maximum = (float*)take(kQueryRows);
    total = (float*)take(kQueryRows);
    rescale = (float*)take(kQueryRows);
    key_copies = (T*)take(kKeyBlock * padded);
    value_copies = (T*)take(kKeyBlock * padded);
  }
};

// One work item: all heads of a group, queries q0..q1, keys k0..k1.
template <class T>
struct Block {
#if defined(QWENOPT_ISA_AMX)
  static constexpr bool kInTiles = sizeof(T) == 2;
#else
  static constexpr bool kInTiles = false;
#endif
  const AttentionArgs& a;
  const AttentionItem& it;
  Work<T> w;
  const int group, rows;
  const Runs<T> runs;
  const T* query[kQueryRows];
  Order order[kQueryRows];
  bool halves = kInTiles;  // sums lie as tiles leave them: see store_halves
  int64_t behind;          // a block before this key holds keys behind the window of some row
  Visible visible[kQueryRows];
  uint8_t seen[kMostKeys];

  // Rows are those of one head; of several heads query[] has all, the rest is the same for each.
  Block(const AttentionArgs& args, const AttentionItem& item)
      : a(args),
        it(item),
        w(item.work, args.D),
        group(int(args.H / args.G)),
        rows(int((item.q1 - item.q0) * (args.H / args.G))),
        runs{args, item.row, item.g, w.key_copies, w.value_copies, w.padded},
        behind(0) {}

  void start() {
    if (kInTiles) {  // whole vectors of rows, so that no lane holds what slows arithmetic
      for (int i = 0; i < rows; i += W) {
        store(w.maximum + i, set1(kMinusInfinity));
        store(w.total + i, zero());
      }
    }
    for (int i = 0; i < rows; ++i) {
      const int64_t s = it.q0 + i / group, h = it.g * group + i % group;
      for (int64_t more = 0; more < it.heads; ++more) {
        query[more * rows + i] = (const T*)a.q + it.b * a.q_sb + (h + more * group) * a.q_sh + s * a.q_ss;
      }
      order[i] = {key_first(a, s), key_limit(a, s)};
      if (order[i].first > behind) behind = order[i].first;
      if (kInTiles || rows <= kFewRows) continue;
      pack_query(query[i], a.D, w.queries + i * w.padded);
      w.maximum[i] = kMinusInfinity;
      w.total[i] = 0.0f;
      for (int64_t d = 0; d < w.padded; d += W) store(w.sums + i * w.padded + d, zero());
    }
  }

  // Fills bias and visible; false when no row sees any of these keys.
  bool look(int64_t j0, int num_keys) {
    bool any = false;
    for (int i = 0; i < rows; ++i) {
      float* bias = w.bias + i * kKeyBlock;
      if (a.m_sh == 0 && i % group != 0) {  // the heads of a group share one mask row
        visible[i] = visible[i - 1];
        continue;
      }
      const int64_t s = it.q0 + i / group, h = it.g * group + i % group;
      visible[i] = row_bias(a, it.b, h, s, order[i], j0, num_keys, bias);
      any = any || visible[i] != kNothing;
    }
    return any;
  }

  const float* bias_of(int i) const {
    if (visible[i] != kSome) return nullptr;
    return w.bias + (a.m_sh == 0 ? i / group * group : i) * kKeyBlock;
  }

  template <class C>
  void softmax(int num_keys, C* probs) {
    for (int i = 0; i < rows; ++i) {
      C* to = probs + i * kKeyBlock;
      if (visible[i] == kNothing) {
        for (int j = 0; j < kKeyBlock; j += W) store(to + j, zero());
        w.rescale[i] = 1.0f;
        continue;
      }
      softmax_row(w.scores + i * kKeyBlock, bias_of(i), num_keys, a.scale, to, w.maximum + i, w.total + i,
                  w.rescale + i);
    }
  }

  // Which of these keys any row may see; null: all, or it does not matter since all were written.
  const uint8_t* seen_keys(int64_t j0, int num_keys) {
    if (!a.pages.table || (a.mask_kind == kNoMask && j0 >= behind)) return nullptr;
    __builtin_memset(seen, 0, sizeof(seen));
    for (int i = 0; i < rows; ++i) {
      if (a.m_sh == 0 && i % group != 0) continue;
      add_seen(a, it.b, it.g * group + i % group, it.q0 + i / group, order[i], j0, num_keys, seen);
    }
    return seen;
  }

  // Keys as they come of blocks of `size`, and the first `then` of the next item.
  KeyStream stream(int64_t size, int64_t then) const {
    const int64_t element_bytes = runs.coded() ? 1 : int64_t(sizeof(T));
    KeyStream next{a,           it.row,    it.g,          it.heads,   element_bytes, element_bytes * a.D, size, it.k1,
                   it.next_row, it.next_g, it.next_heads, it.next_k0, then};
    next.start(it.k0, it.asked);
    return next;
  }
  int64_t first_of_next(int64_t size) const { return it.next_k1 - it.next_k0 < size ? it.next_k1 - it.next_k0 : size; }

  void in_floats() {
    if (rows > kFewRows) return many_in_floats();
    if (runs.coded()) return coded_in_floats();
    few_in_floats();
  }

  void few_in_floats() {
    halves = false;
    KeyStream next = stream(kKeyBlock, first_of_next(kKeyBlock));
    FewFloats<T, T> few{a, rows, w.padded, w.queries, w.sums, w.scores, next};
    plain_keys(few);
  }
  void coded_in_floats() {
    halves = false;
    KeyStream next = stream(kKeyBlock, first_of_next(kKeyBlock));
    FewFloats<T, int8_t> few{a, rows, w.padded, w.queries, w.sums, w.scores, next};
    coded_keys(few);
  }

  template <class Rows>
  void plain_keys(Rows& few) {
    heads_in_turn(few, [&](int64_t j0, int num_keys, const Runs<T>& own, const uint8_t* any, const float** bias) {
      Run<T> keys[kMostRuns], values[kMostRuns];
      own.keys(j0, num_keys, any, keys);
      own.values(j0, num_keys, any, values);
      few.few_keys(j0, num_keys, keys, values, visible, bias);
    });
  }
  template <class Rows>
  void coded_keys(Rows& few) {
    heads_in_turn(few, [&](int64_t j0, int num_keys, const Runs<T>& own, const uint8_t* any, const float** bias) {
      Run<int8_t> keys[kMostRuns], values[kMostRuns];
      own.codes(j0, num_keys, any, keys, values, few.key_scale, few.value_scale);
      few.few_keys(j0, num_keys, keys, values, visible, bias);
    });
  }

  // A block ahead of what is worked on, with its values: those of few rows are needed as soon as the keys are.
  void ask_first(KeyStream& next) const {
    if (!it.asked) next.rows(int(2 * it.heads) * kKeyBlock);
  }

  // Every block of keys by all heads of the item, before the next block.
  template <class Rows, class Attend>
  void heads_in_turn(Rows& few, Attend attend) {
    ask_first(few.next);
    for (int64_t h = 0; h < it.heads; ++h) {
      few.select(h);
      few.begin(query + h * rows);
    }
    for (int64_t j0 = it.k0; j0 < it.k1; j0 += kKeyBlock) {
      const int num_keys = it.k1 - j0 < kKeyBlock ? int(it.k1 - j0) : kKeyBlock;
      if (!look(j0, num_keys)) continue;
      const float* bias[kFewRows];
      for (int i = 0; i < rows; ++i) bias[i] = bias_of(i);
      const uint8_t* any = seen_keys(j0, num_keys);
      for (int64_t h = 0; h < it.heads; ++h) {
        few.select(h);
        attend(j0, num_keys, runs.of_head(it.g + h), any, bias);
      }
      few.went_on();
    }
    few.next.rows(int(2 * it.heads) * kKeyBlock);
    for (int64_t h = 0; h < it.heads; ++h) {
      few.select(h);
      few.end();
      finish(h, few.sums, few.maximum, few.total);
    }
  }

  // Reads of keys and values alternate. Each is asked for while the other is worked on, so that memory is never idle.
  void many_in_floats() {
    for (int64_t j0 = it.k0; j0 < it.k1; j0 += kKeyBlock) {
      const int num_keys = it.k1 - j0 < kKeyBlock ? int(it.k1 - j0) : kKeyBlock;
      if (look(j0, num_keys)) packed_block(j0, num_keys);
    }
    finish(0, w.sums, w.maximum, w.total);
  }

#if defined(QWENOPT_ISA_AMX)
  void in_tiles() {
    if (runs.coded() && rows <= kFewRows && !CodedRows::fits(a, rows)) return coded_in_floats();
    const int64_t size = rows <= kFewRows ? kKeyBlock : kTileKeys;
    KeyStream next = stream(size, rows <= kFewRows ? first_of_next(size) : 0);
    TileAttention tiles{a,         it.b,    it.g,      it.q0,    group,  rows,   order,
                        w.queries, w.keys,  w.values,  w.scores, w.bias, w.sums, (bf16*)w.probs,
                        w.maximum, w.total, w.rescale, w.padded, next,   behind, {}};
    bool mixed = false;
    tiles_begin();
    if (CodedRows::fits(a, rows)) {
      CodedRows coded(tiles, it.heads);
      coded_keys(coded);
    } else if (rows <= kFewRows) {
      FewRows few(tiles, it.heads);
      plain_keys(few);
      mixed = few.mixed;
    } else {
      many_in_tiles(tiles);
      finish(0, w.sums, w.maximum, w.total);
    }
    tiles_end();
    if (mixed) few_in_floats();
  }

  void many_in_tiles(TileAttention& tiles) {
    tiles.pack_queries(query);
    for (int64_t j0 = it.k0, j1; j0 < it.k1; j0 = j1) {
      j1 = (j0 / kTileKeys + 1) * kTileKeys;
      if (j1 > it.k1) j1 = it.k1;
      const int num_keys = int(j1 - j0);
      const uint8_t* any = seen_keys(j0, num_keys);
      Run<T> keys[kMostRuns], values[kMostRuns];
      runs.keys(j0, num_keys, any, keys);
      runs.values(j0, num_keys, any, values);
      tiles.keys_from(j0, num_keys, keys, values);
    }
    tiles.finish();
  }
#endif

  void packed_block(int64_t j0, int num_keys) {
    using C = typename Compute<T>::Type;
    constexpr int kPack = Compute<T>::PACK;
    const int whole = (num_keys + W - 1) / W * W;
    const int64_t left = it.k1 - j0 - kKeyBlock;
    const int num_next = left < 0 ? 0 : left < kKeyBlock ? int(left) : kKeyBlock;
    const uint8_t* any = seen_keys(j0, num_keys);
    Run<T> keys[kMostRuns], values[kMostRuns];
    runs.keys(j0, num_keys, any, keys);
    pack_keys(keys, num_keys, a.D, w.keys, runs, j0);
    outer_block<C>(rows, w.queries, w.padded, w.keys, kKeyBlock, whole, a.D / kPack, w.scores, kKeyBlock, nullptr);
    softmax(num_keys, w.probs);
    runs.values(j0, num_keys, any, values);
    const int64_t words = pack_values(values, num_keys, a.D, w.padded, w.values);
    for (int j = 0; j < num_next; j += kRun) {
      runs.ask_keys(j0 + kKeyBlock + j, num_next - j < kRun ? num_next - j : kRun);
    }
    outer_block<C>(rows, (const uint32_t*)w.probs, kKeyBlock / kPack, w.values, w.padded, w.padded, words, w.sums,
                   w.padded, w.rescale);
  }

  // The output of a head of the item, or what other shares of its keys are to be joined to.
  void finish(int64_t head, const float* all_sums, const float* maximum, const float* total) {
    for (int i = 0; i < rows; ++i) {
      const float* sums = all_sums + i * w.padded;
      if (it.partial) {
        float* to = it.partial + head * it.partial_stride + i * QWENOPT_ATTENTION_PARTIAL_FLOATS(a.D);
        to[0] = maximum[i];
        to[1] = total[i];
        store_sums(sums, to + 16);
        continue;
      }
      const int64_t s = it.q0 + i / group, h = (it.g + head) * group + i % group;
      T* out = (T*)a.out + ((it.b * a.S + s) * a.H + h) * a.D;
      const F inverse = set1(total[i] > 0.0f ? 1.0f / total[i] : total[i]);  // a NaN comes through
      store_output(sums, inverse, out);
    }
  }

  void store_sums(const float* sums, float* to) const {
#if defined(QWENOPT_ISA_AMX)
    if (halves) return store_halves(sums, w.padded, to);
#endif
    for (int64_t d = 0; d < w.padded; d += W) store(to + d, load(sums + d));
  }
  void store_output(const float* sums, F inverse, T* out) const {
#if defined(QWENOPT_ISA_AMX)
    if constexpr (kInTiles) {
      if (halves) return store_halves(sums, inverse, a.D, out);
    }
#endif
    for (int64_t d = 0; d < a.D; d += W) store_upto(out + d, mul(load(sums + d), inverse), a.D - d);
  }
};

template <class T>
void run(const AttentionArgs& a, const AttentionItem& item) {
  Block<T> block(a, item);
  block.start();
  if constexpr (Block<T>::kInTiles) {
    block.in_tiles();
  } else {
    block.in_floats();
  }
}

template <class T>
void combine_row(const float* const* part, int64_t num_splits, T* out, int64_t D) {
  float maximum = kMinusInfinity, total = 0.0f;
  for (int64_t s = 0; s < num_splits; ++s) maximum = part[s][0] > maximum ? part[s][0] : maximum;
  alignas(64) float sums[kMaxHeadDim];
  for (int64_t d = 0; d < D; d += W) store(sums + d, zero());
  for (int64_t s = 0; s < num_splits; ++s) {
    if (part[s][0] == kMinusInfinity && part[s][1] == 0.0f) continue;
    const float scale = exp1(part[s][0] - maximum);
    total += scale * part[s][1];
    for (int64_t d = 0; d < D; d += W) store(sums + d, fma(load(part[s] + 16 + d), set1(scale), load(sums + d)));
  }
  const F inverse = set1(total > 0.0f ? 1.0f / total : total);
  for (int64_t d = 0; d < D; d += W) store_upto(out + d, mul(load(sums + d), inverse), D - d);
}

template <class T>
void combine(const AttentionArgs& a, const AttentionCombine& c) {
  const int64_t group = a.H / a.G, rows = (c.q1 - c.q0) * group;
  const float* part[kMaxSplits];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t s = c.q0 + i / group, h = c.g * group + i % group;
    for (int64_t p = 0; p < c.num_splits; ++p) {
      part[p] = c.partial + p * c.split_stride + i * QWENOPT_ATTENTION_PARTIAL_FLOATS(a.D);
    }
    combine_row<T>(part, c.num_splits, (T*)a.out + ((c.b * a.S + s) * a.H + h) * a.D, a.D);
  }
}

}  // namespace

void attention(const AttentionArgs& a, const AttentionItem& item) {
  of_type(a.dtype, [&](auto type) { run<decltype(type)>(a, item); });
}

void attention_combine(const AttentionArgs& a, const AttentionCombine& c) {
  of_type(a.dtype, [&](auto type) { combine<decltype(type)>(a, c); });
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
