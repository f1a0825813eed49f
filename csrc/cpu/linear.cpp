// linear: a few rows times a row-major weight matrix, at the speed of reading the weights once.
#include "kernels/linear.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

// Work is handed out in runs of whole rows that get shorter towards the end, so that each thread reads a long forward
// stream and all of them end together: the last runs are of about this much weight, some microseconds.
constexpr int64_t kLastRunBytes = 64 << 10;
constexpr int64_t kSerialBytes = 128 << 10;  // read by one thread in about the time of a fork
constexpr int64_t kRunBytes = 1 << 20;       // of an item in tiles
constexpr int64_t kBlockBytes = 1 << 20, kBlockRows = 512, kBlockCols = 256;
constexpr int64_t kSerialProducts = 1 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct TilePlan {
  int64_t steps, panels, block_steps, num_blocks;  // of k and of the packed x
  int64_t rows, num_rows, cols, num_cols;          // of an item, and how many items
  int64_t packed_bytes, sum_bytes, total_bytes;
};

// In AMX tiles. Cut so that what is used again stays in 2 MB of L2: a block of x, its sums, two panels of weights.
#if QWENOPT_X86
constexpr int64_t kTileRows = 4;  // from here on: fewer rows are at the speed of memory without tiles

bool in_tiles(int64_t M, int64_t K, int dtype, int isa) {
  return isa == kAmx && dtype == kBFloat16 && M >= kTileRows && K > 0;
}

TilePlan plan_tiles(int64_t M, int64_t N, int64_t K, int threads) {
  TilePlan p;
  p.steps = ceil_div(K, 32);
  p.panels = ceil_div(M, 16);
  const int64_t few = M < 256 ? p.panels * 16 : 256;
  const bool fits = few * p.steps * 64 <= kBlockBytes;
  // Few rows wait for memory and want long runs of it.
  p.num_blocks = M <= kLinearFewRows ? ceil_div(p.steps, 128) : fits ? 1 : ceil_div(p.steps, 16);
  p.block_steps = ceil_div(p.steps, p.num_blocks);
  p.num_blocks = ceil_div(p.steps, p.block_steps);
  int64_t most_rows = kBlockBytes / (64 * p.block_steps);
  if (most_rows > kBlockRows || M <= kLinearFewRows) most_rows = kBlockRows;
  p.num_rows = ceil_div(M, most_rows);
  p.rows = ceil_div(ceil_div(M, p.num_rows), 32) * 32;
  p.num_rows = ceil_div(M, p.rows);
  p.cols = M <= kLinearFewRows ? kRunBytes / (2 * K) : kBlockCols;
  const int64_t most = ceil_div(N, threads);
  if (p.cols > most) p.cols = most;
  if (p.cols > kBlockCols) p.cols = kBlockCols;
  p.cols = ceil_div(p.cols, 32) * 32;
  p.num_cols = ceil_div(N, p.cols);
  p.packed_bytes = p.panels * p.steps * 1024;
  p.sum_bytes = p.num_blocks > 1 ? p.rows * p.cols * 4 : p.rows * 32 * 4;
  p.total_bytes = 64 + p.packed_bytes + threads * p.sum_bytes;
  return p;
}

#else
bool in_tiles(int64_t, int64_t, int, int) { return false; }
TilePlan plan_tiles(int64_t, int64_t, int64_t, int) { return {}; }
#endif

// In floats, where the type has no products of its own: from here on widening the weights once costs less than with
// each use.
constexpr int64_t kFloatRows = 33;
constexpr int64_t kFloatBlock = 512;  // rows of x packed at a time: 6 MB at K = 3072, read from L3

bool in_floats(int64_t M, int64_t K, int dtype, int isa) {
  return (isa == kAvx2 || isa == kAvx512) && dtype != kFloat32 && M >= kFloatRows && K > 0;
}

struct OuterPlan {
  int64_t rows, num_rows, cols, num_cols;  // of an item, and how many items of one block of rows
  int64_t packed_bytes, sum_bytes, total_bytes;
};

