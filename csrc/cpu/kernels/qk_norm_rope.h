// qk_norm_rope: rms_norm of each query and key head, then rotary position embedding.
#pragma once

#include "types.h"

namespace qwenopt {

struct QkNormRopeArgs {
  const void* q;                    // [B, S, H, D], strides q_sb q_ss q_sh
  const void* k;                    // [B, S, G, D], strides k_sb k_ss k_sh
  const void *q_weight, *k_weight;  // [D]
  const void *cos, *sin;            // [B or 1, S, D], strides cos_sb cos_ss
  void* q_out;                      // [B, S, H, D] contiguous
  void* k_out;                      // [B, S, G, D] contiguous
  int64_t B, S, H, G, D;
  int64_t q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, cos_sb, cos_ss;
  double eps;
  int dtype;
};

// Tokens token0..token1 of B * S.
QWENOPT_DECLARE_KERNEL(void qk_norm_rope(const QkNormRopeArgs& args, int64_t token0, int64_t token1))

}  // namespace qwenopt
