#include "rms_norm.h"

#include "norm_row.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

template <class T>
void run(const RmsNormArgs& a, int64_t row0, int64_t row1) {
  for (int64_t r = row0; r < row1; ++r) {
    norm_row<T>((const T*)a.x + r * a.x_stride, (const T*)a.weight, (T*)a.out + r * a.cols, a.cols, float(a.eps));
  }
}

template <class T>
void run_add(const RmsNormArgs& a, int64_t row0, int64_t row1) {
  for (int64_t r = row0; r < row1; ++r) {
    const T* x = (const T*)a.x + r * a.x_stride;
    const T* residual = (const T*)a.residual + r * a.residual_stride;
    T* sum = (T*)a.sum + r * a.cols;
    for (int64_t c = 0; c < a.cols; c += W) {
      store_upto(sum + c, add(load_upto(residual + c, a.cols - c), load_upto(x + c, a.cols - c)), a.cols - c);
    }
    norm_row<T>(sum, (const T*)a.weight, (T*)a.out + r * a.cols, a.cols, float(a.eps));
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& a, int64_t row0, int64_t row1) {
  of_type(a.dtype, [&](auto type) { run<decltype(type)>(a, row0, row1); });
}

void add_rms_norm(const RmsNormArgs& a, int64_t row0, int64_t row1) {
  of_type(a.dtype, [&](auto type) { run_add<decltype(type)>(a, row0, row1); });
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
