// Plain types shared by kernels and their callers. No functions: nothing here may be emitted into an object file.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace qwenopt {

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };

struct bf16 {
  uint16_t bits;
};

}  // namespace qwenopt

#if QWENOPT_X86
#define QWENOPT_DECLARE_KERNEL(...) \
  namespace generic {               \
  __VA_ARGS__;                      \
  }                                 \
  namespace avx2 {                  \
  __VA_ARGS__;                      \
  }                                 \
  namespace avx512 {                \
  __VA_ARGS__;                      \
  }                                 \
  namespace avx512bf16 {            \
  __VA_ARGS__;                      \
  }
#else
#define QWENOPT_DECLARE_KERNEL(...) \
  namespace generic {               \
  __VA_ARGS__;                      \
  }
#endif
