// linear: up to 16 rows of x times a row-major weight, which is read once.
#include "skinny.cuh"

namespace qwenopt {

constexpr int kDotThreads = 128;

// bfloat16 by matrix instructions; K a multiple of 8, rows aligned to 16 bytes. A block for 16 rows of the weight.
template <int TILES>
QWENOPT_FN void linear_tile(const LinearArgs& a) {
  using Sums = SkinnySums<TILES>;
  QWENOPT_SHARED(Sums, sums);
  const int64_t row0 = int64_t(blockIdx.x) * kTileRows;
  skinny_tile<TILES>(a, row0, sums);
  const int row = int(threadIdx.x) % kTileRows, token = int(threadIdx.x) / kTileRows;
  if (token >= TILES * kTileTokens || token >= a.M || row0 + row >= a.N) return;
  const float value = skinny_result<TILES>(a, row0, sums, row, token);
  static_cast<bf16*>(a.out)[token * a.out_stride + row0 + row] = from_float<bf16>(value);
}

// Any dtype, K and alignment: a warp for a row of the weight, ROWS rows of x at a time.
template <class T, int ROWS>
QWENOPT_FN void linear_dot(const LinearArgs& a) {
  constexpr int kRun = 16 / sizeof(T);
  const int64_t n = int64_t(blockIdx.x) * (kDotThreads / kWarp) + warp_id();
  if (n >= a.N) return;
  const T *weight = static_cast<const T*>(a.weight) + n * a.weight_stride, *x = static_cast<const T*>(a.x);
  float sums[ROWS] = {};
  for (int64_t k = lane_id() * kRun; k < a.K; k += kWarp * kRun) {
    float w[kRun], v[kRun];
    load_few(weight + k, a.K - k, w);
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      if (m < a.M) {
        load_few(x + m * a.x_stride + k, a.K - k, v);
#pragma unroll
        for (int i = 0; i < kRun; ++i) sums[m] = fmaf(w[i], v[i], sums[m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < ROWS; ++m) {
    if (m >= a.M) continue;
    float sum = warp_sum(sums[m]);
    if (a.bias != nullptr) sum += to_float(static_cast<const T*>(a.bias)[n]);
    if (lane_id() == 0) static_cast<T*>(a.out)[m * a.out_stride + n] = from_float<T>(sum);
  }
}

QWENOPT_KERNEL(linear_bfloat16_8, LinearArgs, kSkinnyThreads, linear_tile<1>(a))
QWENOPT_KERNEL(linear_bfloat16_16, LinearArgs, kSkinnyThreads, linear_tile<2>(a))
QWENOPT_KERNEL(linear_dot_float32_1, LinearArgs, kDotThreads, linear_dot<float, 1>(a))
QWENOPT_KERNEL(linear_dot_float32_4, LinearArgs, kDotThreads, linear_dot<float, 4>(a))
QWENOPT_KERNEL(linear_dot_float32_16, LinearArgs, kDotThreads, linear_dot<float, 16>(a))
QWENOPT_KERNEL(linear_dot_bfloat16_1, LinearArgs, kDotThreads, linear_dot<bf16, 1>(a))
QWENOPT_KERNEL(linear_dot_bfloat16_4, LinearArgs, kDotThreads, linear_dot<bf16, 4>(a))
QWENOPT_KERNEL(linear_dot_bfloat16_16, LinearArgs, kDotThreads, linear_dot<bf16, 16>(a))

}  // namespace qwenopt
