// AMX: eight tiles of 16 rows of 64 bytes, and TDPBF16PS, which adds to a tile of 16 x 16 floats the product of a tile
// of 16 rows of 32 bfloat16 with one of 16 pairs (neighbours in k) of 16 columns.
//
// A row-major weight is such a left operand as it lies: 16 weight rows, 32 of k, the stride between rows. So products
// here are out^T = weight x^T, and only x is packed (pack_tile), once for all weights.
//
// Inline assembly, because the compiler's intrinsics do not say which memory they read: gcc 12 drops the stores that
// fill the configuration, and may move those that fill a packed block past the tile loads.
#pragma once

#include "vec.h"

namespace qwenopt {
namespace QWENOPT_ISA_NS {

constexpr int kTile = 16;            // rows of a tile; columns of a tile of floats
constexpr int kTileK = 32;           // bfloat16 of one tile row
constexpr int64_t kTileWords = 256;  // 32-bit words of a tile
constexpr int64_t kTileBytes = 1024;

template <int Tile>
static inline void tile_load(const void* at, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Tile>
static inline void tile_store(void* at, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Tile>
static inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Sum, int A, int B>
static inline void tile_step() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
}

// All tiles whole, between the two; afterwards the state is clean, so that a switch of threads saves nothing.
static inline void tiles_begin() {
  const struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  static_assert(sizeof(config) == 64, "the layout that the processor reads");
  asm volatile("ldtilecfg %0" ::"m"(config));
}
static inline void tiles_end() { asm volatile("tilerelease"); }

// rows[m][0..cols) of bfloat16, num_rows <= 16 and cols <= 32 -> out[pair][m], zeros elsewhere: a right operand.
static inline void pack_tile(const bf16* const* rows, int num_rows, int cols, uint32_t* out) {
  if (cols == kTileK) return transpose((const uint32_t* const*)rows, num_rows, W, out, kTile);
  alignas(64) uint32_t copy[kTile][W];
  const uint32_t* at[kTile];
  for (int m = 0; m < kTile; ++m) {
    const __m512i row = m < num_rows ? _mm512_maskz_loadu_epi16(half_lanes(cols), rows[m]) : _mm512_setzero_si512();
    _mm512_store_si512(copy[m], row);
    at[m] = copy[m];
  }
  transpose(at, kTile, W, out, kTile);
}

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
