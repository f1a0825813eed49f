// budget_step: thinking under control after sampling; budget_guard: what it changes in the logits before.
#pragma once

#include "types.h"

#include "../../cuda/kernels/budget_columns.cuh"

namespace qwenopt {

QWENOPT_DECLARE_KERNEL(void budget_step(const BudgetStepArgs& args, int64_t row0, int64_t row1))
QWENOPT_DECLARE_KERNEL(void budget_guard(const BudgetGuardArgs& args, int64_t row0, int64_t row1))

}  // namespace qwenopt
