// The two ceilings of a roofline: how fast these threads read memory, and how fast they multiply from registers.
#pragma once

#include "types.h"

namespace qwenopt {

// Sum of the 64-bit words in [begin, end) of `data`; bytes are whole words.
QWENOPT_DECLARE_TILE_KERNEL(uint64_t read_all(const uint64_t* data, int64_t begin, int64_t end))

// Returns the floating point operations done; *sink keeps the compiler from dropping them.
QWENOPT_DECLARE_TILE_KERNEL(double multiply_registers(int64_t iterations, float* sink))

}  // namespace qwenopt
