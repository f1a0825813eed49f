// The columns of the thinking state, and the arguments of budget_step and budget_guard, on CPUs and GPUs.
//
// Each column is explained in qwenopt/ops/budget_state.py. Whoever includes this has the integer types.
#pragma once

namespace qwenopt {

constexpr int kBudgetWidth = 128, kBudgetRing = 64, kBudgetMaxGrace = 3, kBudgetMaxImplicit = 4, kBudgetMaxEos = 4;
constexpr int kBudgetSignals = 3;

enum BudgetColumn : int {
  kPhase,
  kUsed,
  kGen,
  kCtrl,
  kNeed,
  kLast,
  kGrace,
  kPending,
  kFptr,
  kFlen,
  kFpos,
  kSince,
  kBudget,
  kWindowAt,
  kMin,
  kWait,
  kReserveAt,
  kBlock,
  kClose,
  kWhole,
  kBoundary,
  kBudgetText,
  kBudgetLen,
  kBudgetSkip,
  kExitText,
  kExitLen,
  kExitSkip,
  kImplicit,
  kGuard = kImplicit + kBudgetMaxImplicit,
  kMinAnswer,
  kSoftAt,
  kSoftWidth,
  kSoftBias,
  kReason,
  kExitStep,
  kThought,
  kForced,
  kBlocks,
  kAnswered,
  kMarkers,
  kMarginAt,
  kMarginTau,
  kMarginPatience,
  kMarginCount,
  kLoopAt,
  kLoopTimes,
  kLoopHash,
  kLoopNext,
  kLoopHits,
  kEntropyAt,
  kEntropyDelta,
  kEntropyEta,
  kEntropyAlpha,
  kEntropyAfter,
  kEntropyMean,
  kEntropyVar,
  kEntropyCount,
  kProbeAt,
  kProbeTau,
  kProbePatience,
  kProbeCount,
};
static_assert(kProbeCount + 1 + kBudgetRing == kBudgetWidth, "a column was lost");

enum BudgetPhase : int { kOff, kIdle, kThink, kInGrace, kForce, kAnswer, kDone };
enum BudgetReason : int {
  kNoReason,
  kNatural,
  kTool,
  kEosReason,
  kDisabled,
  kManual,
  kSpent,
  kReserve,
  kWindow,
  kMargin,
  kLoop,
  kEntropy,
  kProbe,
};
enum BudgetBit : int { kNewline = 1, kMissing = 48, kMissingShift = 4, kContinues = 64, kAny = 128 };
enum BudgetId : int { kNoId = -2, kStartId = 0, kEndId, kWaitId, kEosId = 4 };

struct BudgetStepArgs {
  const int64_t* sampled;  // [R]
  const float* signals;    // [R, 3]
  int32_t* state;          // [R, 128]
  const int32_t* forced;   // [R, L]
  const uint8_t* lut;      // [V]
  const int32_t* ids;      // [8]
  int64_t* out;            // [R]
  int64_t R, L, V;
};

struct BudgetGuardArgs {
  void* logits;  // [R, V], rows stride apart
  const int32_t* state;
  const int32_t* ids;
  int64_t R, V, stride;
  int dtype;
};

}  // namespace qwenopt
