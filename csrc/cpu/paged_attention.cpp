// paged_attention: work items of (query block of one row, key/value heads, share of the keys), laid out at run time
// from the positions: rows may have any number of queries and of keys.
#include <algorithm>

#include "attention_span.h"
#include "kernels/attention.h"
#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Queries q0..q1 of batch entry b over the keys of one row of the table, for each `heads` key/value heads cut into
// shares of `each` blocks. Where there are several shares, their results lie at `partial`, each head's `floats` long.
struct QueryBlock {
  int64_t row, b, q0, q1, heads;
  KeySpan span;
  int64_t each, shares, partial, floats;
  // Items of a row are numbered from `row_item` on, heads by heads, so that their keys are read by one item after the
  // other; `before` of those of the same heads are of earlier blocks of the row. In a row's first block the number of
  // its blocks and of the items of the same heads.
  int64_t row_item, before, row_blocks, row_shares;
};

// What follows from the sizes alone: bounds of what the positions may ask for.
struct Sizes {
  int64_t group, most_queries, most_blocks, row_floats, partial_floats;
  int64_t span_bytes, list_bytes, work_bytes, total_bytes;
};

constexpr int64_t kItemsPerThread = 4, kMinShareBlocks = 4;         // of 64 keys
constexpr int64_t kEvenItemsPerThread = 16, kEvenShareBlocks = 16;  // as in attention

Sizes sizes_of(int64_t B, int64_t H, int64_t G, int64_t S, int64_t R, int64_t L, int64_t D, bool packed, int threads) {
  Sizes z;
  z.group = H / G;
  z.most_queries = z.group >= kQueryRows ? 1 : kQueryRows / z.group;
  const int64_t each = ceil_div(S, z.most_queries);
  z.most_blocks = packed ? std::min(S, S / z.most_queries + R) : B * each;
  // A block that is cut has more than a share of the work, so there are at most twice as many shares as are aimed for.
  const int64_t by_length =
      z.most_blocks * G * std::min<int64_t>(ceil_div(ceil_div(L, kKeyBlock), kMinShareBlocks), kMaxSplits);
  // Of as many rows as an item can have: one head's, or a few of each of several heads.
  const int64_t rows = std::min(S, z.most_queries) * z.group;
  const int64_t few = std::min<int64_t>(rows, kFewRows), heads = std::min<int64_t>(G, kMostHeads);
  const int64_t most_rows =
      std::min(by_length * rows, (2 * kEvenItemsPerThread * threads + G) * std::max(rows, few * heads));
  z.row_floats = QWENOPT_ATTENTION_PARTIAL_FLOATS(D);
  z.partial_floats = L > kKeyBlock * kMinShareBlocks ? most_rows * z.row_floats : 0;
  z.span_bytes = aligned(z.most_blocks * int64_t(sizeof(KeySpan)));
  z.list_bytes = aligned(z.most_blocks * int64_t(sizeof(QueryBlock)));
  z.work_bytes = aligned(QWENOPT_ATTENTION_PAGED_WORK_BYTES(D));
  z.total_bytes = 64 + z.span_bytes + threads * (z.list_bytes + z.work_bytes) + aligned(z.partial_floats * 4);
  return z;
}

struct PagedAttentionStep {
  void (*kernel)(const AttentionArgs&, const AttentionItem&);
  void (*combine)(const AttentionArgs&, const AttentionCombine&);
  AttentionArgs args;
  Sizes sizes;
  const int32_t* q_starts;
  int64_t num_rows;
  int threads, members;
  bool in_tiles;
  KeySpan* spans;
  char *lists, *work;
  float* partial;
  Counter counter;

