// top_tokens: threads share the columns of all rows, meet, and merge what each has found.
#include "kernels/top_tokens.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

// A fork costs what one thread needs for about as many columns.
constexpr int64_t kTopTokensGrain = 32 * 1024;

int top_tokens_members(int64_t R, int64_t V, int threads) {
  const int64_t useful = R * V / kTopTokensGrain;
  return useful < 1 ? 1 : useful < threads ? int(useful) : threads;
}

struct TopTokensStep {
  void (*scan)(const TopTokensArgs&, int, int);
  void (*merge)(const TopTokensArgs&, int64_t, int64_t, int);
  TopTokensArgs args;
  int members;

  void run(const Team& team) {
    const int shares = members < team.size ? members : team.size;
    if (args.R > 0 && team.id < shares) scan(args, team.id, shares);
    if (shares > 1) team.barrier();
    int64_t begin, end;
    team.share(args.R, shares, &begin, &end);
    merge(args, begin, end, shares);
  }
  void finish() {}
};

TopTokensStep top_tokens_step(uintptr_t logits, uintptr_t values, uintptr_t ids, uintptr_t scratch, int64_t R,
                              int64_t V, int64_t K, int64_t stride, int dtype, int threads, int isa) {
  check_common("top_tokens", dtype, threads);
  check_size("top_tokens", "R", R);
  QWENOPT_CHECK(V >= 1 && V <= INT32_MAX, "top_tokens: V is ", V, "; it must be 1..", INT32_MAX);
  QWENOPT_CHECK(K >= 1 && K <= V && K <= kMaxTopTokens, "top_tokens: K is ", K, "; it must be 1..",
                V < kMaxTopTokens ? V : kMaxTopTokens);
  if (R > 0) {
    check_pointer("top_tokens", "logits", logits);
    check_pointer("top_tokens", "values", values);
    check_pointer("top_tokens", "ids", ids);
    check_pointer("top_tokens", "scratch", scratch);
  }
  const TopTokensArgs args{
      pointer(logits), pointer(values), pointer<int64_t>(ids), pointer<uint64_t>(scratch), R, V, K, stride, dtype};
  const int best = kernel_isa("top_tokens", isa, dtype);
  return {QWENOPT_PICK(best, top_tokens_scan), QWENOPT_PICK(best, top_tokens_merge), args,
          top_tokens_members(R, V, threads)};
}

int64_t top_tokens_scratch_bytes(int64_t R, int64_t V, int64_t K, int threads) {
  return (R + top_tokens_members(R, V, threads)) * 2 * K * int64_t(sizeof(uint64_t));
}

}  // namespace

void register_top_tokens(py::module_& m) {
  define_step<&top_tokens_step>(m, "top_tokens", "the K largest of each row, ties to the lower id", py::arg("logits"),
                                py::arg("values"), py::arg("ids"), py::arg("scratch"), py::arg("R"), py::arg("V"),
                                py::arg("K"), py::arg("stride"), py::arg("dtype"), py::arg("threads"),
                                py::arg("isa") = -1);
  m.def("top_tokens_scratch_bytes", &top_tokens_scratch_bytes, py::arg("R"), py::arg("V"), py::arg("K"),
        py::arg("threads"));
}

}  // namespace qwenopt
