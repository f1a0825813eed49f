// One row of budget_step and of budget_guard: the same text on CPUs (csrc/cpu/kernels/budget_step.cpp) and GPUs.
//
// Whoever includes this has QWENOPT_FN (how a function is declared), as_float, as_bits, to_float and from_float. A row
// at a time, branches and all: it is a few dozen instructions, and rows take different ways.
#pragma once

#include "budget_columns.cuh"

namespace qwenopt {
#if defined(QWENOPT_ISA_NS)
namespace QWENOPT_ISA_NS {
#endif

constexpr int64_t kHashFactor = 0x5BD1E995, kHashMask = 0x7FFFFFFF;

QWENOPT_FN bool one_of(int32_t token, const int32_t* ids, int count) {
  for (int i = 0; i < count; ++i) {
    if (ids[i] == token) return true;
  }
  return false;
}

QWENOPT_FN bool thinking(const int32_t* s) { return s[kPhase] == kThink || s[kPhase] == kInGrace; }
QWENOPT_FN bool at(const int32_t* s, int mask) { return (s[kLast] & s[mask]) != 0; }

// The rule whose columns begin at `rule`: mask, threshold, patience, count.
QWENOPT_FN bool patient(int32_t* s, int rule, bool hit, bool allowed) {
  if (!allowed || !at(s, rule)) return false;
  s[rule + 3] = hit ? s[rule + 3] + 1 : 0;
  return s[rule + 3] >= s[rule + 2];
}

QWENOPT_FN bool plateau(int32_t* s, float entropy, bool allowed) {
  if (!allowed || !at(s, kEntropyAt)) return false;
  const bool first = s[kEntropyCount] == 0;
  const float alpha = as_float(s[kEntropyAlpha]), rest = 1.0f - alpha;
  const float mean = first ? entropy : alpha * entropy + rest * as_float(s[kEntropyMean]);
  const float off = entropy - mean;
  const float var = first ? 0.0f : alpha * (off * off) + rest * as_float(s[kEntropyVar]);
  s[kEntropyMean] = as_bits(mean);
  s[kEntropyVar] = as_bits(var);
  s[kEntropyCount] += 1;
  return var < as_float(s[kEntropyDelta]) && mean < as_float(s[kEntropyEta]) && s[kEntropyCount] >= s[kEntropyAfter];
}

// Why the block must end now; 0 where it need not. Counts the boundaries of the rules, whichever wins.
QWENOPT_FN int32_t find_reason(int32_t* s, const float* signals) {
  if (!thinking(s)) return kNoReason;
  const bool allowed = s[kPhase] == kThink && s[kUsed] >= s[kMin] && s[kUsed] >= 1;
  const bool margin = patient(s, kMarginAt, signals[0] <= as_float(s[kMarginTau]), allowed);
  const bool loop = allowed && at(s, kLoopAt) && s[kLoopHits] >= s[kLoopTimes];
  const bool entropy = plateau(s, signals[1], allowed);
  const bool probe = patient(s, kProbeAt, signals[2] > as_float(s[kProbeTau]), allowed);
  if (s[kPhase] == kInGrace) return s[kPending];
  if (s[kCtrl] != 0) return kManual;
  if (s[kBudget] >= 0 && s[kUsed] >= s[kBudget]) return s[kBudget] == 0 ? kDisabled : kSpent;
  if (s[kReserveAt] >= 0 && s[kGen] >= s[kReserveAt]) return kReserve;
  if (allowed && s[kWindowAt] >= 0 && s[kUsed] >= s[kWindowAt] && at(s, kBoundary)) return kWindow;
  return margin ? kMargin : loop ? kLoop : entropy ? kEntropy : probe ? kProbe : kNoReason;
}

QWENOPT_FN void begin_text(int32_t* s, int32_t reason) {
  const bool of_budget = reason == kDisabled || (reason >= kSpent && reason <= kWindow);
  s[kFptr] = of_budget ? s[kBudgetText] : s[kExitText];
  s[kFlen] = of_budget ? s[kBudgetLen] : s[kExitLen];
  s[kFpos] = (of_budget ? s[kBudgetSkip] : s[kExitSkip]) & (s[kLast] & kNewline);
  s[kReason] = reason;
  s[kExitStep] = s[kGen];
  s[kPhase] = kForce;
  s[kSince] = 0;
  s[kCtrl] = 0;
}

QWENOPT_FN void end_block(int32_t* s, int32_t reason, int32_t phase) {
  s[kReason] = reason;
  s[kExitStep] = s[kGen];
  s[kCtrl] = 0;
  s[kSince] = -1;
  s[kPhase] = phase;
}

QWENOPT_FN void open_block(int32_t* s) {
  s[kPhase] = kThink;
  s[kMarkers] += 1;
  s[kBlocks] += 1;
  s[kSince] = -1;
  if (s[kBlock] == 1) s[kUsed] = 0;
  const int counts[] = {kGrace, kPending, kMarginCount, kLoopHits, kEntropyCount, kProbeCount};
  for (int column : counts) s[column] = 0;
}

// What the look-up table says of the token, and the loop rule's memory.
QWENOPT_FN void notice(int32_t* s, int32_t bits, int32_t token, bool thought) {
  const int32_t number = (bits & kMissing) >> kMissingShift, lacking = s[kNeed] - number;
  s[kNeed] = bits & kContinues ? (lacking > 0 ? lacking : 0) : number;
  s[kLast] = bits;
  if (!thought) return;
  const int64_t own = int64_t(token) * kHashFactor & kHashMask;
  s[kLoopHash] = int32_t((int64_t(s[kLoopHash]) * 4 + own) & kHashMask);
  if (!at(s, kLoopAt)) return;
  int32_t* ring = s + kBudgetWidth - kBudgetRing;
  ring[s[kLoopNext] & (kBudgetRing - 1)] = s[kLoopHash];
  s[kLoopNext] = (s[kLoopNext] + 1) % kBudgetRing;
  s[kLoopHits] = 0;
  for (int i = 0; i < kBudgetRing; ++i) s[kLoopHits] += ring[i] == s[kLoopHash];
}

// A token that the model may write: the marker that ends a block, one inside a block, or one outside.
QWENOPT_FN bool follow(int32_t* s, int32_t token, const int32_t* ids, bool is_end, bool is_tool, bool is_eos) {
  if (thinking(s)) {
    if (is_end) {
      s[kMarkers] += 1;
      end_block(s, kNatural, kAnswer);
    } else if (is_tool) {
      s[kAnswered] += 1;
      end_block(s, kTool, kAnswer);
    } else if (is_eos) {
      s[kMarkers] += 1;
      end_block(s, kEosReason, kDone);
    } else {
      s[kThought] += 1;
      s[kUsed] += 1;
      return true;
    }
  } else if (token == ids[kStartId]) {
    open_block(s);
  } else {
    s[kAnswered] += 1;
    if (s[kPhase] == kAnswer && s[kSince] >= 0) s[kSince] += 1;
    if (is_eos) s[kPhase] = kDone;
  }
  return false;
}

// One row: `s` is its state, wherever that lies.
QWENOPT_FN int64_t step_row(const BudgetStepArgs& a, int64_t r, int32_t* s) {
  if (s[kPhase] == kOff || s[kPhase] == kDone || a.sampled[r] == kNoId) return int32_t(a.sampled[r]);
  int32_t token = int32_t(a.sampled[r]);
  bool is_end = token == a.ids[kEndId];
  const bool is_tool = one_of(token, s + kImplicit, kBudgetMaxImplicit);
  const bool is_eos = one_of(token, a.ids + kEosId, kBudgetMaxEos);
  const int32_t reason = find_reason(s, a.signals + r * kBudgetSignals);
  if (thinking(s)) {
    if (is_end) {
      if (reason == 0 && s[kUsed] < s[kMin] && s[kWait] == 1) {
        token = a.ids[kWaitId];
        is_end = false;
      }
    } else if (!is_tool && reason != 0) {
      if (s[kWhole] == 1 && s[kNeed] > 0 && s[kGrace] < kBudgetMaxGrace && !is_eos) {
        s[kPhase] = kInGrace;
        s[kPending] = reason;
        s[kGrace] += 1;
      } else {
        begin_text(s, reason);
      }
    } else if (!is_tool && is_eos && s[kClose] == 1) {
      begin_text(s, kEosReason);
    }
  }
  bool thought = false;
  if (s[kPhase] == kForce) {
    int64_t place = int64_t(s[kFptr]) + s[kFpos];
    place = place < 0 ? 0 : place < a.L ? place : a.L - 1;
    token = a.forced[r * a.L + place];
    s[kFpos] += 1;
    s[kForced] += 1;
    if (s[kFpos] >= s[kFlen]) s[kPhase] = kAnswer;
  } else {
    thought = follow(s, token, a.ids, is_end, is_tool, is_eos);
  }
  notice(s, token >= 0 && token < a.V ? a.lut[token] : kAny, token, thought);
  s[kGen] += 1;
  return token;
}

template <class T>
QWENOPT_FN void guard_row(const BudgetGuardArgs& a, int64_t r) {
  const int32_t* s = a.state + r * kBudgetWidth;
  T* logits = (T*)a.logits + r * a.stride;
  const auto known = [&](int32_t id) { return id >= 0 && id < a.V; };
  const auto hide = [&](int32_t id) {
    if (known(id)) logits[id] = from_float<T>(as_float(int32_t(0xff800000u)));
  };
  const int32_t end = a.ids[kEndId];
  if (s[kPhase] == kThink) {
    const float bias = as_float(s[kSoftBias]);
    const bool here = s[kBoundary] == kAny ? s[kNeed] == 0 : at(s, kBoundary);
    if (bias > 0.0f && here && known(end)) {
      float ramp = float(s[kUsed] - s[kSoftAt]) / float(s[kSoftWidth] > 1 ? s[kSoftWidth] : 1);
      ramp = ramp < 0.0f ? 0.0f : ramp > 1.0f ? 1.0f : ramp;
      ramp = bias * (ramp * ramp);
      if (ramp > 0.0f) logits[end] = from_float<T>(to_float(logits[end]) + ramp);
    }
    if (s[kUsed] < s[kMin] && s[kWait] == 0) hide(end);
  } else if (s[kPhase] == kAnswer && s[kSince] >= 0) {
    if (s[kSince] < s[kGuard]) {
      hide(a.ids[kStartId]);
      hide(end);
    }
    if (s[kSince] < s[kMinAnswer]) {
      for (int i = 0; i < kBudgetMaxEos; ++i) hide(a.ids[kEosId + i]);
    }
  }
}

#if defined(QWENOPT_ISA_NS)
}  // namespace QWENOPT_ISA_NS
#endif
}  // namespace qwenopt