  PagedAttentionStep(const AttentionArgs& args, const Sizes& sizes, const int32_t* q_starts, int64_t num_rows,
                     char* scratch, int threads, int isa)
      : kernel(QWENOPT_PICK(isa, attention)),
        combine(QWENOPT_PICK(isa, attention_combine)),
        args(args),
        sizes(sizes),
        q_starts(q_starts),
        num_rows(num_rows),
        threads(threads),
        members(args.B * args.H * args.S * args.L * args.D <= 32 * 1024 ? 1 : threads),
        in_tiles(isa == kAmx && args.dtype == kBFloat16),
        spans(reinterpret_cast<KeySpan*>(scratch)),
        lists(scratch + sizes.span_bytes),
        work(lists + threads * sizes.list_bytes),
        partial(reinterpret_cast<float*>(work + threads * sizes.work_bytes)) {}

  // Where the queries of row r end, whatever the table of starts says.
  int64_t end_of_row(int64_t r, int64_t begin) const {
    return std::min(std::max<int64_t>(q_starts[r + 1], begin), args.S);
  }

  // How many heads an item has: the kernels take several of few rows, which must see the same keys.
  int64_t heads_of(int64_t queries) const {
    if (queries * sizes.group > kFewRows || args.m_sh != 0) return 1;
    return std::min<int64_t>(args.G, in_tiles ? kMostHeads : kFloatHeads);
  }

  // The last queries first: they see the most keys, and what is left at the end should be short.
  void cut(int64_t row, int64_t b, int64_t q0, int64_t q1, QueryBlock* list, int64_t* count) const {
    if (q1 <= q0) return;
    const int64_t number = ceil_div(q1 - q0, sizes.most_queries), each = ceil_div(q1 - q0, number);
    const int64_t heads = heads_of(each);
    QueryBlock* first = list + *count;
    for (int64_t end = q1; end > q0; end -= each) {
      list[(*count)++] = {row, b, std::max(end - each, q0), end, heads, {0, 0}, 0, 1, -1, 0, 0, 0, 0, 0};
    }
    first->row_blocks = list + *count - first;
  }

  // The query blocks in the order of the rows. Every member makes the list for itself: it is short, and nobody waits.
  int64_t list_blocks(QueryBlock* list) const {
    int64_t count = 0;
    if (!q_starts) {
      for (int64_t b = 0; b < args.B; ++b) cut(b, b, 0, args.S, list, &count);
      return count;
    }
    for (int64_t r = 0, begin = 0, end; r < num_rows; ++r, begin = end) {
      end = end_of_row(r, begin);
      cut(r, 0, begin, end, list, &count);
    }
    return count;
  }

  int64_t num_queries() const {  // those that belong to a row
    if (!q_starts) return args.S;
    int64_t end = 0;
    for (int64_t r = 0; r < num_rows; ++r) end = end_of_row(r, end);
    return end;
  }

  KeySpan span_of(const QueryBlock& block) const { return visible_span(args, block.b, 0, args.H, block.q0, block.q1); }

  static int64_t blocks_of(const KeySpan& span) {
    return span.last <= span.first ? 0 : ceil_div(span.last, kKeyBlock) - span.first / kKeyBlock;
  }
  int64_t rows_of(const QueryBlock& block) const { return (block.q1 - block.q0) * sizes.group; }
  int64_t items_of_share(const QueryBlock& block) const { return ceil_div(args.G, block.heads); }
  // Of one head. Reading a key costs as much as working on it for some 32 rows.
  int64_t cost_of(const QueryBlock& block) const { return blocks_of(block.span) * (32 + rows_of(block)); }

