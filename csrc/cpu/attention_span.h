// Which keys the rows of a query block can see at all: the first and one past the last.
#pragma once

#include "kernels/attention.h"

namespace qwenopt {

struct KeySpan {
  int64_t first, last;  // empty when last <= first
};

// Queries q0..q1 of batch entry b and heads h0..h1 (one head is enough when the mask has no head stride).
KeySpan visible_span(const AttentionArgs& args, int64_t b, int64_t h0, int64_t h1, int64_t q0, int64_t q1);

}  // namespace qwenopt
