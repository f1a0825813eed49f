// Rows of a warp: a few neighbouring values for each lane, in one access where the address allows it.
#pragma once

#include "common.cuh"

namespace qwenopt {

template <int N>
struct alignas(4 * N) WordsOf {
  uint32_t w[N];
};

template <class To>
QWENOPT_FN bool aligned_for(const void* address) {
  return reinterpret_cast<uint64_t>(address) % alignof(To) == 0;
}

// x[0..N) from the first `count` elements at `from`, zeros behind them.
template <int N>
QWENOPT_FN void load_few(const float* from, int64_t count, float (&x)[N]) {
  using Part = WordsOf < N<4 ? N : 4>;
  constexpr int kPart = sizeof(Part) / sizeof(float);
  if (count >= N && aligned_for<Part>(from)) {
#pragma unroll
    for (int i = 0; i < N; i += kPart) {
      const Part part = *reinterpret_cast<const Part*>(from + i);
#pragma unroll
      for (int j = 0; j < kPart; ++j) x[i + j] = __uint_as_float(part.w[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = i < count ? from[i] : 0.0f;
}

template <int N>
QWENOPT_FN void load_few(const bf16* from, int64_t count, float (&x)[N]) {
  if constexpr (N % 2 == 0) {
    using Part = WordsOf<N / 2>;
    if (count >= N && aligned_for<Part>(from)) {
      const Part part = *reinterpret_cast<const Part*>(from);
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        x[i] = low_half(part.w[i / 2]);
        x[i + 1] = high_half(part.w[i / 2]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = i < count ? to_float(from[i]) : 0.0f;
}

// The first `count` of x[0..N) to `to`, rounded.
template <int N>
QWENOPT_FN void store_few(const float (&x)[N], float* to, int64_t count) {
  using Part = WordsOf < N<4 ? N : 4>;
  constexpr int kPart = sizeof(Part) / sizeof(float);
  if (count >= N && aligned_for<Part>(to)) {
#pragma unroll
    for (int i = 0; i < N; i += kPart) {
      Part part;
#pragma unroll
      for (int j = 0; j < kPart; ++j) part.w[j] = __float_as_uint(x[i + j]);
      *reinterpret_cast<Part*>(to + i) = part;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) to[i] = x[i];
  }
}

template <int N>
QWENOPT_FN void store_few(const float (&x)[N], bf16* to, int64_t count) {
  if constexpr (N % 2 == 0) {
    using Part = WordsOf<N / 2>;
    if (count >= N && aligned_for<Part>(to)) {
      Part part;
#pragma unroll
      for (int i = 0; i < N; i += 2) part.w[i / 2] = bf16_pair(x[i], x[i + 1]);
      *reinterpret_cast<Part*>(to) = part;
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) to[i] = from_float<bf16>(x[i]);
  }
}

// Codes: x holds whole numbers of -127..127.
template <int N>
QWENOPT_FN void store_few(const float (&x)[N], int8_t* to, int64_t count) {
  if constexpr (N % 4 == 0) {
    using Part = WordsOf<N / 4>;
    if (count >= N && aligned_for<Part>(to)) {
      Part part;
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) word |= uint32_t(uint8_t(int8_t(int(x[i + j])))) << 8 * j;
        part.w[i / 4] = word;
      }
      *reinterpret_cast<Part*>(to) = part;
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) to[i] = int8_t(int(x[i]));
  }
}

}  // namespace qwenopt
