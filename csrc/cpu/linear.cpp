// linear: a few rows times a row-major weight matrix, at the speed of reading the weights once.
#include "kernels/linear.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

// Work is handed out in runs of whole rows that get shorter towards the end, so that each thread reads a long forward
// stream and all of them end together: the last runs are of about this much weight, some microseconds.
constexpr int64_t kLastRunBytes = 64 << 10;
constexpr int64_t kSerialBytes = 128 << 10;  // read by one thread in about the time of a fork

struct LinearStep {
  void (*kernel)(const LinearArgs&, int64_t, int64_t);
  LinearArgs args;
  int64_t grain;
  int members;
  Counter counter;

  LinearStep(const LinearArgs& args, int threads, int isa)
      : kernel(QWENOPT_PICK(isa, linear)), args(args), members(threads) {
    const int64_t row_bytes = args.K * dtype_bytes(args.dtype);
    if (args.N * row_bytes * args.M <= kSerialBytes) members = 1;
    // Multiples of 16 columns, so that no two threads write one cache line.
    grain = row_bytes > 0 ? (kLastRunBytes / row_bytes + 15) / 16 * 16 : args.N;
    if (grain < 16) grain = 16;
  }

  void run(const Team& team) {
    if (args.M == 0 || team.id >= members) return;
    int64_t n0, n1;
    while (counter.take_run(args.N, grain, members, &n0, &n1)) kernel(args, n0, n1);
  }
  void finish() {}
};

LinearStep linear_step(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t M, int64_t N, int64_t K,
                       int64_t x_stride, int64_t weight_stride, int64_t out_stride, int dtype, int threads, int isa) {
  check_common("linear", dtype, threads);
  check_size("linear", "M", M);
  check_size("linear", "N", N, 1);
  check_size("linear", "K", K);
  check_size("linear", "weight_stride", weight_stride, K);
  isa = resolve_isa("linear", isa);
  if (M > 0) {
    check_pointer("linear", "out", out);
    if (K > 0) check_pointer("linear", "x", x);
    if (K > 0) check_pointer("linear", "weight", weight);
  }
  return {{pointer(x), pointer(weight), pointer(bias), pointer(out), M, N, K, x_stride, weight_stride, out_stride, dtype},
          threads, isa};
}

}  // namespace

void register_linear(py::module_& m) {
  define_step<&linear_step>(m, "linear", "out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]", py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("M"), py::arg("N"), py::arg("K"),
        py::arg("x_stride"), py::arg("weight_stride"), py::arg("out_stride"), py::arg("dtype"), py::arg("threads"),
        py::arg("isa") = -1);
}

}  // namespace qwenopt
