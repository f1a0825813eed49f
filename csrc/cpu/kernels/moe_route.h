// moe_route: softmax over the experts, the k largest in descending order, ties to the lower index.
#pragma once

#include "types.h"

namespace qwenopt {

constexpr int64_t kMaxRouteExperts = 4096;

struct MoeRouteArgs {
  const void* logits;    // [T, E], rows logits_stride apart
  void* weights_out;     // [T, K] contiguous
  int64_t* indices_out;  // [T, K] contiguous
  int64_t T, E, K, logits_stride;
  bool norm;  // divide by the sum of the k
  int dtype;
};

QWENOPT_DECLARE_KERNEL(void moe_route(const MoeRouteArgs& args, int64_t token0, int64_t token1))

}  // namespace qwenopt
