// linear: a few rows times a row-major weight matrix, at the speed of reading the weights once.
#include "kernels/linear.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

// Work is handed out in runs of whole rows of about this much weight: long enough to be one forward stream, short
// enough that a thread that is held up does not keep the others waiting.
constexpr int64_t kRunBytes = 1 << 20;
constexpr int64_t kSerialBytes = 128 << 10;  // read by one thread in about the time of a fork

void run_linear(const LinearArgs& args, int threads, int isa) {
  if (args.M == 0) return;
  const auto kernel = QWENOPT_PICK(isa, linear);
  const int64_t bytes = args.N * args.K * dtype_bytes(args.dtype);
  if (bytes * args.M <= kSerialBytes) threads = 1;
  int64_t runs = bytes / kRunBytes;
  if (runs < threads) runs = threads;
  // A few runs are an equal number for each thread; with many the counter evens them out.
  if (runs < 8 * threads) runs = (runs + threads - 1) / threads * threads;
  // Multiples of 16 columns, so that no two threads write one cache line.
  const int64_t cols = ((args.N + runs - 1) / runs + 15) / 16 * 16;
  std::atomic<int64_t> next{0};
  in_team(threads, [&](const Team&) {
    for (;;) {
      const int64_t n0 = next.fetch_add(cols, std::memory_order_relaxed);
      if (n0 >= args.N) return;
      kernel(args, n0, n0 + cols < args.N ? n0 + cols : args.N);
    }
  });
}

void linear_py(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t M, int64_t N, int64_t K,
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
  run_linear(
      {pointer(x), pointer(weight), pointer(bias), pointer(out), M, N, K, x_stride, weight_stride, out_stride, dtype},
      threads, isa);
}

}  // namespace

void register_linear(py::module_& m) {
  m.def("linear", &linear_py, "out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]", Release(), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("M"), py::arg("N"), py::arg("K"),
        py::arg("x_stride"), py::arg("weight_stride"), py::arg("out_stride"), py::arg("dtype"), py::arg("threads"),
        py::arg("isa") = -1);
}

}  // namespace qwenopt
