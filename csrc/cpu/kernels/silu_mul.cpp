#include "silu_mul.h"

#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

template <class T>
void run(const SiluMulArgs& a, int64_t row0, int64_t row1) {
  for (int64_t r = row0; r < row1; ++r) {
    const T* gate = (const T*)a.gate + r * a.gate_stride;
    const T* up = (const T*)a.up + r * a.up_stride;
    T* out = (T*)a.out + r * a.cols;
    for (int64_t c = 0; c < a.cols; c += W) {
      const F g = load_upto(gate + c, a.cols - c), u = load_upto(up + c, a.cols - c);
      store_upto(out + c, mul(round_to<T>(silu(g)), u), a.cols - c);
    }
  }
}

}  // namespace

void silu_mul(const SiluMulArgs& a, int64_t row0, int64_t row1) {
  of_type(a.dtype, [&](auto type) { run<decltype(type)>(a, row0, row1); });
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
