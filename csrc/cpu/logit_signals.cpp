// logit_signals: threads share the parts of all rows, meet, and add up the parts of each row in order.
#include "kernels/logit_signals.h"

#include <cmath>

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

float value_of(fp16 x) {
  const int exponent = x.bits >> 10 & 31, digits = x.bits & 1023;
  float size = std::ldexp(float(exponent ? 1024 + digits : digits), (exponent ? exponent : 1) - 25);
  if (exponent == 31) size = digits ? NAN : INFINITY;
  return x.bits >> 15 ? -size : size;
}

int64_t parts_of(int64_t V) { return (V + kSignalColumns - 1) / kSignalColumns; }

struct LogitSignalsStep {
  void (*kernel)(const LogitSignalsArgs&, int64_t, int64_t);
  LogitSignalsArgs args;
  int members;

  void run(const Team& team) {
    int64_t begin, end;
    team.share(args.R * args.P, members, &begin, &end);
    kernel(args, begin, end);
    if (members > 1) team.barrier();
    team.share(args.R, members, &begin, &end);
    for (int64_t row = begin; row < end; ++row) finish_row(row);
  }
  void finish() {}

 private:
  float logit(int64_t row, int64_t id) const {
    const int64_t at = row * args.stride + id;
    if (args.dtype == kFloat32) return static_cast<const float*>(args.logits)[at];
    if (args.dtype == kFloat16) return value_of(static_cast<const fp16*>(args.logits)[at]);
    const uint32_t bits = uint32_t(static_cast<const bf16*>(args.logits)[at].bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  void finish_row(int64_t row) const {
    const SignalPart *part = args.parts + row * args.P, *last = part + args.P;
    float top = -INFINITY;
    for (const SignalPart* p = part; p < last; ++p) {
      if (p->largest > top || std::isnan(p->largest)) top = p->largest;
      if (std::isnan(top)) break;
    }
    args.out[2 * row] = top - logit(row, args.end);
    args.out[2 * row + 1] = args.entropy ? entropy(part, last, top) : 0.0f;
  }

  // log(S) - T / S, S the sum of e^(x - top) and T that of e^(x - top) (x - top).
  static float entropy(const SignalPart* part, const SignalPart* last, float top) {
    if (!std::isfinite(top)) return NAN;  // as a softmax
    double sum = 0.0, weighted = 0.0;
    for (; part < last; ++part) {
      if (part->largest == -INFINITY) continue;
      const double shift = double(part->largest) - double(top), scale = std::exp(shift);
      sum += scale * part->sum;
      weighted += scale * (part->weighted + shift * part->sum);
    }
    return float(std::log(sum) - weighted / sum);
  }
};

LogitSignalsStep logit_signals_step(uintptr_t logits, uintptr_t out, uintptr_t scratch, int64_t R, int64_t V,
                                    int64_t end, int64_t stride, bool entropy, int dtype, int threads, int isa) {
  constexpr int64_t kGrain = 16 * 1024;  // columns that take about as long as a fork
  check_common("logit_signals", dtype, threads);
  check_size("logit_signals", "R", R);
  check_size("logit_signals", "V", V, 1);
  QWENOPT_CHECK(end >= 0 && end < V, "logit_signals: end ", end, " of ", V, " columns; it must be 0..", V - 1);
  if (R > 0) {
    check_pointer("logit_signals", "logits", logits);
    check_pointer("logit_signals", "out", out);
    check_pointer("logit_signals", "scratch", scratch);
  }
  const LogitSignalsArgs args{pointer(logits),
                              pointer<float>(out),
                              pointer<SignalPart>(scratch),
                              R,
                              V,
                              parts_of(V),
                              end,
                              stride,
                              entropy,
                              dtype};
  const int64_t useful = R * V / kGrain;
  return {QWENOPT_PICK(kernel_isa("logit_signals", isa, dtype), logit_signals), args,
          useful < 1         ? 1
          : useful < threads ? int(useful)
                             : threads};
}

int64_t logit_signals_scratch_bytes(int64_t R, int64_t V) { return R * parts_of(V) * int64_t(sizeof(SignalPart)); }

}  // namespace

void register_logit_signals(py::module_& m) {
  define_step<&logit_signals_step>(m, "logit_signals", "margin and entropy of each row", py::arg("logits"),
                                   py::arg("out"), py::arg("scratch"), py::arg("R"), py::arg("V"), py::arg("end"),
                                   py::arg("stride"), py::arg("entropy"), py::arg("dtype"), py::arg("threads"),
                                   py::arg("isa") = -1);
  m.def("logit_signals_scratch_bytes", &logit_signals_scratch_bytes, py::arg("R"), py::arg("V"));
}

}  // namespace qwenopt
