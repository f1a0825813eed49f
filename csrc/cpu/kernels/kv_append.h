// kv_append: keys and values of new tokens into the slots of a pool of pages, as they are or in int8.
#pragma once

#include "types.h"

namespace qwenopt {

constexpr int kInt8Pool = 3;  // beside the dtype codes: int8, with a scale for each token and head

struct KvAppendArgs {
  void *k_pool, *v_pool;     // [pages, G, page_size, D]
  float *k_scale, *v_scale;  // [pages, G, page_size], contiguous, of int8 pools
  const void *k, *v;         // [B, G, S, D]
  const int64_t* slots;      // [B * S]; negative: nothing is written
  int64_t G, S, D, page_size;
  int64_t kp_sp, kp_sg, kp_ss, vp_sp, vp_sg, vp_ss, k_sb, k_sg, k_ss, v_sb, v_sg, v_ss;
  int dtype, pool_dtype;
};

// Tokens begin..end of B * S.
QWENOPT_DECLARE_KERNEL(void kv_append(const KvAppendArgs& args, int64_t begin, int64_t end))

}  // namespace qwenopt
