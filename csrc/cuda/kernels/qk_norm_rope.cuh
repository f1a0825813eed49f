// qk_norm_rope: a warp for each token and head; with kv_append, keys and values go straight into their pools.
#include "kv_row.cuh"

namespace qwenopt {

constexpr int kRopeThreads = 128;

struct QkNormRopeArgs {
  const void *q, *k;                // [B, S, H, D] and [B, S, G, D]
  const void *q_weight, *k_weight;  // [D]
  const void *cos, *sin;            // [B or 1, S, D], in one layout
  void *q_out, *k_out;              // [B, S, H, D] and [B, S, G, D], contiguous
  int64_t B, S, H, G, D;
  int64_t q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, cos_sb, cos_ss;
  double eps;
};

struct QkNormRopeAppendArgs {
  QkNormRopeArgs rope;  // k_out is not written
  KvAppendArgs kv;      // k is not read
};

// Two runs of V: the pairs (d, d + D / 2) that turn together lie in one lane.
template <class T, int V>
QWENOPT_FN void norm_rope(const QkNormRopeArgs& a, const T* x, const void* weight_, int64_t angle,
                          const Held<2 * V, 2>& held, float (&out)[2][V]) {
  const T* weight = static_cast<const T*>(weight_);
  float w[2][V], c[2][V], s[2][V];
  load_row(x, held, out);
  load_row(weight, held, w);
  load_row(static_cast<const T*>(a.cos) + angle, held, c);
  load_row(static_cast<const T*>(a.sin) + angle, held, s);
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum = fmaf(out[p][i], out[p][i], sum);
  }
  const float scale = rsqrtf(warp_sum(sum) / float(a.D) + float(a.eps));
  // Rounded wherever an op of eager ends.
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float low = rounded<T>(w[0][i] * rounded<T>(out[0][i] * scale));
    const float high = rounded<T>(w[1][i] * rounded<T>(out[1][i] * scale));
    out[0][i] = rounded<T>(low * c[0][i]) - rounded<T>(high * s[0][i]);
    out[1][i] = rounded<T>(high * c[1][i]) + rounded<T>(low * s[1][i]);
  }
}

// Head `head` of a token, those of keys behind those of queries.
template <class T, int V>
QWENOPT_FN void rope_head(const QkNormRopeArgs& a, int64_t token, int64_t head, const Held<2 * V, 2>& held,
                          float (&x)[2][V]) {
  const int64_t b = token / a.S, s = token % a.S, g = head - a.H;
  const T* from = g < 0 ? static_cast<const T*>(a.q) + b * a.q_sb + s * a.q_ss + head * a.q_sh
                        : static_cast<const T*>(a.k) + b * a.k_sb + s * a.k_ss + g * a.k_sh;
  norm_rope<T, V>(a, from, g < 0 ? a.q_weight : a.k_weight, b * a.cos_sb + s * a.cos_ss, held, x);
}

template <class T, int V>
QWENOPT_FN void qk_norm_rope_head(const QkNormRopeArgs& a, int64_t token, int64_t head) {
  const Held<2 * V, 2> held{a.D, a.D / 2};
  float x[2][V];
  rope_head<T, V>(a, token, head, held, x);
  store_row(x, held,
            head < a.H ? static_cast<T*>(a.q_out) + (token * a.H + head) * a.D
                       : static_cast<T*>(a.k_out) + (token * a.G + head - a.H) * a.D);
}

// Values are the heads behind those of keys.
template <class T, class To, int V>
QWENOPT_FN void append_rope_head(const QkNormRopeAppendArgs& a, int64_t token, int64_t head) {
  const Held<2 * V, 2> held{a.rope.D, a.rope.D / 2};
  const bool query = head < a.rope.H, value = head >= a.rope.H + a.rope.G;
  const KvPlace to(a.kv, token);
  if (!query && !to.there) return;
  const int64_t g = value ? head - a.rope.H - a.rope.G : head - a.rope.H;
  float x[2][V];
  if (value) {
    const int64_t b = token / a.kv.S, s = token % a.kv.S;
    load_row(static_cast<const T*>(a.kv.v) + b * a.kv.v_sb + g * a.kv.v_sg + s * a.kv.v_ss, held, x);
  } else {
    rope_head<T, V>(a.rope, token, head, held, x);
  }
  if (query) {
    store_row(x, held, static_cast<T*>(a.rope.q_out) + (token * a.rope.H + head) * a.rope.D);
    return;
  }
  // What eager would have stored first: numbers of dtype T.
#pragma unroll
  for (int i = 0; i < V; ++i) {
    x[0][i] = rounded<T>(x[0][i]);
    x[1][i] = rounded<T>(x[1][i]);
  }
  const int64_t scale = to.scale(a.kv, g);
  append_row(x, held, value ? to.value<To>(a.kv, g) : to.key<To>(a.kv, g),
             (value ? a.kv.v_scale : a.kv.k_scale) + scale);
}

QWENOPT_FN int64_t rope_item() { return int64_t(blockIdx.x) * (kRopeThreads / kWarp) + warp_id(); }

template <class T>
QWENOPT_FN void qk_norm_rope(const QkNormRopeArgs& a) {
  const int64_t item = rope_item(), heads = a.H + a.G;
  if (item >= a.B * a.S * heads) return;
  if (a.D <= 2 * kWarp) {
    qk_norm_rope_head<T, 1>(a, item / heads, item % heads);
  } else if (a.D <= 4 * kWarp) {
    qk_norm_rope_head<T, 2>(a, item / heads, item % heads);
  } else {
    qk_norm_rope_head<T, 4>(a, item / heads, item % heads);
  }
}

template <class T, class To>
QWENOPT_FN void qk_norm_rope_append(const QkNormRopeAppendArgs& a) {
  const int64_t item = rope_item(), heads = a.rope.H + 2 * a.rope.G;
  if (item >= a.rope.B * a.rope.S * heads) return;
  if (a.rope.D <= 2 * kWarp) {
    append_rope_head<T, To, 1>(a, item / heads, item % heads);
  } else if (a.rope.D <= 4 * kWarp) {
    append_rope_head<T, To, 2>(a, item / heads, item % heads);
  } else {
    append_rope_head<T, To, 4>(a, item / heads, item % heads);
  }
}

QWENOPT_KERNEL(qk_norm_rope_float32, QkNormRopeArgs, kRopeThreads, qk_norm_rope<float>(a))
QWENOPT_KERNEL(qk_norm_rope_bfloat16, QkNormRopeArgs, kRopeThreads, qk_norm_rope<bf16>(a))
QWENOPT_KERNEL(qk_norm_rope_append_float32_float32, QkNormRopeAppendArgs, kRopeThreads,
               qk_norm_rope_append<float, float>(a))
QWENOPT_KERNEL(qk_norm_rope_append_float32_int8, QkNormRopeAppendArgs, kRopeThreads,
               qk_norm_rope_append<float, int8_t>(a))
QWENOPT_KERNEL(qk_norm_rope_append_bfloat16_bfloat16, QkNormRopeAppendArgs, kRopeThreads,
               qk_norm_rope_append<bf16, bf16>(a))
QWENOPT_KERNEL(qk_norm_rope_append_bfloat16_int8, QkNormRopeAppendArgs, kRopeThreads,
               qk_norm_rope_append<bf16, int8_t>(a))

}  // namespace qwenopt
