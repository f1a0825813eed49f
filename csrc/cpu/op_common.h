// What every CPU op's registration needs: checks shared by all, and the choice of a kernel by instruction set.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "../common/check.h"
#include "../common/cpu_isa.h"
#include "kernels/types.h"
#include "step.h"

namespace qwenopt {

namespace py = pybind11;

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline int64_t dtype_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline void check_common(const char* op, int dtype, int threads) {
  QWENOPT_CHECK(dtype >= kFloat32 && dtype <= kFloat16, op, ": dtype code ", dtype,
                "; dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  QWENOPT_CHECK(threads >= 1, op, ": ", threads, " threads; threads must be at least 1");
}

// The instruction set whose kernels take that dtype: float16 gains nothing from those beyond AVX-512.
inline int kernel_isa(const char* op, int isa, int dtype) {
  isa = resolve_isa(op, isa);
  return dtype == kFloat16 && isa > kAvx512 ? int(kAvx512) : isa;
}

inline void check_pointer(const char* op, const char* name, uintptr_t address) {
  QWENOPT_CHECK(address != 0, op, ": ", name, " is a null pointer; it must be the address of the tensor's data");
}

inline void check_size(const char* op, const char* name, int64_t value, int64_t least = 0) {
  QWENOPT_CHECK(value >= least, op, ": ", name, " is ", value, "; it must be at least ", least);
}

}  // namespace qwenopt

// Kernel files are compiled once per instruction set into namespaces of that name; these two macros declare and pick.
#if QWENOPT_X86
#define QWENOPT_PICK(isa, fn)                         \
  ((isa) == ::qwenopt::kAmx          ? amx::fn        \
   : (isa) == ::qwenopt::kAvx512Bf16 ? avx512bf16::fn \
   : (isa) == ::qwenopt::kAvx512     ? avx512::fn     \
   : (isa) == ::qwenopt::kAvx2       ? avx2::fn       \
                                     : generic::fn)
#else
#define QWENOPT_PICK(isa, fn) (generic::fn)
#endif
