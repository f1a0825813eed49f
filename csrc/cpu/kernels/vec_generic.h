// Four floats through the compiler's vector extension: SSE2 on x86-64, NEON on Arm, scalar elsewhere.
#pragma once

namespace qwenopt {
namespace QWENOPT_ISA_NS {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef uint16_t H __attribute__((vector_size(8)));
constexpr int W = 4;
constexpr int kStreamRows = 2;               // of Dot: rows of x up to which weights are read row by row
constexpr int kTileRows = 4, kTileCols = 2;  // of Dot: accumulators that fit 16 registers
constexpr int kOuterRows = 4, kOuterVecs = 2;

struct Pair {
  F first, second;
};

static inline F set1(float x) { return F{x, x, x, x}; }
static inline F zero() { return set1(0.0f); }
static inline F add(F a, F b) { return a + b; }
static inline F sub(F a, F b) { return a - b; }
static inline F mul(F a, F b) { return a * b; }
static inline F div(F a, F b) { return a / b; }
static inline F fma(F a, F b, F c) { return a * b + c; }
// Like the x86 instructions: the second operand when either is a NaN.
static inline F vmax(F a, F b) { return a > b ? a : b; }
static inline F vmin(F a, F b) { return a < b ? a : b; }
static inline float hsum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
// Lane i is hsum(x[i]).
__attribute__((always_inline)) static inline F hsums(const F* x) {
  return F{hsum(x[0]), hsum(x[1]), hsum(x[2]), hsum(x[3])};
}
static inline float hmax(F x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
// A bit for each lane where x > t, or where one of the two is a NaN.
static inline uint32_t lanes_above(F x, F t) {
  const U bits = ~(U)(x <= t) & U{1, 2, 4, 8};
  return (bits[0] | bits[1]) | (bits[2] | bits[3]);
}
static inline F load(const float* p) {
  F out;
  __builtin_memcpy(&out, p, 16);
  return out;
}
static inline F load(const bf16* p) {
  H words;
  __builtin_memcpy(&words, p, 8);
  return (F)(__builtin_convertvector(words, U) << 16);
}
// Below 2^-14 float16 is a multiple of 2^-24: as the last bits of a number there, less that number.
static inline F widen(U h) {
  const U sign = (h & 0x8000) << 16, size = (h & 0x7fff) << 13;
  const U special = (U)(size >= 0x0f800000u) & 0x38000000u;  // infinity and NaN: the largest exponent there is
  const U tiny = (U)((F)(size + 0x38800000u) - (F)(U{} + 0x38800000u)), is_tiny = (U)(size < 0x00800000u);
  return (F)(sign | (is_tiny & tiny) | (~is_tiny & (size + 0x38000000u + special)));
}
static inline F load(const fp16* p) {
  H words;
  __builtin_memcpy(&words, p, 8);
  return widen(__builtin_convertvector(words, U));
}
static inline F load_n(const int8_t* p, int n) {
  F out = zero();
  for (int i = 0; i < n; ++i) out[i] = float(p[i]);
  return out;
}
static inline F load(const int8_t* p) { return load_n(p, 4); }
static inline F load_n(const float* p, int n) {
  F out = zero();
  __builtin_memcpy(&out, p, size_t(n) * sizeof(float));  // p may lie anywhere: weights come from mapped files
  return out;
}
static inline F load_n(const bf16* p, int n) {
  U bits = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) bits[i] = p[i].bits;
  return (F)(bits << 16);
}
static inline F load_n(const fp16* p, int n) {
  U bits = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) bits[i] = p[i].bits;
  return widen(bits);
}

static inline U bf16_bits(F x) {
  const U bits = (U)x;
  const U rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return ((U)(x == x) & rounded) | ((U)(x != x) & 0x7fc00000u);
}
// Bits of x rounded to float16. Below 2^-14 the sum with 0.5 rounds, since its last bit is worth 2^-24.
static inline U fp16_bits(F x) {
  const U bits = (U)x, size = bits & 0x7fffffffu;
  const U tiny = (U)((F)size + set1(0.5f)) - 0x3f000000u, is_tiny = (U)(size < 0x38800000u);
  const U normal = (size - 0x38000000u + 0xfff + ((size >> 13) & 1)) >> 13, is_large = (U)(size >= 0x477ff000u);
  const U large = 0x7c00u | ((U)(x != x) & 0x0200u);
  return ((bits >> 16) & 0x8000u) | (is_tiny & tiny) | (is_large & large) | (~(is_tiny | is_large) & normal);
}
static inline void store(float* p, F x) { __builtin_memcpy(p, &x, 16); }
static inline void store_n(float* p, F x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x[i];
}
static inline void store(bf16* p, F x) {
  const U bits = bf16_bits(x) >> 16;
  for (int i = 0; i < 4; ++i) p[i].bits = uint16_t(bits[i]);
}
static inline void store_n(bf16* p, F x, int n) {
  const U bits = bf16_bits(x) >> 16;
  for (int i = 0; i < n; ++i) p[i].bits = uint16_t(bits[i]);
}
static inline void store_n(fp16* p, F x, int n) {
  const U bits = fp16_bits(x);
  for (int i = 0; i < n; ++i) p[i].bits = uint16_t(bits[i]);
}
static inline void store(fp16* p, F x) { store_n(p, x, 4); }
static inline float widen_one(fp16 x) { return widen(U{x.bits, 0, 0, 0})[0]; }
static inline fp16 narrow_one(float x) { return fp16{uint16_t(fp16_bits(set1(x))[0])}; }

template <class T>
static inline F round_to(F x);
template <>
inline F round_to<float>(F x) {
  return x;
}
template <>
inline F round_to<bf16>(F x) {
  return (F)(bf16_bits(x) & 0xffff0000u);
}
template <>
inline F round_to<fp16>(F x) {
  return widen(fp16_bits(x));
}

static inline F round_int(F x) {
  const F magic = set1(12582912.0f);
  return (x + magic) - magic;
}
// p * 2^n in two steps, because 2^n alone may leave the float range.
static inline F scale2(F p, F n) {
  const I k = __builtin_convertvector(n, I), half = k >> 1, rest = k - half;
  return p * (F)((half + 127) << 23) * (F)((rest + 127) << 23);
}

template <class T>
struct Dot;
template <>
struct Dot<float> {
  using X = F;
  static constexpr int STEP = W;
  static X load(const float* p) { return QWENOPT_ISA_NS::load(p); }
  static X load_n(const float* p, int n) { return QWENOPT_ISA_NS::load_n(p, n); }
  static F step(F acc, X a, X b) { return fma(a, b, acc); }
};
// Eight elements as those in the upper and those in the lower half of each word: a shift and a mask widen them, no
// shuffle, whatever the byte order is.
template <>
struct Dot<bf16> {
  using X = Pair;
  static constexpr int STEP = 8;
  static X load(const bf16* p) {
    U words;
    __builtin_memcpy(&words, p, 16);
    return {(F)(words << 16), (F)(words & 0xffff0000u)};
  }
  static X load_n(const bf16* p, int n) {
    bf16 copy[8] = {};
    for (int i = 0; i < n; ++i) copy[i] = p[i];
    return load(copy);
  }
  static F step(F acc, X a, X b) { return fma(a.second, b.second, fma(a.first, b.first, acc)); }
};

// rows[j][0..cols) of 32-bit words -> out[c * stride + j]; missing rows are zero.
static inline void transpose(const uint32_t* const* rows, int num_rows, int cols, uint32_t* out, int64_t stride) {
  for (int c = 0; c < cols; ++c) {
    for (int j = 0; j < W; ++j) out[c * stride + j] = j < num_rows ? rows[j][c] : 0;
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