  // Cuts the keys of each block into shares; only positions and the thread count go in, so that a run is repeatable.
  int64_t share_out(QueryBlock* list, int64_t count) const {
    int64_t total = 0, items = 0, floats = 0;
    for (int64_t i = 0; i < count; ++i) total += cost_of(list[i]) * args.G;
    for (int64_t i = 0; i < count; ++i) {
      QueryBlock& block = list[i];
      const int64_t blocks = blocks_of(block.span), cost = cost_of(block) * block.heads;
      block.floats = rows_of(block) * sizes.row_floats;
      if (cost > 0 && sizes.partial_floats > 0) {
        const int64_t even = std::min(ceil_div(cost * kEvenItemsPerThread * threads, total), blocks / kEvenShareBlocks);
        const int64_t few = std::min(ceil_div(cost * kItemsPerThread * threads, total), blocks / kMinShareBlocks);
        const int64_t shares = std::min<int64_t>(std::max<int64_t>({even, few, 1}), kMaxSplits);
        block.each = ceil_div(blocks, shares);
        block.shares = ceil_div(blocks, block.each);
        if (block.shares > 1 && floats + block.shares * args.G * block.floats > sizes.partial_floats) block.shares = 1;
      }
      if (block.shares == 1) block.each = blocks;
      if (block.shares > 1) {
        block.partial = floats;
        floats += block.shares * args.G * block.floats;
      }
    }
    for (int64_t i = 0; i < count; i += list[i].row_blocks) {
      for (int64_t n = 0; n < list[i].row_blocks; ++n) {
        list[i + n].before = list[i].row_shares;
        list[i].row_shares += list[i + n].shares;
      }
      list[i].row_item = items;
      items += list[i].row_shares * items_of_share(list[i]);
    }
    return items;
  }

  void run(const Team& team) {
    if (members == 1 && team.id > 0) return;
    int64_t begin, end;
    clear_rest(team);
    const bool works = team.id < members;
    auto* list = reinterpret_cast<QueryBlock*>(lists + (works ? team.id : 0) * sizes.list_bytes);
    const int64_t count = works ? list_blocks(list) : 0;
    if (args.mask_kind != kNoMask) {
      team.share(count, members, &begin, &end);
      for (int64_t i = begin; i < end; ++i) spans[i] = span_of(list[i]);
      if (members > 1) team.barrier();
    }
    for (int64_t i = 0; i < count; ++i) list[i].span = args.mask_kind != kNoMask ? spans[i] : span_of(list[i]);
    if (works) attend_items(list, share_out(list, count), team);
    if (sizes.partial_floats == 0) return;
    if (members > 1) team.barrier();
    int64_t turn = 0;
    for (int64_t i = 0; i < count; ++i) {
      const QueryBlock& block = list[i];
      for (int64_t g = 0; g < args.G && block.shares > 1; ++g) {
        if (turn++ % std::min(members, team.size) != team.id) continue;
        combine(args, {block.b, g, block.q0, block.q1, block.shares, partial_of(block, g, 0), block.floats});
      }
    }
  }
  void finish() {}

  // Tokens behind the last row.
  void clear_rest(const Team& team) const {
    const int64_t from = num_queries(), bytes = args.H * args.D * dtype_bytes(args.dtype);
    int64_t begin, end;
    team.share(args.S - from, members, &begin, &end);
    if (begin < end) std::fill_n(static_cast<char*>(args.out) + (from + begin) * bytes, (end - begin) * bytes, 0);
  }

  float* partial_of(const QueryBlock& block, int64_t g, int64_t share) const {
    return partial + block.partial + (g * block.shares + share) * block.floats;
  }

  struct Share {
    const QueryBlock* block;
    int64_t g, heads;
    KeySpan keys;
    float* partial;
  };

  // The next item, or false. Numbers only grow, so each member walks along the rows of its list.
  bool take(const QueryBlock** row, int64_t items, Share* share) {
    const int64_t item = counter.take();
    if (item >= items) return false;
    while (item >= (*row)->row_item + (*row)->row_shares * items_of_share(**row)) *row += (*row)->row_blocks;
    const int64_t in_row = item - (*row)->row_item, at = in_row % (*row)->row_shares;
    const int64_t g = in_row / (*row)->row_shares * (*row)->heads;
    const QueryBlock* block = *row;
    while (at >= block->before + block->shares) ++block;
    const int64_t part = at - block->before;
    const int64_t heads = std::min(block->heads, args.G - g);
    *share = {block, g, heads, {0, 0}, block->shares > 1 ? partial_of(*block, g, part) : nullptr};
    if (block->span.last > block->span.first) {
      const int64_t first = (block->span.first / kKeyBlock + part * block->each) * kKeyBlock;
      share->keys = {first, std::min(first + block->each * kKeyBlock, block->span.last)};
    }
    return true;
  }

