// budget_step: thinking under control after sampling; budget_guard: what it changes in the logits before.
#include "kernels/budget_step.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

// By the first thread alone: a row costs less than a fork.
template <class Args>
struct SerialRowsStep {
  void (*kernel)(const Args&, int64_t, int64_t);
  Args args;
  int members = 1;

  void run(const Team& team) {
    if (team.id == 0) kernel(args, 0, args.R);
  }
  void finish() {}
};

SerialRowsStep<BudgetStepArgs> budget_step_step(uintptr_t sampled, uintptr_t signals, uintptr_t state, uintptr_t forced,
                                                uintptr_t lut, uintptr_t ids, uintptr_t out, int64_t R, int64_t L,
                                                int64_t V, int threads, int isa) {
  check_common("budget_step", kFloat32, threads);
  check_size("budget_step", "R", R);
  check_size("budget_step", "L", L, 1);
  check_size("budget_step", "V", V, 1);
  if (R > 0) {
    check_pointer("budget_step", "sampled", sampled);
    check_pointer("budget_step", "signals", signals);
    check_pointer("budget_step", "state", state);
    check_pointer("budget_step", "forced", forced);
    check_pointer("budget_step", "lut", lut);
    check_pointer("budget_step", "ids", ids);
    check_pointer("budget_step", "out", out);
  }
  const BudgetStepArgs args{pointer<const int64_t>(sampled),
                            pointer<const float>(signals),
                            pointer<int32_t>(state),
                            pointer<const int32_t>(forced),
                            pointer<const uint8_t>(lut),
                            pointer<const int32_t>(ids),
                            pointer<int64_t>(out),
                            R,
                            L,
                            V};
  return {QWENOPT_PICK(resolve_isa("budget_step", isa), budget_step), args};
}

SerialRowsStep<BudgetGuardArgs> budget_guard_step(uintptr_t logits, uintptr_t state, uintptr_t ids, int64_t R,
                                                  int64_t V, int64_t stride, int dtype, int threads, int isa) {
  check_common("budget_guard", dtype, threads);
  check_size("budget_guard", "R", R);
  check_size("budget_guard", "V", V, 1);
  if (R > 0) {
    check_pointer("budget_guard", "logits", logits);
    check_pointer("budget_guard", "state", state);
    check_pointer("budget_guard", "ids", ids);
  }
  const BudgetGuardArgs args{
      pointer(logits), pointer<const int32_t>(state), pointer<const int32_t>(ids), R, V, stride, dtype};
  return {QWENOPT_PICK(kernel_isa("budget_guard", isa, dtype), budget_guard), args};
}

}  // namespace

void register_budget_step(py::module_& m) {
  define_step<&budget_step_step>(m, "budget_step", "end the thinking of each row where it must end", py::arg("sampled"),
                                 py::arg("signals"), py::arg("state"), py::arg("forced"), py::arg("lut"),
                                 py::arg("ids"), py::arg("out"), py::arg("R"), py::arg("L"), py::arg("V"),
                                 py::arg("threads"), py::arg("isa") = -1);
  define_step<&budget_guard_step>(m, "budget_guard", "the logits that thinking control changes", py::arg("logits"),
                                  py::arg("state"), py::arg("ids"), py::arg("R"), py::arg("V"), py::arg("stride"),
                                  py::arg("dtype"), py::arg("threads"), py::arg("isa") = -1);
}

}  // namespace qwenopt
