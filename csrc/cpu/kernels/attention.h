// attention: softmax(q k^T * scale + mask) v with grouped key/value heads, key block by key block.
#pragma once

#include "types.h"

namespace qwenopt {

enum MaskKind : int { kNoMask = 0, kBoolMask = 1, kFloatMask = 2, kBf16Mask = 3, kFp16Mask = 4 };

constexpr int kKeyBlock = 64;   // keys of one pass (two such in tiles); blocks lie on multiples, whatever rows can see
constexpr int kQueryRows = 64;  // (query, head of the group) rows of one work item
constexpr int kMaxHeadDim = 256;
constexpr int kMaxSplits = 256;  // shares of one query block's keys
constexpr int kRun = 16;         // keys that are best in one page: copied first, where page sizes are no multiple
constexpr int kFewRows = 8;      // rows of one head up to which an item may have several heads
constexpr int kMostHeads = kQueryRows / kFewRows;
constexpr int kFloatHeads = 2;  // of an item without tiles

// Keys and values in a pool of pages, which a table gives to rows.
struct AttentionPages {
  const int32_t* table;  // [rows, M], or null: rows lie as one piece each. Entries are forced into 0..num_pages - 1
  int64_t table_stride, page_size, num_pages;
  const float *k_scale, *v_scale;  // [pages, G, page_size], contiguous: the pools hold int8; or null
  int64_t window;                  // of q_positions: this many keys are seen at most; 0: all
};

struct AttentionArgs {
  const void *q, *k, *v;       // [B, H, S, D], [B, G, L, D], [B, G, L, D]; in pages k, v are [pages, G, page_size, D]
  const void* mask;            // strides m_sb m_sh m_ss m_sl
  const int64_t* q_positions;  // [S] or null: row i sees keys up to q_positions[i]
  void* out;                   // [B, S, H, D] contiguous: what the output projection reads
  int64_t B, H, G, S, L, D;
  int64_t q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, m_sb, m_sh, m_ss, m_sl;
  int mask_kind;
  bool is_causal;
  float scale;
  int dtype;
  AttentionPages pages;
};

// Queries q0..q1 of one batch entry and key/value heads g..g+heads, over keys k0..k1 (k0 a multiple of kKeyBlock) of
// one row of keys: that of the batch entry, but where queries of many rows are packed into one entry. More than one
// head: of up to kFewRows rows each, with a mask that is the same for all heads or none.
struct AttentionItem {
  int64_t b, row, g, heads, q0, q1, k0, k1;
  float* partial;          // null: write the output; else QWENOPT_ATTENTION_PARTIAL_FLOATS(D) a row
  int64_t partial_stride;  // from one head to the next
  int64_t next_row, next_g, next_heads, next_k0, next_k1;  // what this thread reads next; empty: next_k1 <= next_k0
  bool asked;  // this item was the next one of the last call on this thread, which asked memory for it
  char* work;  // QWENOPT_ATTENTION_WORK_BYTES(D) (in pages ..._PAGED_WORK_...), 64-byte aligned, one per thread
};

struct AttentionCombine {
  int64_t b, g, q0, q1, num_splits;
  const float* partial;  // split s starts at partial + s * split_stride
  int64_t split_stride;
};

QWENOPT_DECLARE_TILE_KERNEL(void attention(const AttentionArgs& args, const AttentionItem& item))
QWENOPT_DECLARE_TILE_KERNEL(void attention_combine(const AttentionArgs& args, const AttentionCombine& combine))

// Sizes, as macros because no function of a header may be emitted into a file of one instruction set.
#define QWENOPT_ATTENTION_PADDED(D) (((D) + 31) / 32 * 32)
// A partial row: the maximum, the sum, then (at 16) the unnormalised output.
#define QWENOPT_ATTENTION_PARTIAL_FLOATS(D) (16 + QWENOPT_ATTENTION_PADDED(D))
// Queries, keys, values, sums; scores, bias, probabilities; maximum, total, rescale.
#define QWENOPT_ATTENTION_WORK_BYTES(D)                                  \
  (4 * ((2 * kQueryRows + 2 * kKeyBlock) * QWENOPT_ATTENTION_PADDED(D) + \
        (2 * kQueryRows + kQueryRows / 2) * kKeyBlock + 3 * kQueryRows))
// The same, and copies of keys and values.
#define QWENOPT_ATTENTION_PAGED_WORK_BYTES(D) \
  (QWENOPT_ATTENTION_WORK_BYTES(D) + 4 * 2 * kKeyBlock * QWENOPT_ATTENTION_PADDED(D))

}  // namespace qwenopt
