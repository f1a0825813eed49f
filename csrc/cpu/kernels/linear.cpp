#include "linear.h"

#include "dot_block.h"
#if defined(QWENOPT_ISA_AMX)
#include "linear_tiles.h"
#else
#include "linear_outer.h"
#endif

namespace qwenopt {
namespace QWENOPT_ISA_NS {
namespace {

constexpr int kCols = 64;

template <class T>
void finish(const float* sums, const T* bias, T* out, int64_t cols) {
  for (int64_t n = 0; n < cols; n += W) {
    F y = load_upto(sums + n, cols - n);
    if (bias) y = add(y, load_upto(bias + n, cols - n));
    store_upto(out + n, y, cols - n);
  }
}

template <class T>
void run(const LinearArgs& a, int64_t n0, int64_t n1) {
  const T* x = (const T*)a.x;
  const T* weight = (const T*)a.weight;
  const T* bias = (const T*)a.bias;
  T* out = (T*)a.out;
  alignas(64) float sums[kMaxDotRows * kCols];
  // Columns outside, rows inside: with many rows the 64 weight rows stay in cache while the rows go by.
  for (int64_t n = n0; n < n1; n += kCols) {
    const int64_t cols = n1 - n < kCols ? n1 - n : kCols;
    for (int64_t m0 = 0; m0 < a.M; m0 += kMaxDotRows) {
      const int rows = a.M - m0 < kMaxDotRows ? int(a.M - m0) : kMaxDotRows;
      const T* row[kMaxDotRows];
      for (int m = 0; m < rows; ++m) row[m] = x + (m0 + m) * a.x_stride;
      // With more rows to come, the same weights again (they are in cache by then); else the next columns.
      const T* here = weight + n * a.weight_stride;
      const T* then = m0 + rows < a.M ? here : here + cols * a.weight_stride;
      dot_block<T>(row, rows, here, a.weight_stride, cols, a.K, sums, kCols, then);
      for (int m = 0; m < rows; ++m) {
        finish<T>(sums + m * kCols, bias ? bias + n : nullptr, out + (m0 + m) * a.out_stride + n, cols);
      }
    }
  }
}

}  // namespace

void linear(const LinearArgs& a, int64_t n0, int64_t n1) {
  of_type(a.dtype, [&](auto type) { run<decltype(type)>(a, n0, n1); });
}

#if defined(QWENOPT_ISA_AMX)
void linear_pack(const LinearArgs& a, int64_t unit0, int64_t unit1) { pack_rows(a, unit0, unit1); }

void linear_tiles(const LinearArgs& a, const LinearBlock& b) {
  const int64_t n1 = b.n0 + (b.n1 - b.n0) / kTile * kTile;
  if (b.n0 < n1) {
    tiles_begin();
    TileColumns(a, b, n1).run();
    tiles_end();
  }
  if (n1 == b.n1) return;
  // The last few columns, no whole tile: the tail of their rows may be the end of the memory.
  LinearArgs rest = a;
  rest.x = (const bf16*)a.x + b.m0 * a.x_stride;
  rest.out = (bf16*)a.out + b.m0 * a.out_stride;
  rest.M = b.m1 - b.m0;
  run<bf16>(rest, n1, b.n1);
}
#else
void linear_widen(const LinearArgs& a, int64_t unit0, int64_t unit1) {
  of_type(a.dtype, [&](auto type) { pack_units<decltype(type)>(a, unit0, unit1); });
}
void linear_outer(const LinearArgs& a, const LinearBlock& b) {
  of_type(a.dtype, [&](auto type) { outer_columns<decltype(type)>(a, b); });
}
#endif

}  // namespace QWENOPT_ISA_NS
}  // namespace qwenopt
