#include "qk_norm_rope.h"

#include "norm_row.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

// y = round(round(n * cos) + round(rotated(n) * sin)), n = rms_norm(x), rotated(n) = (-n[half:], n[:half])
template <class T>
void head(const T* x, const T* weight, const T* cos, const T* sin, T* out, int64_t half, float eps) {
  const F scale = set1(inverse_rms(x, 2 * half, eps));
  for (int64_t d = 0; d < half; d += W) {
    const int64_t n = half - d, e = d + half;
    const F low = normalised<T>(load_upto(x + d, n), scale, load_upto(weight + d, n));
    const F high = normalised<T>(load_upto(x + e, n), scale, load_upto(weight + e, n));
    const F a = round_to<T>(mul(low, load_upto(cos + d, n))), b = round_to<T>(mul(high, load_upto(sin + d, n)));
    const F c = round_to<T>(mul(high, load_upto(cos + e, n))), s = round_to<T>(mul(low, load_upto(sin + e, n)));
    store_upto(out + d, sub(a, b), n);
    store_upto(out + e, add(c, s), n);
  }
}

template <class T>
void run(const QkNormRopeArgs& a, int64_t token0, int64_t token1) {
  const int64_t half = a.D / 2;
  for (int64_t t = token0; t < token1; ++t) {
    const int64_t b = t / a.S, s = t % a.S;
    const T* cos = (const T*)a.cos + b * a.cos_sb + s * a.cos_ss;
    const T* sin = (const T*)a.sin + b * a.cos_sb + s * a.cos_ss;
    const T* q = (const T*)a.q + b * a.q_sb + s * a.q_ss;
    const T* k = (const T*)a.k + b * a.k_sb + s * a.k_ss;
    for (int64_t h = 0; h < a.H; ++h) {
      head<T>(q + h * a.q_sh, (const T*)a.q_weight, cos, sin, (T*)a.q_out + (t * a.H + h) * a.D, half, float(a.eps));
    }
    for (int64_t g = 0; g < a.G; ++g) {
      head<T>(k + g * a.k_sh, (const T*)a.k_weight, cos, sin, (T*)a.k_out + (t * a.G + g) * a.D, half, float(a.eps));
    }
  }
}

}  // namespace

void qk_norm_rope(const QkNormRopeArgs& a, int64_t token0, int64_t token1) {
  of_type(a.dtype, [&](auto type) { run<decltype(type)>(a, token0, token1); });
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
