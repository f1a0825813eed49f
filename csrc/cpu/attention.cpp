// attention: work items of (batch entry, key/value head, query block[, share of the keys]).
#include "kernels/attention.h"

#include <algorithm>

#include "attention_span.h"
#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

// How the work is cut. Only sizes and the thread count go in, so that a run is repeatable.
struct Split {
  int64_t queries_per_block, num_query_blocks, num_splits, num_groups;
  int64_t span_bytes, work_bytes, split_stride, partial_bytes, total_bytes;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Split split_work(int64_t B, int64_t H, int64_t G, int64_t S, int64_t L, int64_t D, int threads) {
  // Few items are cut into shares of 256 keys or more. Long ones are cut further, so that threads end together: with
  // four items each, waiting for one of them may cost a quarter of the time.
  constexpr int64_t kItemsPerThread = 4, kMinSplitKeys = 256, kEvenItemsPerThread = 16, kEvenSplitKeys = 1024;
  Split p;
  const int64_t group = H / G;
  const int64_t most = group >= kQueryRows ? 1 : kQueryRows / group;
  p.num_query_blocks = ceil_div(S, most);
  p.queries_per_block = ceil_div(S, p.num_query_blocks);
  p.num_query_blocks = ceil_div(S, p.queries_per_block);
  p.num_groups = B * G * p.num_query_blocks;
  p.num_splits = 1;
  if (p.num_groups < kItemsPerThread * threads) {
    p.num_splits = ceil_div(kItemsPerThread * threads, p.num_groups);
    if (p.num_splits > ceil_div(L, kMinSplitKeys)) p.num_splits = ceil_div(L, kMinSplitKeys);
  }
  const int64_t even = std::min(ceil_div(kEvenItemsPerThread * threads, p.num_groups), L / kEvenSplitKeys);
  p.num_splits = std::min<int64_t>(std::max(std::max(p.num_splits, even), int64_t(1)), kMaxSplits);
  p.span_bytes = aligned(p.num_groups * int64_t(sizeof(KeySpan)));
  p.work_bytes = aligned(QWENOPT_ATTENTION_WORK_BYTES(D));
  p.split_stride = p.queries_per_block * group * QWENOPT_ATTENTION_PARTIAL_FLOATS(D);
  p.partial_bytes = p.num_splits > 1 ? aligned(p.num_groups * p.num_splits * p.split_stride * 4) : 0;
  p.total_bytes = 64 + p.span_bytes + threads * p.work_bytes + p.partial_bytes;
  return p;
}

// Blocks of keys in one share: what is visible, shared out evenly.
int64_t blocks_each(const KeySpan& span, int64_t num_splits) {
  constexpr int64_t kMinBlocks = 4;
  const int64_t each = ceil_div(ceil_div(span.last, kKeyBlock) - span.first / kKeyBlock, num_splits);
  return num_splits > 1 && each < kMinBlocks ? kMinBlocks : each;
}

// How many of the shares have keys; at least one, for the output must be written.
int64_t used_splits(const KeySpan& span, int64_t num_splits) {
  if (num_splits == 1 || span.last <= span.first) return 1;
  return ceil_div(ceil_div(span.last, kKeyBlock) - span.first / kKeyBlock, blocks_each(span, num_splits));
}

// The keys of share `split`.
KeySpan share_of(const KeySpan& span, int64_t num_splits, int64_t split) {
  if (span.last <= span.first) return {0, 0};
  const int64_t each = blocks_each(span, num_splits);
  const int64_t begin = (span.first / kKeyBlock + split * each) * kKeyBlock, end = begin + each * kKeyBlock;
  return {begin, end < span.last ? end : span.last};
}

struct Place {
  int64_t b, g, q0, q1;
};

Place place_of(const AttentionArgs& a, const Split& p, int64_t group) {
  const int64_t block = group % p.num_query_blocks, bg = group / p.num_query_blocks;
  const int64_t q0 = block * p.queries_per_block, q1 = q0 + p.queries_per_block;
  return {bg / a.G, bg % a.G, q0, q1 < a.S ? q1 : a.S};
}

struct AttentionStep {
  void (*kernel)(const AttentionArgs&, const AttentionItem&);
  void (*combine)(const AttentionArgs&, const AttentionCombine&);
  AttentionArgs args;
  Split split;
  KeySpan* spans;
  char* work;
  float* partial;
  int members;
  Counter counter;

