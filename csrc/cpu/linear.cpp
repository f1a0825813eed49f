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

struct LinearStep {
  void (*kernel)(const LinearArgs&, int64_t, int64_t);
  LinearArgs args;
  bool tiled;
  TilePlan tiles{};
  int64_t grain = 0;
  int members;
  Counter counter;

  LinearStep(const LinearArgs& linear_args, char* scratch, int threads, int isa)
      : kernel(QWENOPT_PICK(isa, linear)),
        args(linear_args),
        tiled(in_tiles(args.M, args.K, args.dtype, isa)),
        members(threads) {
    const int64_t row_bytes = args.K * dtype_bytes(args.dtype);
    if (tiled) {
      tiles = plan_tiles(args.M, args.N, args.K, threads);
      args.packed = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
      args.block_steps = tiles.block_steps;
      if (args.M * args.N * args.K <= kSerialProducts) members = 1;
    } else {
      if (args.N * row_bytes * args.M <= kSerialBytes) members = 1;
      // Multiples of 16 columns, so that no two threads write one cache line.
      grain = row_bytes > 0 ? ceil_div(ceil_div(kLastRunBytes, row_bytes), 16) * 16 : ceil_div(args.N, 16) * 16;
    }
  }

  void run(const Team& team) {
    if (args.M == 0 || (members == 1 && team.id > 0)) return;
    if (tiled) return run_tiles(team);
    if (team.id >= members) return;
    int64_t n0, n1;
    while (counter.take_run(args.N, grain, members, &n0, &n1)) kernel(args, n0, n1);
  }
  void finish() {}

 private:
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
  return in_tiles(M, K, dtype, kernel_isa(op, isa, dtype)) ? plan_tiles(M, N, K, threads).total_bytes : 0;
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
  if (in_tiles(M, K, dtype, isa)) check_pointer("linear", "scratch", scratch);
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