OuterPlan plan_floats(int64_t M, int64_t N, int64_t K, int threads) {
  OuterPlan p;
  const int64_t groups = ceil_div(M < kFloatBlock ? M : kFloatBlock, kLinearPackRows);
  p.cols = kLinearCols;
  p.num_cols = ceil_div(N, p.cols);
  // Many threads and few columns: rows are shared out, too.
  p.num_rows = ceil_div(4 * threads, p.num_cols);
  if (p.num_rows > groups) p.num_rows = groups;
  p.rows = ceil_div(groups, p.num_rows) * kLinearPackRows;
  p.num_rows = ceil_div(groups * kLinearPackRows, p.rows);
  p.packed_bytes = groups * kLinearPackRows * K * 4;
  p.sum_bytes = p.cols * (kLinearDepth + p.rows) * 4;
  p.total_bytes = 64 + p.packed_bytes + threads * p.sum_bytes;
  return p;
}

// Scratch of either way of many rows.
int64_t blocks_bytes(int64_t M, int64_t N, int64_t K, int dtype, int threads, int isa) {
  if (in_tiles(M, K, dtype, isa)) return plan_tiles(M, N, K, threads).total_bytes;
  return in_floats(M, K, dtype, isa) ? plan_floats(M, N, K, threads).total_bytes : 0;
}

struct LinearStep {
  void (*kernel)(const LinearArgs&, int64_t, int64_t);
  LinearArgs args;
  bool tiled, floats;
  int isa;
  TilePlan tiles{};
  OuterPlan outer{};
  int64_t grain = 0;
  int members;
  Counter counter;

  LinearStep(const LinearArgs& linear_args, char* scratch, int threads, int isa)
      : kernel(QWENOPT_PICK(isa, linear)),
        args(linear_args),
        tiled(in_tiles(args.M, args.K, args.dtype, isa)),
        floats(in_floats(args.M, args.K, args.dtype, isa)),
        isa(isa),
        members(threads) {
    const int64_t row_bytes = args.K * dtype_bytes(args.dtype);
    if (floats || tiled) {
      args.packed = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
      if (args.M * args.N * args.K <= kSerialProducts) members = 1;
      if (floats) outer = plan_floats(args.M, args.N, args.K, threads);
      if (tiled) tiles = plan_tiles(args.M, args.N, args.K, threads);
      args.block_steps = tiles.block_steps;
    } else {
      if (args.N * row_bytes * args.M <= kSerialBytes) members = 1;
      // Multiples of 16 columns, so that no two threads write one cache line.
      grain = row_bytes > 0 ? ceil_div(ceil_div(kLastRunBytes, row_bytes), 16) * 16 : ceil_div(args.N, 16) * 16;
    }
  }

  void run(const Team& team) {
    if (args.M == 0 || (members == 1 && team.id > 0)) return;
    if (tiled) return run_tiles(team);
    if (floats) return run_floats(team);
    if (team.id >= members) return;
    int64_t n0, n1;
    while (counter.take_run(args.N, grain, members, &n0, &n1)) kernel(args, n0, n1);
  }
  void finish() {}

 private:
  // A block of rows after the other: all pack it, all use it. Items are counted through all blocks.
  void run_floats(const Team& team) {
    char* packed = static_cast<char*>(args.packed);
    float* sums = reinterpret_cast<float*>(packed + outer.packed_bytes + team.id * outer.sum_bytes);
    const int64_t items = outer.num_rows * outer.num_cols;
    int64_t item = team.id < members ? counter.take() : 0, first = 0;
    for (int64_t m = 0; m < args.M; m += kFloatBlock, first += items) {
      LinearArgs block = args;
      block.M = args.M - m < kFloatBlock ? args.M - m : kFloatBlock;
      block.x = static_cast<const char*>(args.x) + m * args.x_stride * dtype_bytes(args.dtype);
      block.out = static_cast<char*>(args.out) + m * args.out_stride * dtype_bytes(args.dtype);
      int64_t begin, end;
      team.share(ceil_div(block.M, kLinearPackRows) * ceil_div(args.K, kLinearDepth), members, &begin, &end);
      if (begin < end) QWENOPT_PICK(isa, linear_widen)(block, begin, end);
      if (members > 1) team.barrier();
      for (; team.id < members && item < first + items; item = counter.take()) {
        const int64_t m0 = (item - first) % outer.num_rows * outer.rows;
        const int64_t n0 = (item - first) / outer.num_rows * outer.cols;
        const int64_t m1 = m0 + outer.rows < block.M ? m0 + outer.rows : block.M;
        const int64_t n1 = n0 + outer.cols < args.N ? n0 + outer.cols : args.N;
        if (m0 < m1) QWENOPT_PICK(isa, linear_outer)(block, {m0, m1, n0, n1, -1, sums});
      }
      if (members > 1) team.barrier();
    }
  }

