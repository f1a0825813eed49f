// Plain types shared by kernels and their callers. No functions: nothing here may be emitted into an object file.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace qwenopt {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace qwenopt

#if QWENOPT_X86
namespace qwenopt {
namespace avx512bf16 {}
// AMX adds nothing to most kernels: amx::fn is then the one of avx512bf16, since a name that is declared in a namespace
// itself hides what a using-directive brings in.
namespace amx {
using namespace avx512bf16;
}
}  // namespace qwenopt

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
// A kernel of the files that setup.py compiles for AMX too.
#define QWENOPT_DECLARE_TILE_KERNEL(...) \
  QWENOPT_DECLARE_KERNEL(__VA_ARGS__)    \
  QWENOPT_DECLARE_AMX(__VA_ARGS__)
// A kernel that only AMX has.
#define QWENOPT_DECLARE_AMX(...) \
  namespace amx {                \
  __VA_ARGS__;                   \
  }
#else
#define QWENOPT_DECLARE_KERNEL(...) \
  namespace generic {               \
  __VA_ARGS__;                      \
  }
#define QWENOPT_DECLARE_TILE_KERNEL(...) QWENOPT_DECLARE_KERNEL(__VA_ARGS__)
#define QWENOPT_DECLARE_AMX(...)
#endif
