// add_rms_norm: the residual sum, and its rms_norm, in one pass.
#include "kernels/rms_norm.h"
#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

RowsStep<RmsNormArgs> add_rms_norm_step(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, uintptr_t sum,
                                        int64_t rows, int64_t cols, int64_t x_stride, int64_t residual_stride,
                                        double eps, int dtype, int threads, int isa) {
  check_common("add_rms_norm", dtype, threads);
  check_size("add_rms_norm", "rows", rows);
  check_size("add_rms_norm", "cols", cols, 1);
  const auto kernel = QWENOPT_PICK(kernel_isa("add_rms_norm", isa, dtype), add_rms_norm);
  if (rows > 0) {
    check_pointer("add_rms_norm", "x", x);
    check_pointer("add_rms_norm", "residual", residual);
    check_pointer("add_rms_norm", "weight", weight);
    check_pointer("add_rms_norm", "out", out);
    check_pointer("add_rms_norm", "sum", sum);
  }
  const RmsNormArgs args{pointer(x), pointer(residual), pointer(weight), pointer(out), pointer(sum), rows,
                         cols,       x_stride,          residual_stride, eps,          dtype};
  return {kernel, args, rows, cols, threads};
}

}  // namespace

void register_add_rms_norm(py::module_& m) {
  define_step<&add_rms_norm_step>(m, "add_rms_norm", "sum = residual + x; out = rms_norm(sum)", py::arg("x"),
                                  py::arg("residual"), py::arg("weight"), py::arg("out"), py::arg("sum"),
                                  py::arg("rows"), py::arg("cols"), py::arg("x_stride"), py::arg("residual_stride"),
                                  py::arg("eps"), py::arg("dtype"), py::arg("threads"), py::arg("isa") = -1);
}

}  // namespace qwenopt
