// The rows of budget_step and budget_guard, one after another; what happens in one is common to CPUs and GPUs.
#include "budget_step.h"

#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

static inline float as_float(int32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline int32_t as_bits(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt

#define QWENOPT_FN static inline
#include "../../cuda/kernels/budget_row.cuh"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

void budget_step(const BudgetStepArgs& a, int64_t row0, int64_t row1) {
  for (int64_t r = row0; r < row1; ++r) a.out[r] = step_row(a, r, a.state + r * kBudgetWidth);
}

void budget_guard(const BudgetGuardArgs& a, int64_t row0, int64_t row1) {
  for (int64_t r = row0; r < row1; ++r) {
    of_type(a.dtype, [&](auto type) { guard_row<decltype(type)>(a, r); });
  }
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
