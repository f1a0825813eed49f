// top_tokens: the k largest logits of each row in descending order, ties to the lower id, NaN above all numbers.
#pragma once

#include "types.h"

namespace qwenopt {

constexpr int64_t kMaxTopTokens = 1024;

struct TopTokensArgs {
  const void* logits;  // [R, V], rows stride apart
  void* values;        // [R, K] contiguous
  int64_t* ids;        // [R, K] contiguous
  uint64_t* scratch;   // [R + members, 2K]: the best of each piece, a piece being a member's share of a row
  int64_t R, V, K, stride;
  int dtype;
};

// All columns of all rows are one line, cut into a share for each member; afterwards each row's pieces are merged.
QWENOPT_DECLARE_KERNEL(void top_tokens_scan(const TopTokensArgs& args, int member, int members))
QWENOPT_DECLARE_KERNEL(void top_tokens_merge(const TopTokensArgs& args, int64_t row0, int64_t row1, int members))

}  // namespace qwenopt
