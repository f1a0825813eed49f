// budget_step: thinking under control after sampling; budget_guard: what it changes in the logits before.
#include "common.cuh"

#include "budget_row.cuh"

namespace qwenopt {

struct BudgetRow {
  int32_t columns[kBudgetWidth];
};

// A warp for a row: its state comes and goes in whole lines, and one lane walks through it in shared memory.
QWENOPT_FN void budget_step_rows(const BudgetStepArgs& a) {
  QWENOPT_SHARED(BudgetRow, row);
  const int64_t r = blockIdx.x;
  int32_t* state = a.state + r * kBudgetWidth;
  for (int i = lane_id(); i < kBudgetWidth; i += kWarp) row.columns[i] = state[i];
  __syncwarp();
  if (lane_id() == 0) a.out[r] = step_row(a, r, row.columns);
  __syncwarp();
  for (int i = lane_id(); i < kBudgetWidth; i += kWarp) state[i] = row.columns[i];
}

template <class T>
QWENOPT_FN void budget_guard_rows(const BudgetGuardArgs& a) {
  const int64_t r = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  if (r < a.R) guard_row<T>(a, r);
}

QWENOPT_KERNEL(budget_step, BudgetStepArgs, kWarp, budget_step_rows(a))
QWENOPT_KERNEL(budget_guard_float32, BudgetGuardArgs, kWarp, budget_guard_rows<float>(a))
QWENOPT_KERNEL(budget_guard_bfloat16, BudgetGuardArgs, kWarp, budget_guard_rows<bf16>(a))

}  // namespace qwenopt
