// moe_route: from router logits to expert ids and weights.
#include "kernels/moe_route.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

RowsStep<MoeRouteArgs> moe_route_step(uintptr_t logits, uintptr_t weights_out, uintptr_t indices_out, int64_t T,
                                      int64_t E, int64_t K, int64_t logits_stride, bool norm, int dtype, int threads,
                                      int isa) {
  check_common("moe_route", dtype, threads);
  check_size("moe_route", "T", T);
  QWENOPT_CHECK(E >= 1 && E <= kMaxRouteExperts, "moe_route: ", E, " experts; it must be 1..", kMaxRouteExperts);
  QWENOPT_CHECK(K >= 1 && K <= E, "moe_route: top ", K, " of ", E, " experts; top_k must be 1..", E);
  const auto kernel = QWENOPT_PICK(kernel_isa("moe_route", isa, dtype), moe_route);
  if (T > 0) {
    check_pointer("moe_route", "logits", logits);
    check_pointer("moe_route", "weights_out", weights_out);
    check_pointer("moe_route", "indices_out", indices_out);
  }
  const MoeRouteArgs args{
      pointer(logits), pointer(weights_out), pointer<int64_t>(indices_out), T, E, K, logits_stride, norm, dtype};
  return {kernel, args, T, E * (K + 4), threads};
}

}  // namespace

void register_moe_route(py::module_& m) {
  define_step<&moe_route_step>(m, "moe_route", "softmax over the experts, then the k largest", py::arg("logits"),
                               py::arg("weights_out"), py::arg("indices_out"), py::arg("T"), py::arg("E"), py::arg("K"),
                               py::arg("logits_stride"), py::arg("norm"), py::arg("dtype"), py::arg("threads"),
                               py::arg("isa") = -1);
}

}  // namespace qwenopt
