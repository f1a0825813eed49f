// logit_signals: how far a token lies behind the likeliest, and the entropy of the distribution, of each row.
#pragma once

#include "types.h"

namespace qwenopt {

constexpr int64_t kSignalColumns = 4096;  // of one part: they stay in the first cache between their two passes

// Of one part of a row; the parts do not depend on threads, so neither do the bits of the result.
struct SignalPart {
  float largest;   // NaN when one is there
  float sum;       // of e^(x - largest)
  float weighted;  // of e^(x - largest) * (x - largest)
};

struct LogitSignalsArgs {
  const void* logits;  // [R, V], rows stride apart
  float* out;          // [R, 2] contiguous: margin, entropy
  SignalPart* parts;   // [R, P], P parts of kSignalColumns columns or less
  int64_t R, V, P, end, stride;
  bool entropy;
  int dtype;
};

// Of [0, R * P).
QWENOPT_DECLARE_KERNEL(void logit_signals(const LogitSignalsArgs& args, int64_t part0, int64_t part1))

}  // namespace qwenopt
