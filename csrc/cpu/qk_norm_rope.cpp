// qk_norm_rope: the head norms of queries and keys and their rotation, in one pass.
#include "kernels/qk_norm_rope.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

RowsStep<QkNormRopeArgs> qk_norm_rope_step(uintptr_t q, uintptr_t k, uintptr_t q_weight, uintptr_t k_weight,
                                           uintptr_t cos, uintptr_t sin, uintptr_t q_out, uintptr_t k_out, int64_t B,
                                           int64_t S, int64_t H, int64_t G, int64_t D, int64_t q_sb, int64_t q_ss,
                                           int64_t q_sh, int64_t k_sb, int64_t k_ss, int64_t k_sh, int64_t cos_sb,
                                           int64_t cos_ss, double eps, int dtype, int threads, int isa) {
  const char* op = "qk_norm_rope";
  check_common(op, dtype, threads);
  check_size(op, "B", B);
  check_size(op, "S", S);
  check_size(op, "H", H);
  check_size(op, "G", G);
  QWENOPT_CHECK(D >= 2 && D % 2 == 0, op, ": head size ", D, "; it must be even and at least 2");
  const auto kernel = QWENOPT_PICK(kernel_isa(op, isa, dtype), qk_norm_rope);
  const bool some = B * S > 0;
  if (some && H > 0) {
    check_pointer(op, "q", q);
    check_pointer(op, "q_weight", q_weight);
    check_pointer(op, "q_out", q_out);
  }
  if (some && G > 0) {
    check_pointer(op, "k", k);
    check_pointer(op, "k_weight", k_weight);
    check_pointer(op, "k_out", k_out);
  }
  if (some && H + G > 0) {
    check_pointer(op, "cos", cos);
    check_pointer(op, "sin", sin);
  }
  const QkNormRopeArgs args{pointer(q),
                            pointer(k),
                            pointer(q_weight),
                            pointer(k_weight),
                            pointer(cos),
                            pointer(sin),
                            pointer(q_out),
                            pointer(k_out),
                            B,
                            S,
                            H,
                            G,
                            D,
                            q_sb,
                            q_ss,
                            q_sh,
                            k_sb,
                            k_ss,
                            k_sh,
                            cos_sb,
                            cos_ss,
                            eps,
                            dtype};
  return {kernel, args, B * S, (H + G) * D, threads};
}

}  // namespace

void register_qk_norm_rope(py::module_& m) {
  define_step<&qk_norm_rope_step>(
      m, "qk_norm_rope", "rms_norm of each query and key head, then rotary embedding", py::arg("q"), py::arg("k"),
      py::arg("q_weight"), py::arg("k_weight"), py::arg("cos"), py::arg("sin"), py::arg("q_out"), py::arg("k_out"),
      py::arg("B"), py::arg("S"), py::arg("H"), py::arg("G"), py::arg("D"), py::arg("q_sb"), py::arg("q_ss"),
      py::arg("q_sh"), py::arg("k_sb"), py::arg("k_ss"), py::arg("k_sh"), py::arg("cos_sb"), py::arg("cos_ss"),
      py::arg("eps"), py::arg("dtype"), py::arg("threads"), py::arg("isa") = -1);
}

}  // namespace qwenopt