  // Each one item ahead, so that its keys can be asked for while the last ones of this item are worked on.
  void attend_items(const QueryBlock* list, int64_t items, const Team& team) {
    Share now, then;
    bool asked = false;
    for (bool some = take(&list, items, &now); some; now = then) {
      some = take(&list, items, &then);
      if (!some) then = {now.block, 0, 1, {0, 0}, nullptr};
      const QueryBlock &block = *now.block, &next = *then.block;
      kernel(args, {block.b, block.row, now.g, now.heads, block.q0, block.q1, now.keys.first, now.keys.last,
                    now.partial, block.shares * block.floats, next.row, then.g, then.heads, then.keys.first,
                    then.keys.last, asked, work + team.id * sizes.work_bytes});
      asked = some && now.keys.last > now.keys.first;
    }
  }
};

void check_sizes(int64_t B, int64_t H, int64_t G, int64_t S, int64_t R, int64_t M, int64_t page_size, int64_t D) {
  const char* op = "paged_attention";
  for (int64_t size : {B, S, R, M}) check_size(op, "a size", size);
  check_size(op, "G", G, 1);
  QWENOPT_CHECK(H >= G && H % G == 0, op, ": ", H, " query heads and ", G,
                " key/value heads; the first must be a multiple of the second");
  QWENOPT_CHECK(H / G <= kQueryRows, op, ": ", H / G, " query heads for each key/value head; at most ", kQueryRows,
                " are supported");
  QWENOPT_CHECK(D >= 2 && D % 2 == 0 && D <= kMaxHeadDim, op, ": head size ", D, "; it must be even and 2..",
                kMaxHeadDim);
  QWENOPT_CHECK(page_size > 0, op, ": page size ", page_size, "; it must be at least 1");
  QWENOPT_CHECK(M * page_size < (int64_t(1) << 31), op, ": ", M, " pages of ", page_size,
                " keys for each row; at most 2^31 - 1 keys are supported");
}

int64_t scratch_bytes_py(int64_t B, int64_t H, int64_t G, int64_t S, int64_t R, int64_t M, int64_t page_size, int64_t D,
                         bool packed, int threads) {
  check_common("paged_attention_scratch_bytes", kFloat32, threads);
  check_sizes(B, H, G, S, R, M, page_size, D);
  return B * S == 0 ? 0 : sizes_of(B, H, G, S, R, M * page_size, D, packed, threads).total_bytes;
}

