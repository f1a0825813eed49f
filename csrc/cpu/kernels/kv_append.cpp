#include "kv_append.h"

#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

constexpr float kMostCode = 127.0f;

template <class From, class To>
struct Writer {
  static void row(const From* x, int64_t D, To* out, float*) {
    for (int64_t d = 0; d < D; d += W) store_upto(out + d, load_upto(x + d, D - d), D - d);
  }
};

template <class T>
struct Writer<T, T> {
  static void row(const T* x, int64_t D, T* out, float*) { __builtin_memcpy(out, x, size_t(D) * sizeof(T)); }
};

// Codes -127..127 and one scale: value = code * scale. In the order of the reference, where 127 / largest is a
// reciprocal times 127; codes are rounded to even.
template <class From>
struct Writer<From, int8_t> {
  static void row(const From* x, int64_t D, int8_t* out, float* scale) {
    F top = zero(), finite = zero();
    for (int64_t d = 0; d < D; d += W) {
      const F value = load_upto(x + d, D - d);
      top = vmax(vmax(value, sub(zero(), value)), top);
      finite = add(finite, mul(value, zero()));
    }
    const float none = hsum(finite), largest = hmax(top) + none;  // a NaN, and an infinity, make the scale a NaN
    *scale = largest / kMostCode;
    const float inverse = 1.0f / largest * kMostCode;
    // No codes for rows of zeros, of what is no number, and of numbers so small that the inverse overflows.
    const bool coded = largest > 0.0f && inverse <= 3.4e38f;
    alignas(64) float codes[W];
    for (int64_t d = 0; d < D; d += W) {
      const int n = D - d < W ? int(D - d) : W;
      store(codes, coded ? round_int(mul(load_upto(x + d, D - d), set1(inverse))) : zero());
      for (int i = 0; i < n; ++i) out[d + i] = int8_t(int(codes[i]));
    }
  }
};

template <class From, class To>
void append(const KvAppendArgs& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t slot = a.slots[t], b = t / a.S, s = t % a.S;
    if (slot < 0) continue;
    const int64_t page = slot / a.page_size, place = slot % a.page_size;
    for (int64_t g = 0; g < a.G; ++g) {
      const From* k = (const From*)a.k + b * a.k_sb + g * a.k_sg + s * a.k_ss;
      const From* v = (const From*)a.v + b * a.v_sb + g * a.v_sg + s * a.v_ss;
      To* k_to = (To*)a.k_pool + page * a.kp_sp + g * a.kp_sg + place * a.kp_ss;
      To* v_to = (To*)a.v_pool + page * a.vp_sp + g * a.vp_sg + place * a.vp_ss;
      const int64_t at = (page * a.G + g) * a.page_size + place;
      Writer<From, To>::row(k, a.D, k_to, a.k_scale ? a.k_scale + at : nullptr);
      Writer<From, To>::row(v, a.D, v_to, a.v_scale ? a.v_scale + at : nullptr);
    }
  }
}

template <class From>
void append_from(const KvAppendArgs& a, int64_t begin, int64_t end) {
  if (a.pool_dtype == kInt8Pool) {
    append<From, int8_t>(a, begin, end);
  } else {
    of_type(a.pool_dtype, [&](auto type) { append<From, decltype(type)>(a, begin, end); });
  }
}

}  // namespace

void kv_append(const KvAppendArgs& a, int64_t begin, int64_t end) {
  of_type(a.dtype, [&](auto type) { append_from<decltype(type)>(a, begin, end); });
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
