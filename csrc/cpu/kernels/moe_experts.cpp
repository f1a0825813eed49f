#include "moe_experts.h"

#include "dot_block.h"
#if defined(QWENOPT_ISA_AMX)
#include "moe_tiles.h"
#endif

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

static_assert(kMoeCols % W == 0, "whole vectors");

inline int min_rows(int64_t left) { return left < kMaxDotRows ? int(left) : kMaxDotRows; }

template <class T>
void gate_up(const MoeExpertsArgs& a, const ExpertRows& r, int64_t c0, int64_t c1, const void* then) {
  const T* gate = (const T*)a.gate_up + r.expert * 2 * a.I * a.N;
  const T* up = gate + a.I * a.N;
  alignas(64) float g[kMaxDotRows * kMoeCols], u[kMaxDotRows * kMoeCols];
  for (int64_t c = c0; c < c1; c += kMoeCols) {
    const int64_t cols = c1 - c < kMoeCols ? c1 - c : kMoeCols;
    for (int64_t m0 = 0; m0 < r.count; m0 += kMaxDotRows) {
      const int rows = min_rows(r.count - m0);
      const T* x[kMaxDotRows];
      for (int m = 0; m < rows; ++m) x[m] = (const T*)a.x + r.pairs[m0 + m] / a.K * a.x_stride;
      const bool last_rows = m0 + rows == r.count, last = last_rows && c + cols == c1;
      const T* next = last ? (const T*)then : gate + (last_rows ? c + cols : c) * a.N;
      dot_block<T>(x, rows, gate + c * a.N, a.N, cols, a.N, g, kMoeCols, up + c * a.N);
      dot_block<T>(x, rows, up + c * a.N, a.N, cols, a.N, u, kMoeCols, next);
      for (int m = 0; m < rows; ++m) {
        T* hidden = (T*)a.hidden + (r.first + m0 + m) * a.I + c;
        for (int64_t i = 0; i < cols; i += W) {
          const F gate_part = round_to<T>(load(g + m * kMoeCols + i)),
                  up_part = round_to<T>(load(u + m * kMoeCols + i));
          store_upto(hidden + i, mul(round_to<T>(silu(gate_part)), up_part), cols - i);
        }
      }
    }
  }
}

template <class T>
void down(const MoeExpertsArgs& a, const ExpertRows& r, int64_t c0, int64_t c1, const void* then) {
  const T* weight = (const T*)a.down + r.expert * a.N * a.I;
  alignas(64) float y[kMaxDotRows * kMoeCols];
  for (int64_t c = c0; c < c1; c += kMoeCols) {
    const int64_t cols = c1 - c < kMoeCols ? c1 - c : kMoeCols;
    for (int64_t m0 = 0; m0 < r.count; m0 += kMaxDotRows) {
      const int rows = min_rows(r.count - m0);
      const T* hidden[kMaxDotRows];
      for (int m = 0; m < rows; ++m) hidden[m] = (const T*)a.hidden + (r.first + m0 + m) * a.I;
      const bool last_rows = m0 + rows == r.count, last = last_rows && c + cols == c1;
      const T* next = last ? (const T*)then : weight + (last_rows ? c + cols : c) * a.I;
      dot_block<T>(hidden, rows, weight + c * a.I, a.I, cols, a.I, y, kMoeCols, next);
      for (int m = 0; m < rows; ++m) {
        const int64_t pair = r.pairs[m0 + m];
        const F scale = set1(to_float(((const T*)a.weights)[pair]));
        T* to = (T*)a.weighted + pair * a.N + c;
        for (int64_t i = 0; i < cols; i += W) {
          store_upto(to + i, mul(round_to<T>(load(y + m * kMoeCols + i)), scale), cols - i);
        }
      }
    }
  }
}

template <class T>
void combine(const MoeExpertsArgs& a, int64_t token0, int64_t token1) {
  for (int64_t t = token0; t < token1; ++t) {
    for (int64_t n = 0; n < a.N; n += W) {
      F sum = zero();
      for (int64_t j = 0; j < a.K; ++j) {
        const int64_t pair = t * a.K + j;
        if (a.indices[pair] == a.E) continue;
        sum = add(sum, load_upto((const T*)a.weighted + pair * a.N + n, a.N - n));
      }
      store_upto((T*)a.out + t * a.N + n, sum, a.N - n);
    }
  }
}

}  // namespace

void moe_gate_up(const MoeExpertsArgs& a, const ExpertRows& r, int64_t c0, int64_t c1, const void* then) {
#if defined(QWENOPT_ISA_AMX)
  if (r.tile >= 0) {
    tiles_begin();
    gate_up_tiles(a, r, c0, c1, then);
    tiles_end();
    return;
  }
#endif
  of_type(a.dtype, [&](auto type) { gate_up<decltype(type)>(a, r, c0, c1, then); });
}

void moe_down(const MoeExpertsArgs& a, const ExpertRows& r, int64_t c0, int64_t c1, const void* then) {
#if defined(QWENOPT_ISA_AMX)
  if (r.tile >= 0) {
    tiles_begin();
    down_tiles(a, r, c0, c1, then);
    tiles_end();
    return;
  }
#endif
  of_type(a.dtype, [&](auto type) { down<decltype(type)>(a, r, c0, c1, then); });
}

void moe_combine(const MoeExpertsArgs& a, int64_t token0, int64_t token1) {
  of_type(a.dtype, [&](auto type) { combine<decltype(type)>(a, token0, token1); });
}

#if defined(QWENOPT_ISA_AMX)
void moe_pack(const MoeExpertsArgs& a, const ExpertRows& r, int64_t tile) { pack_expert(a, r, tile); }
#endif

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
