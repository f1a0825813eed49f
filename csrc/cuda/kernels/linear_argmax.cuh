// linear_argmax: where the largest result of each of up to 16 rows is; the results are not written anywhere.
#include "skinny.cuh"

namespace qwenopt {

struct LinearArgmaxArgs {
  LinearArgs linear;  // out is not used
  uint64_t* best;     // [16], zeros: the largest key of each row
  int64_t* done;      // [1], zero: blocks that are through
  int64_t* ids;       // [M]
};

// Larger for a larger value, and for the first of equal ones; a NaN, which rounding has made positive, is the largest
// of all, as for argmax. Never 0.
QWENOPT_FN uint64_t rank_key(float value, int64_t index) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 and 0 are equal
  const uint32_t order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(order) << 32 | (0xffffffffu - uint32_t(index));
}

// The largest of 16 neighbouring lanes.
QWENOPT_FN uint64_t row_max(uint64_t key) {
#pragma unroll
  for (int n = kTileRows / 2; n > 0; n /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, key, n);
    key = other > key ? other : key;
  }
  return key;
}

struct LastBlock {
  bool is;
};

template <int TILES>
QWENOPT_FN void linear_argmax(const LinearArgmaxArgs& a) {
  using Sums = SkinnySums<TILES>;
  QWENOPT_SHARED(Sums, sums);
  QWENOPT_SHARED(LastBlock, last);
  const LinearArgs& l = a.linear;
  const int row = int(threadIdx.x) % kTileRows, token = int(threadIdx.x) / kTileRows;
  const bool mine = token < TILES * kTileTokens && token < l.M;
  uint64_t key = 0;
  for (int64_t row0 = int64_t(blockIdx.x) * kTileRows; row0 < l.N; row0 += int64_t(gridDim.x) * kTileRows) {
    skinny_tile<TILES>(l, row0, sums);
    if (mine && row0 + row < l.N) {
      const float value = skinny_result<TILES>(l, row0, sums, row, token);
      const uint64_t here = rank_key(value, row0 + row);
      key = here > key ? here : key;
    }
    __syncthreads();  // the sums are read before the next tile's are written
  }
  key = row_max(key);
  if (mine && row == 0) atomicMax(a.best + token, key);
  // The block that is last to get here sees the keys of all others.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last.is = atomicAdd(reinterpret_cast<uint64_t*>(a.done), uint64_t(1)) == uint64_t(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last.is) return;
  __threadfence();
  if (threadIdx.x < l.M) {
    const uint64_t best = atomicMax(a.best + threadIdx.x, uint64_t(0));
    a.ids[threadIdx.x] = int64_t(0xffffffffu - uint32_t(best));
  }
}

QWENOPT_KERNEL(linear_argmax_bfloat16_8, LinearArgmaxArgs, kSkinnyThreads, linear_argmax<1>(a))
QWENOPT_KERNEL(linear_argmax_bfloat16_16, LinearArgmaxArgs, kSkinnyThreads, linear_argmax<2>(a))

}  // namespace qwenopt
