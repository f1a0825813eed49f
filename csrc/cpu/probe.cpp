// read_bandwidth and peak_bf16: what this machine can do at best, measured with the same threads as the kernels.
#include "kernels/probe.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

uint64_t read_bandwidth_py(uintptr_t data, int64_t bytes, int threads, int isa) {
  check_common("read_bandwidth", kFloat32, threads);
  check_size("read_bandwidth", "bytes", bytes);
  if (bytes >= 8) check_pointer("read_bandwidth", "ptr", data);
  const auto kernel = QWENOPT_PICK(resolve_isa("read_bandwidth", isa), read_all);
  constexpr int64_t kRunWords = (1 << 20) / 8;
  const int64_t words = bytes / 8;
  std::atomic<int64_t> next{0};
  std::atomic<uint64_t> sum{0};
  in_team(threads, [&](const Team&) {
    uint64_t mine = 0;
    for (;;) {
      const int64_t begin = next.fetch_add(kRunWords, std::memory_order_relaxed);
      if (begin >= words) break;
      mine += kernel(pointer<const uint64_t>(data), begin, begin + kRunWords < words ? begin + kRunWords : words);
    }
    sum += mine;
  });
  return sum;
}

double peak_bf16_py(int threads, int64_t iterations, int isa) {
  check_common("peak_bf16", kFloat32, threads);
  const auto kernel = QWENOPT_PICK(resolve_isa("peak_bf16", isa), multiply_registers);
  std::atomic<int64_t> done{0};
  in_team(threads, [&](const Team&) {
    float sink;
    done += int64_t(kernel(iterations, &sink));
  });
  return double(done);
}

}  // namespace

void register_probe(py::module_& m) {
  m.def("read_bandwidth", &read_bandwidth_py, "Read every byte once; returns the sum of the 64-bit words",
        py::call_guard<py::gil_scoped_release>(), py::arg("ptr"), py::arg("bytes"), py::arg("threads"),
        py::arg("isa") = -1);
  m.def("peak_bf16", &peak_bf16_py, "Multiply from registers; returns the floating point operations done",
        py::call_guard<py::gil_scoped_release>(), py::arg("threads"), py::arg("iters"), py::arg("isa") = -1);
}

}  // namespace qwenopt
