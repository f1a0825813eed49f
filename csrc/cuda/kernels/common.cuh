// What every kernel is written in: types of known size, bfloat16, warps, the few instructions that C++ lacks.
//
// One text for nvcc, for NVRTC (which has no standard headers, so none is included) and for the emulation on a CPU.
// What is not plain C++ or a CUDA builtin stands here, once, with what the emulation does instead beside it.
#pragma once

#if defined(QWENOPT_EMULATE)
#include "../emulate/cuda.h"
#endif

#define QWENOPT_FN static __device__ __forceinline__
#define QWENOPT_FN_MEMBER __device__ __forceinline__

// A kernel `name` of blocks of `threads`, whose only argument is the struct `a`. Every field of an argument struct has
// eight bytes, so that Python can pack it: an address, an int64_t or a double.
#if !defined(QWENOPT_EMULATE)
#define QWENOPT_KERNEL(name, Args, threads, ...) \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args a) { __VA_ARGS__; }
// `name` of type `T`, shared by the threads of a block; T is no array.
#define QWENOPT_SHARED(T, name) __shared__ T name
#endif

namespace qwenopt {

using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct bf16 {
  uint16_t bits;
};

// 16 bytes, in registers as four words.
struct alignas(16) Words {
  uint32_t w[4];
};

QWENOPT_FN float as_float(int32_t bits) { return __int_as_float(bits); }
QWENOPT_FN int32_t as_bits(float value) { return __float_as_int(value); }

QWENOPT_FN float to_float(float x) { return x; }
QWENOPT_FN float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
// The two halves of a word.
QWENOPT_FN float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
QWENOPT_FN float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

template <class T>
QWENOPT_FN T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 out;
#if defined(QWENOPT_EMULATE)
  const uint32_t bits = __float_as_uint(x);
  out.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#endif
  return out;
}
// Rounded to T, as what an op of eager gives before the next one reads it.
template <class T>
QWENOPT_FN float rounded(float x) {
  return to_float(from_float<T>(x));
}
// (low, high) as two bfloat16 in a word.
QWENOPT_FN uint32_t bf16_pair(float low, float high) {
#if defined(QWENOPT_EMULATE)
  return from_float<bf16>(low).bits | uint32_t(from_float<bf16>(high).bits) << 16;
#else
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#endif
}

QWENOPT_FN Words load16(const void* address) { return *static_cast<const Words*>(address); }
// Read once and by nobody else: kept out of the first cache. Volatile: loads that stand together stay together, ahead
// of the matrix instructions that wait for them.
QWENOPT_FN Words load16_once(const void* address) {
#if defined(QWENOPT_EMULATE)
  return load16(address);
#else
  Words out;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.w[0]), "=r"(out.w[1]), "=r"(out.w[2]), "=r"(out.w[3])
               : "l"(address));
  return out;
#endif
}
QWENOPT_FN bool aligned16(const void* address) { return (reinterpret_cast<uint64_t>(address) & 15u) == 0; }

QWENOPT_FN int lane_id() { return int(threadIdx.x % kWarp); }
QWENOPT_FN int warp_id() { return int(threadIdx.x / kWarp); }

// Of all lanes, the same bits in each: the lanes of a butterfly add the same pairs.
QWENOPT_FN float warp_sum(float x) {
#pragma unroll
  for (int n = kWarp / 2; n > 0; n /= 2) x += __shfl_xor_sync(kAllLanes, x, n);
  return x;
}
QWENOPT_FN int warp_sum(int x) {
#pragma unroll
  for (int n = kWarp / 2; n > 0; n /= 2) x += __shfl_xor_sync(kAllLanes, x, n);
  return x;
}
QWENOPT_FN float warp_max(float x) {
#pragma unroll
  for (int n = kWarp / 2; n > 0; n /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, n));
  return x;
}
// The sum of the lanes up to this one.
QWENOPT_FN int warp_scan(int x) {
#pragma unroll
  for (int n = 1; n < kWarp; n *= 2) {
    const int below = __shfl_up_sync(kAllLanes, x, n);
    if (lane_id() >= n) x += below;
  }
  return x;
}

// d += a * b of a warp: a [16, 16], b [16, 8] of bfloat16, d [16, 8] of float. With r = lane / 4 and c = lane % 4 * 2 a
// lane holds of a the pairs (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8), of b the pairs of rows (c, r), (c + 8, r),
// and of d (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1).
QWENOPT_FN void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(QWENOPT_EMULATE)
  emulate::mma(d, a, b0, b1);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

QWENOPT_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
QWENOPT_FN int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
QWENOPT_FN int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace qwenopt
