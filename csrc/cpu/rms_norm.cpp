// rms_norm: each row over its root mean square, times a weight.
#include "kernels/rms_norm.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

RowsStep<RmsNormArgs> rms_norm_step(uintptr_t x, uintptr_t weight, uintptr_t out, int64_t rows, int64_t cols,
                                    int64_t x_stride, double eps, int dtype, int threads, int isa) {
  check_common("rms_norm", dtype, threads);
  check_size("rms_norm", "rows", rows);
  check_size("rms_norm", "cols", cols, 1);
  const auto kernel = QWENOPT_PICK(kernel_isa("rms_norm", isa, dtype), rms_norm);
  if (rows > 0) {
    check_pointer("rms_norm", "x", x);
    check_pointer("rms_norm", "weight", weight);
    check_pointer("rms_norm", "out", out);
  }
  const RmsNormArgs args{pointer(x), nullptr, pointer(weight), pointer(out), nullptr, rows, cols, x_stride, 0,
                         eps,        dtype};
  return {kernel, args, rows, cols, threads};
}

}  // namespace

void register_rms_norm(py::module_& m) {
  define_step<&rms_norm_step>(m, "rms_norm", "out = weight * round(x / rms(x))", py::arg("x"), py::arg("weight"),
                              py::arg("out"), py::arg("rows"), py::arg("cols"), py::arg("x_stride"), py::arg("eps"),
                              py::arg("dtype"), py::arg("threads"), py::arg("isa") = -1);
}

}  // namespace qwenopt
