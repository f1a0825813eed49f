// silu_mul: the gate of a SwiGLU block.
#include "kernels/silu_mul.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

RowsStep<SiluMulArgs> silu_mul_step(uintptr_t gate, uintptr_t up, uintptr_t out, int64_t rows, int64_t cols,
                                    int64_t gate_stride, int64_t up_stride, int dtype, int threads, int isa) {
  check_common("silu_mul", dtype, threads);
  check_size("silu_mul", "rows", rows);
  check_size("silu_mul", "cols", cols);
  const auto kernel = QWENOPT_PICK(kernel_isa("silu_mul", isa, dtype), silu_mul);
  if (rows > 0 && cols > 0) {
    check_pointer("silu_mul", "gate", gate);
    check_pointer("silu_mul", "up", up);
    check_pointer("silu_mul", "out", out);
  }
  const SiluMulArgs args{pointer(gate), pointer(up), pointer(out), rows, cols, gate_stride, up_stride, dtype};
  // One element costs about four of a norm: the exponential and the division.
  return {kernel, args, rows, 4 * cols, threads};
}

}  // namespace

void register_silu_mul(py::module_& m) {
  define_step<&silu_mul_step>(m, "silu_mul", "out = silu(gate) * up", py::arg("gate"), py::arg("up"), py::arg("out"),
                              py::arg("rows"), py::arg("cols"), py::arg("gate_stride"), py::arg("up_stride"),
                              py::arg("dtype"), py::arg("threads"), py::arg("isa") = -1);
}

}  // namespace qwenopt
