// Kernels with the faults that the emulation must find: test_emulation.py.
#include "../../csrc/cuda/kernels/common.cuh"

namespace qwenopt {

struct FaultyArgs {
  int32_t* out;
};

struct Row {
  int32_t x[64];
};

// Reads what another thread writes, without a barrier between.
QWENOPT_FN void reversed(const FaultyArgs& a, bool barrier) {
  QWENOPT_SHARED(Row, row);
  row.x[threadIdx.x] = int32_t(threadIdx.x);
  if (barrier) __syncthreads();
  a.out[threadIdx.x] = row.x[63 - threadIdx.x];
}
QWENOPT_FN void half_a_barrier(const FaultyArgs& a) {
  if (threadIdx.x < 32) __syncthreads();
  a.out[0] = 1;
}
QWENOPT_FN void half_a_warp(const FaultyArgs& a) {
  if (threadIdx.x % 2 == 0) {
    a.out[0] = __shfl_xor_sync(kAllLanes, 1, 2);
  } else {
    a.out[1] = __shfl_xor_sync(kAllLanes, 1, 2);
  }
}
QWENOPT_FN void past_the_end(const FaultyArgs& a) {
  QWENOPT_SHARED(Row, row);
  row.x[threadIdx.x + 1] = 0;
}
QWENOPT_FN void a_write_before(const FaultyArgs& a) { a.out[-1] = 0; }
QWENOPT_FN void too_wide(const FaultyArgs& a) { a.out[0] = int32_t(load16(a.out + 1).w[0]); }
QWENOPT_FN void a_read_behind(const FaultyArgs& a) { a.out[threadIdx.x] = a.out[threadIdx.x + 1]; }
QWENOPT_FN void a_part_of_a_warp(const FaultyArgs& a) { a.out[0] = __shfl_xor_sync(0xffffu, 1, 2); }

QWENOPT_KERNEL(right, FaultyArgs, 64, reversed(a, true))
QWENOPT_KERNEL(no_barrier, FaultyArgs, 64, reversed(a, false))
QWENOPT_KERNEL(half_a_barrier_, FaultyArgs, 64, half_a_barrier(a))
QWENOPT_KERNEL(half_a_warp_, FaultyArgs, 64, half_a_warp(a))
QWENOPT_KERNEL(past_the_end_, FaultyArgs, 64, past_the_end(a))
QWENOPT_KERNEL(a_write_before_, FaultyArgs, 64, a_write_before(a))
QWENOPT_KERNEL(too_wide_, FaultyArgs, 64, too_wide(a))
QWENOPT_KERNEL(a_read_behind_, FaultyArgs, 64, a_read_behind(a))
QWENOPT_KERNEL(a_part_of_a_warp_, FaultyArgs, 64, a_part_of_a_warp(a))

}  // namespace qwenopt