  // The scratch is laid out for `threads`; fewer may run.
  AttentionStep(const AttentionArgs& args, const Split& split, char* scratch, int threads, int isa)
      : kernel(QWENOPT_PICK(isa, attention)),
        combine(QWENOPT_PICK(isa, attention_combine)),
        args(args),
        split(split),
        spans(reinterpret_cast<KeySpan*>(scratch)),
        work(scratch + split.span_bytes),
        partial(reinterpret_cast<float*>(work + threads * split.work_bytes)),
        members(args.B * args.H * args.S * args.L * args.D <= 32 * 1024 ? 1 : threads) {}

  void run(const Team& team) {
    if (members == 1 && team.id > 0) return;
    int64_t begin, end;
    team.share(split.num_groups, members, &begin, &end);
    const int64_t items = split.num_groups * split.num_splits;
    // Where every item is a query block of its own, or a span is found without a look at a mask, there is nothing to
    // share and so nobody to wait for.
    const bool shared = split.num_splits > 1 && args.mask_kind != kNoMask;
    if (shared) {
      for (int64_t i = begin; i < end; ++i) spans[i] = span_of(place_of(args, split, i));
      if (members > 1) team.barrier();
    }
    if (team.id < members) attend_items(items, team, shared);
    if (split.num_splits == 1) return;
    int64_t most = 1;
    for (int64_t i = 0; i < split.num_groups && most == 1; ++i) most = used_splits(span(i, shared), split.num_splits);
    if (most == 1) return;  // every output is written
    if (members > 1) team.barrier();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t used = used_splits(span(i, shared), split.num_splits);
      if (used == 1) continue;
      const Place at = place_of(args, split, i);
      combine(args, {at.b, at.g, at.q0, at.q1, used, partial + i * split.num_splits * split.split_stride,
                     split.split_stride});
    }
  }

  KeySpan span_of(const Place& at) const {
    const int64_t group = args.H / args.G;
    return visible_span(args, at.b, at.g * group, (at.g + 1) * group, at.q0, at.q1);
  }
  KeySpan span(int64_t i, bool shared) const { return shared ? spans[i] : span_of(place_of(args, split, i)); }

  // One share of a query block's keys.
  struct Share {
    Place at;
    KeySpan keys;
    float* partial;
  };

  // The next item that has something to do, or false.
  bool take(int64_t items, bool shared, Share* share) {
    for (int64_t item; (item = counter.take()) < items;) {
      // The last query block first: under a causal mask it is the longest.
      const int64_t i = split.num_groups - 1 - item / split.num_splits, part = item % split.num_splits;
      const Place at = place_of(args, split, i);
      const KeySpan all = span(i, shared);
      const int64_t used = used_splits(all, split.num_splits);
      if (part >= used) continue;
      float* to = used > 1 ? partial + (i * split.num_splits + part) * split.split_stride : nullptr;
      *share = {at, share_of(all, split.num_splits, part), to};
      return true;
    }
    return false;
  }

  // Each one item ahead, so that its keys can be asked for while the last ones of this item are worked on.
  void attend_items(int64_t items, const Team& team, bool shared) {
    Share now, then;
    bool asked = false;
    for (bool some = take(items, shared, &now); some; now = then) {
      some = take(items, shared, &then);
      if (!some) then = {{0, 0, 0, 0}, {0, 0}, nullptr};
      kernel(args,
             {now.at.b, now.at.b, now.at.g, 1, now.at.q0, now.at.q1, now.keys.first, now.keys.last, now.partial, 0,
              then.at.b, then.at.g, 1, then.keys.first, then.keys.last, asked, work + team.id * split.work_bytes});
      asked = some && now.keys.last > now.keys.first;
    }
  }
  void finish() {}
};

void check_sizes(int64_t B, int64_t H, int64_t G, int64_t S, int64_t L, int64_t D) {
  const char* op = "attention";
  check_size(op, "B", B);
  check_size(op, "S", S);
  check_size(op, "L", L);
  check_size(op, "G", G, 1);
  QWENOPT_CHECK(H >= G && H % G == 0, op, ": ", H, " query heads and ", G,
                " key/value heads; the first must be a multiple of the second");
  QWENOPT_CHECK(H / G <= kQueryRows, op, ": ", H / G, " query heads for each key/value head; at most ", kQueryRows,
                " are supported");
  QWENOPT_CHECK(D >= 2 && D % 2 == 0 && D <= kMaxHeadDim, op, ": head size ", D, "; it must be even and 2..",
                kMaxHeadDim);
}

