// The CUDA kernels from Python; module.cpp calls this where the platform has dlopen.
#pragma once

#include <pybind11/pybind11.h>

namespace qwenopt {

void register_cuda(pybind11::module_& m);

}  // namespace qwenopt
