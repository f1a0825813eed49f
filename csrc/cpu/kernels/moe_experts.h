// moe_experts: the chosen experts' SwiGLU blocks and their weighted sum.
#pragma once

#include "types.h"

namespace qwenopt {

struct MoeExpertsArgs {
  const void* x;           // [T, N], rows x_stride apart
  const int64_t* indices;  // [T, K]; E means skip
  const void* weights;     // [T, K]
  const void* gate_up;     // [E, 2I, N]
  const void* down;        // [E, N, I]
  void* out;               // [T, N] contiguous
  void* hidden;            // scratch [T * K, I], pairs in expert order
  void* weighted;          // scratch [T * K, N], pairs in token order
  int64_t T, N, I, E, K, x_stride;
  int dtype;
  void *packed_x, *packed_hidden;  // in tiles only: scratch, a KB for each tile of an expert and 32 of N, or of I
};

// Each kernel below is told where this thread goes on reading afterwards, so that the next weights are on their way.

// The (token, choice) pairs of one expert: pairs[0..count) are t * K + j, and their hidden rows start at `first`.
struct ExpertRows {
  const int32_t* pairs;
  int64_t expert, count, first;
  int64_t tile;  // where the packed rows start, in tiles of 16 rows; -1: this expert goes without tiles
};

// hidden[:, c0..c1) = silu(x @ gate.T) * (x @ up.T)
QWENOPT_DECLARE_TILE_KERNEL(void moe_gate_up(const MoeExpertsArgs& args, const ExpertRows& rows, int64_t c0, int64_t c1,
                                             const void* then))
// weighted[:, c0..c1) = round(hidden @ down.T) * weight
QWENOPT_DECLARE_TILE_KERNEL(void moe_down(const MoeExpertsArgs& args, const ExpertRows& rows, int64_t c0, int64_t c1,
                                          const void* then))
// out[t] = sum over j of weighted[t, j], tokens token0..token1
QWENOPT_DECLARE_TILE_KERNEL(void moe_combine(const MoeExpertsArgs& args, int64_t token0, int64_t token1))

// Rows of x of one expert, 16 from tile * 16 on, gathered and packed.
QWENOPT_DECLARE_AMX(void moe_pack(const MoeExpertsArgs& args, const ExpertRows& rows, int64_t tile))

constexpr int64_t kMoeCols = 64;  // columns of one pass through the sums buffer

}  // namespace qwenopt