int64_t scratch_bytes_py(int64_t B, int64_t H, int64_t G, int64_t S, int64_t L, int64_t D, int threads) {
  check_common("attention_scratch_bytes", kFloat32, threads);
  check_sizes(B, H, G, S, L, D);
  if (B * S == 0) return 0;
  return split_work(B, H, G, S, L, D, threads).total_bytes;
}

AttentionStep attention_step(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t mask, uintptr_t q_positions,
                             uintptr_t out, uintptr_t scratch, int64_t B, int64_t H, int64_t G, int64_t S, int64_t L,
                             int64_t D, int64_t q_sb, int64_t q_sh, int64_t q_ss, int64_t k_sb, int64_t k_sh,
                             int64_t k_ss, int64_t v_sb, int64_t v_sh, int64_t v_ss, int64_t m_sb, int64_t m_sh,
                             int64_t m_ss, int64_t m_sl, int mask_kind, bool is_causal, double scale, int dtype,
                             int threads, int isa) {
  const char* op = "attention";
  check_common(op, dtype, threads);
  check_sizes(B, H, G, S, L, D);
  QWENOPT_CHECK(mask_kind >= kNoMask && mask_kind <= kFp16Mask, op, ": mask_kind ", mask_kind,
                "; it must be 0 none, 1 bool, 2 float32, 3 bfloat16 or 4 float16");
  isa = kernel_isa(op, isa, dtype);
  if (B * S > 0) {
    check_pointer(op, "q", q);
    check_pointer(op, "out", out);
    check_pointer(op, "scratch", scratch);
  }
  if (B * S > 0 && L > 0) {
    check_pointer(op, "k", k);
    check_pointer(op, "v", v);
    if (mask_kind != kNoMask) check_pointer(op, "mask", mask);
  }
  if (mask_kind == kNoMask) m_sb = m_sh = m_ss = m_sl = 0;
  const AttentionArgs args{pointer(q),
                           pointer(k),
                           pointer(v),
                           pointer(mask),
                           pointer<const int64_t>(q_positions),
                           pointer(out),
                           B,
                           H,
                           G,
                           S,
                           L,
                           D,
                           q_sb,
                           q_sh,
                           q_ss,
                           k_sb,
                           k_sh,
                           k_ss,
                           v_sb,
                           v_sh,
                           v_ss,
                           m_sb,
                           m_sh,
                           m_ss,
                           m_sl,
                           mask_kind,
                           is_causal,
                           float(scale),
                           dtype,
                           AttentionPages{}};
  const Split split = B * S > 0 ? split_work(B, H, G, S, L, D, threads) : Split{};
  return {args, split, pointer<char>((scratch + 63) / 64 * 64), threads, isa};
}

}  // namespace

void register_attention(py::module_& m) {
  define_step<&attention_step>(
      m, "attention", "out [B, S, H, D] = softmax(q k^T * scale + mask) v with grouped key/value heads", py::arg("q"),
      py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("q_positions"), py::arg("out"), py::arg("scratch"),
      py::arg("B"), py::arg("H"), py::arg("G"), py::arg("S"), py::arg("L"), py::arg("D"), py::arg("q_sb"),
      py::arg("q_sh"), py::arg("q_ss"), py::arg("k_sb"), py::arg("k_sh"), py::arg("k_ss"), py::arg("v_sb"),
      py::arg("v_sh"), py::arg("v_ss"), py::arg("m_sb"), py::arg("m_sh"), py::arg("m_ss"), py::arg("m_sl"),
      py::arg("mask_kind"), py::arg("is_causal"), py::arg("scale"), py::arg("dtype"), py::arg("threads"),
      py::arg("isa") = -1);
  m.def("attention_scratch_bytes", &scratch_bytes_py, "Bytes of scratch that attention needs", py::arg("B"),
        py::arg("H"), py::arg("G"), py::arg("S"), py::arg("L"), py::arg("D"), py::arg("threads"));
}

}  // namespace qwenopt
