// kv_append: a warp for each token and head writes its keys and values into their place in the pools.
#include "kv_row.cuh"

namespace qwenopt {

constexpr int kAppendThreads = 128;

template <class From, class To, int N>
QWENOPT_FN void append_head(const KvAppendArgs& a, const KvPlace& to, int64_t token, int64_t g) {
  const Held<N, 1> held{a.D, a.D};
  const int64_t b = token / a.S, s = token % a.S, scale = to.scale(a, g);
  float x[1][N];
  load_row(static_cast<const From*>(a.k) + b * a.k_sb + g * a.k_sg + s * a.k_ss, held, x);
  append_row(x, held, to.key<To>(a, g), a.k_scale + scale);
  load_row(static_cast<const From*>(a.v) + b * a.v_sb + g * a.v_sg + s * a.v_ss, held, x);
  append_row(x, held, to.value<To>(a, g), a.v_scale + scale);
}

template <class From, class To>
QWENOPT_FN void kv_append(const KvAppendArgs& a) {
  const int64_t item = int64_t(blockIdx.x) * (kAppendThreads / kWarp) + warp_id();
  if (item >= a.B * a.S * a.G) return;
  const int64_t token = item / a.G, g = item % a.G;
  const KvPlace to(a, token);
  if (!to.there) return;
  if (a.D <= 2 * kWarp) {
    append_head<From, To, 2>(a, to, token, g);
  } else if (a.D <= 4 * kWarp) {
    append_head<From, To, 4>(a, to, token, g);
  } else {
    append_head<From, To, 8>(a, to, token, g);
  }
}

QWENOPT_KERNEL(kv_append_float32_float32, KvAppendArgs, kAppendThreads, kv_append<float, float>(a))
QWENOPT_KERNEL(kv_append_float32_bfloat16, KvAppendArgs, kAppendThreads, kv_append<float, bf16>(a))
QWENOPT_KERNEL(kv_append_float32_int8, KvAppendArgs, kAppendThreads, kv_append<float, int8_t>(a))
QWENOPT_KERNEL(kv_append_bfloat16_float32, KvAppendArgs, kAppendThreads, kv_append<bf16, float>(a))
QWENOPT_KERNEL(kv_append_bfloat16_bfloat16, KvAppendArgs, kAppendThreads, kv_append<bf16, bf16>(a))
QWENOPT_KERNEL(kv_append_bfloat16_int8, KvAppendArgs, kAppendThreads, kv_append<bf16, int8_t>(a))

}  // namespace qwenopt