  void run_tiles(const Team& team) {
#if QWENOPT_X86
    int64_t begin, end;
    team.share(tiles.panels * tiles.num_blocks, members, &begin, &end);
    if (begin < end) amx::linear_pack(args, begin, end);
    if (members > 1) team.barrier();
    if (team.id >= members) return;
    char* packed = static_cast<char*>(args.packed);
    float* sums = reinterpret_cast<float*>(packed + tiles.packed_bytes + team.id * tiles.sum_bytes);
    const int64_t items = tiles.num_rows * tiles.num_cols;
    for (int64_t item = counter.take(), after; item < items; item = after) {
      after = counter.take();
      const int64_t m0 = item / tiles.num_cols * tiles.rows, n0 = item % tiles.num_cols * tiles.cols;
      const int64_t m1 = m0 + tiles.rows < args.M ? m0 + tiles.rows : args.M;
      const int64_t n1 = n0 + tiles.cols < args.N ? n0 + tiles.cols : args.N;
      amx::linear_tiles(args, {m0, m1, n0, n1, after < items ? after % tiles.num_cols * tiles.cols : -1, sums});
    }
#else
    (void)team;
#endif
  }
};

int64_t scratch_bytes_py(int64_t M, int64_t N, int64_t K, int dtype, int threads, int isa) {
  const char* op = "linear_scratch_bytes";
  check_common(op, dtype, threads);
  check_size(op, "M", M);
  check_size(op, "N", N, 1);
  check_size(op, "K", K);
  return blocks_bytes(M, N, K, dtype, threads, kernel_isa(op, isa, dtype));
}

LinearStep linear_step(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, uintptr_t scratch, int64_t M,
                       int64_t N, int64_t K, int64_t x_stride, int64_t weight_stride, int64_t out_stride, int dtype,
                       int threads, int isa) {
  check_common("linear", dtype, threads);
  check_size("linear", "M", M);
  check_size("linear", "N", N, 1);
  check_size("linear", "K", K);
  check_size("linear", "weight_stride", weight_stride, K);
  isa = kernel_isa("linear", isa, dtype);
  if (M > 0) {
    check_pointer("linear", "out", out);
    if (K > 0) check_pointer("linear", "x", x);
    if (K > 0) check_pointer("linear", "weight", weight);
  }
  const LinearArgs args{pointer(x), pointer(weight), pointer(bias), pointer(out), M,       N, K,
                        x_stride,   weight_stride,   out_stride,    dtype,        nullptr, 0};
  if (blocks_bytes(M, N, K, dtype, threads, isa) > 0) check_pointer("linear", "scratch", scratch);
  return {args, pointer<char>(scratch), threads, isa};
}

}  // namespace

void register_linear(py::module_& m) {
  define_step<&linear_step>(m, "linear", "out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]", py::arg("x"),
                            py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("scratch"), py::arg("M"),
                            py::arg("N"), py::arg("K"), py::arg("x_stride"), py::arg("weight_stride"),
                            py::arg("out_stride"), py::arg("dtype"), py::arg("threads"), py::arg("isa") = -1);
  m.def("linear_scratch_bytes", &scratch_bytes_py, "Bytes of scratch that linear needs", py::arg("M"), py::arg("N"),
        py::arg("K"), py::arg("dtype"), py::arg("threads"), py::arg("isa") = -1);
}

}  // namespace qwenopt
