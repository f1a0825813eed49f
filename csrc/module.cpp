// qwenopt._C: the one native module. Torch-free: addresses, sizes and strides go in, nothing is allocated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/check.h"
#include "common/cpu_isa.h"
#include "cpu/ops.h"
#include "cuda/images.h"
#include "cuda/launch.h"

#ifndef QWENOPT_VERSION
#define QWENOPT_VERSION "unknown"
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list isas;
#if QWENOPT_X86
  for (int isa = 0; isa < qwenopt::kNumIsas; ++isa) isas.append(qwenopt::isa_name(isa));
#else
  isas.append(qwenopt::isa_name(qwenopt::kGeneric));
#endif
  py::dict info;
  info["version"] = QWENOPT_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["isas"] = isas;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = qwenopt::kNumCudaImages > 0;
  info["nvcc"] = qwenopt::kCudaVersion;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of qwenopt. Use them through qwenopt.native; docs/kernels.md describes the arguments.";
  m.def("build_info", &build_info, "What this module was built with");
  m.def("cpu_isa", &qwenopt::best_isa,
        "Best instruction set of this host: 0 generic, 1 avx2, 2 avx512, 3 avx512bf16, 4 amx");
  m.def("isa_name", &qwenopt::isa_name, py::arg("isa"));
  qwenopt::register_linear(m);
  qwenopt::register_rms_norm(m);
  qwenopt::register_add_rms_norm(m);
  qwenopt::register_qk_norm_rope(m);
  qwenopt::register_silu_mul(m);
  qwenopt::register_moe_route(m);
  qwenopt::register_moe_experts(m);
  qwenopt::register_attention(m);
  qwenopt::register_budget_step(m);
  qwenopt::register_top_tokens(m);
  qwenopt::register_logit_signals(m);
  qwenopt::register_kv_append(m);
  qwenopt::register_paged_attention(m);
  qwenopt::register_move(m);
  qwenopt::register_plan(m);
  qwenopt::register_probe(m);
  qwenopt::register_cuda(m);
}
