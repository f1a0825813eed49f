// add_rms_norm: the residual sum, and its rms_norm, in one pass.
#include "kernels/rms_norm.h"
#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

void add_rms_norm_py(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, uintptr_t sum, int64_t rows,
                     int64_t cols, int64_t x_stride, int64_t residual_stride, double eps, int dtype, int threads,
                     int isa) {
  check_common("add_rms_norm", dtype, threads);
  check_size("add_rms_norm", "rows", rows);
  check_size("add_rms_norm", "cols", cols, 1);
  const auto kernel = QWENOPT_PICK(resolve_isa("add_rms_norm", isa), add_rms_norm);
  if (rows == 0) return;
  check_pointer("add_rms_norm", "x", x);
  check_pointer("add_rms_norm", "residual", residual);
  check_pointer("add_rms_norm", "weight", weight);
  check_pointer("add_rms_norm", "out", out);
  check_pointer("add_rms_norm", "sum", sum);
  const RmsNormArgs args{pointer(x), pointer(residual), pointer(weight), pointer(out), pointer(sum), rows,
                         cols,       x_stride,          residual_stride, eps,          dtype};
  over_rows(rows, cols, threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void register_add_rms_norm(py::module_& m) {
  m.def("add_rms_norm", &add_rms_norm_py, "sum = residual + x; out = rms_norm(sum)", Release(), py::arg("x"),
        py::arg("residual"), py::arg("weight"), py::arg("out"), py::arg("sum"), py::arg("rows"), py::arg("cols"),
        py::arg("x_stride"), py::arg("residual_stride"), py::arg("eps"), py::arg("dtype"), py::arg("threads"),
        py::arg("isa") = -1);
}

}  // namespace qwenopt