PagedAttentionStep paged_attention_step(uintptr_t q, uintptr_t k_pool, uintptr_t v_pool, uintptr_t k_scale,
                                        uintptr_t v_scale, uintptr_t block_table, uintptr_t q_starts,
                                        uintptr_t q_positions, uintptr_t mask, uintptr_t out, uintptr_t scratch,
                                        int64_t B, int64_t H, int64_t G, int64_t S, int64_t R, int64_t M,
                                        int64_t num_pages, int64_t page_size, int64_t D, int64_t q_sb, int64_t q_sh,
                                        int64_t q_ss, int64_t k_sp, int64_t k_sg, int64_t k_ss, int64_t v_sp,
                                        int64_t v_sg, int64_t v_ss, int64_t table_stride, int64_t m_sb, int64_t m_sh,
                                        int64_t m_ss, int64_t m_sl, int mask_kind, int64_t window, double scale,
                                        int dtype, int threads, int isa) {
  const char* op = "paged_attention";
  check_common(op, dtype, threads);
  check_sizes(B, H, G, S, R, M, page_size, D);
  check_size(op, "num_pages", num_pages);
  check_size(op, "window", window);
  QWENOPT_CHECK(mask_kind >= kNoMask && mask_kind <= kFp16Mask, op, ": mask_kind ", mask_kind,
                "; it must be 0 none, 1 bool, 2 float32, 3 bfloat16 or 4 float16");
  const bool packed = q_starts != 0;
  QWENOPT_CHECK(packed ? B == 1 && q_positions != 0 && mask_kind == kNoMask : B == R, op, ": ", B,
                " batch entries for ", R, " rows; packed rows need 1, positions and no mask, others one each");
  isa = kernel_isa(op, isa, dtype);
  // Without pages there are no keys, whatever the table says.
  const int64_t L = num_pages > 0 ? M * page_size : 0;
  if (B * S > 0) {
    check_pointer(op, "q", q);
    check_pointer(op, "out", out);
    check_pointer(op, "scratch", scratch);
  }
  if (B * S > 0 && R * L > 0) {
    check_pointer(op, "k_pool", k_pool);
    check_pointer(op, "v_pool", v_pool);
    check_pointer(op, "block_table", block_table);
    QWENOPT_CHECK((k_scale != 0) == (v_scale != 0), op, ": one of two scales; int8 pools have two, others none");
    if (mask_kind != kNoMask) check_pointer(op, "mask", mask);
  }
  if (mask_kind == kNoMask) m_sb = m_sh = m_ss = m_sl = 0;
  const AttentionPages pages{
      pointer<const int32_t>(block_table), table_stride, page_size, num_pages, pointer<const float>(k_scale),
      pointer<const float>(v_scale),       window};
  const AttentionArgs args{pointer(q),
                           pointer(k_pool),
                           pointer(v_pool),
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
                           k_sp,
                           k_sg,
                           k_ss,
                           v_sp,
                           v_sg,
                           v_ss,
                           m_sb,
                           m_sh,
                           m_ss,
                           m_sl,
                           mask_kind,
                           false,
                           float(scale),
                           dtype,
                           pages};
  const Sizes sizes = B * S > 0 ? sizes_of(B, H, G, S, R, M * page_size, D, packed, threads) : Sizes{};
  return {args, sizes, pointer<const int32_t>(q_starts), R, pointer<char>((scratch + 63) / 64 * 64), threads, isa};
}

}  // namespace

void register_paged_attention(py::module_& m) {
  define_step<&paged_attention_step>(
      m, "paged_attention", "out [B, S, H, D] = softmax(q k^T * scale + mask) v over keys and values in pages",
      py::arg("q"), py::arg("k_pool"), py::arg("v_pool"), py::arg("k_scale"), py::arg("v_scale"),
      py::arg("block_table"), py::arg("q_starts"), py::arg("q_positions"), py::arg("mask"), py::arg("out"),
      py::arg("scratch"), py::arg("B"), py::arg("H"), py::arg("G"), py::arg("S"), py::arg("R"), py::arg("M"),
      py::arg("num_pages"), py::arg("page_size"), py::arg("D"), py::arg("q_sb"), py::arg("q_sh"), py::arg("q_ss"),
      py::arg("k_sp"), py::arg("k_sg"), py::arg("k_ss"), py::arg("v_sp"), py::arg("v_sg"), py::arg("v_ss"),
      py::arg("table_stride"), py::arg("m_sb"), py::arg("m_sh"), py::arg("m_ss"), py::arg("m_sl"), py::arg("mask_kind"),
      py::arg("window"), py::arg("scale"), py::arg("dtype"), py::arg("threads"), py::arg("isa") = -1);
  m.def("paged_attention_scratch_bytes", &scratch_bytes_py, "Bytes of scratch that paged_attention needs", py::arg("B"),
        py::arg("H"), py::arg("G"), py::arg("S"), py::arg("R"), py::arg("M"), py::arg("page_size"), py::arg("D"),
        py::arg("packed"), py::arg("threads"));
}

}  // namespace qwenopt
