// moe_experts: pairs are sorted by expert, so that each hit expert's weights are read once for all of its tokens.
#include "kernels/moe_experts.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

// A work item is a run of this many columns of one expert: about 256 KB of gate and up rows, or 200 KB of down rows, at
// the sizes of 30B-A3B. Large enough to stream, small enough to stay in L2 when an expert has more than 32 tokens.
constexpr int64_t kGateUpCols = 32;
constexpr int64_t kDownCols = 128;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Scratch {
  int64_t hidden, weighted, pairs, experts, packed_x, packed_hidden, total;  // byte offsets, then the size
};

// Experts with this many rows go in AMX tiles: fewer are at the speed of memory without.
constexpr int64_t kTileRows = 4;

bool in_tiles(int64_t N, int64_t I, int dtype, int isa) {
  return isa == kAmx && dtype == kBFloat16 && N % 32 == 0 && I % 32 == 0;
}

// The most tiles of 16 rows that the pairs can fill.
int64_t most_tiles(int64_t pairs, int64_t E) {
  const int64_t experts = pairs / kTileRows < E ? pairs / kTileRows : E;
  return pairs / 16 + experts;
}

Scratch layout(int64_t T, int64_t N, int64_t I, int64_t E, int64_t K, int dtype) {
  Scratch s{};
  int64_t at = 64;  // room to align the start
  s.hidden = at;
  at += aligned(T * K * I * dtype_bytes(dtype));
  s.weighted = at;
  at += aligned(T * K * N * dtype_bytes(dtype));
  s.pairs = at;
  at += aligned(T * K * int64_t(sizeof(int32_t)));
  s.experts = at;
  at += aligned((E + 1) * int64_t(sizeof(ExpertRows)));
  s.packed_x = at;
  if (in_tiles(N, I, dtype, best_isa())) {
    const int64_t tiles = most_tiles(T * K, E);
    at += tiles * N / 32 * 1024;
    s.packed_hidden = at;
    at += tiles * I / 32 * 1024;
  }
  s.total = at;
  return s;
}

// Counting sort of the pairs by expert, token order kept; returns how many experts were hit.
int64_t group_pairs(const MoeExpertsArgs& a, int32_t* pairs, ExpertRows* experts) {
  for (int64_t e = 0; e <= a.E; ++e) experts[e] = {pairs, e, 0, 0, -1};
  for (int64_t p = 0; p < a.T * a.K; ++p) ++experts[a.indices[p]].count;
  int64_t first = 0;
  for (int64_t e = 0; e <= a.E; ++e) {
    experts[e].first = first;
    experts[e].pairs = pairs + first;
    first += experts[e].count;
    experts[e].count = 0;
  }
  for (int64_t p = 0; p < a.T * a.K; ++p) {
    ExpertRows& rows = experts[a.indices[p]];
    pairs[rows.first + rows.count++] = int32_t(p);
  }
  int64_t hit = 0;
  for (int64_t e = 0; e < a.E; ++e) {
    if (experts[e].count > 0) experts[hit++] = experts[e];
  }
  return hit;
}

#if QWENOPT_X86
// The rows of x of the experts that go in tiles, shared out to the team.
void pack_experts(const MoeExpertsArgs& args, const ExpertRows* experts, int64_t hit, int members, const Team& team) {
  int64_t begin, end, tile = 0;
  for (int64_t e = 0; e < hit; ++e) {
    if (experts[e].tile >= 0) tile = experts[e].tile + (experts[e].count + 15) / 16;
  }
  team.share(tile, members, &begin, &end);
  for (int64_t e = 0; e < hit; ++e) {
    if (experts[e].tile < 0) continue;
    for (int64_t t = 0; t < (experts[e].count + 15) / 16; ++t) {
      if (experts[e].tile + t >= begin && experts[e].tile + t < end) amx::moe_pack(args, experts[e], t);
    }
  }
}
#endif

// A phase's work items: a run of columns of one hit expert, in the order of the weights.
struct Phase {
  const ExpertRows* experts = nullptr;
  int64_t cols_per_item = 0, num_cols = 0, tiles = 0, num_experts = 0;
  const char* weights = nullptr;  // of expert 0
  int64_t expert_bytes = 0, col_bytes = 0;
  Counter counter;

  Phase() = default;
  Phase(const ExpertRows* rows, int64_t per_item, int64_t cols, const void* data, int64_t bytes, int64_t stride)
      : experts(rows),
        cols_per_item(per_item),
        num_cols(cols),
        tiles((cols + per_item - 1) / per_item),
        weights(static_cast<const char*>(data)),
        expert_bytes(bytes),
        col_bytes(stride) {}

  int64_t items() const { return num_experts * tiles; }
  int64_t first_col(int64_t item) const { return item % tiles * cols_per_item; }
  const void* address(int64_t item) const {
    if (item >= items()) return weights;
    return weights + experts[item / tiles].expert * expert_bytes + first_col(item) * col_bytes;
  }

  // Items go to whoever is free; each thread takes its next one early, to know what to prefetch.
  template <class Kernel>
  void work(const MoeExpertsArgs& args, Kernel kernel) {
    for (int64_t item = counter.take(), after; item < items(); item = after) {
      after = counter.take();
      const int64_t c0 = first_col(item), c1 = c0 + cols_per_item < num_cols ? c0 + cols_per_item : num_cols;
      kernel(args, experts[item / tiles], c0, c1, address(after));
    }
  }
};

struct MoeExpertsStep {
  MoeExpertsArgs args;
  int32_t* pairs;
  ExpertRows* experts;
  int isa, members;
  Phase first, second;
  int64_t bad = -1;  // the pair whose id is out of range

  MoeExpertsStep(const MoeExpertsArgs& args, int32_t* pairs, ExpertRows* experts, int threads, int isa)
      : args(args),
        pairs(pairs),
        experts(experts),
        isa(isa),
        members(args.T * args.K * args.N * args.I <= 64 * 1024 ? 1 : threads) {
    const int64_t size = dtype_bytes(args.dtype);
    first = {experts, kGateUpCols, args.I, args.gate_up, 2 * args.I * args.N * size, args.N * size};
    second = {experts, kDownCols, args.N, args.down, args.N * args.I * size, args.I * size};
  }

  void run(const Team& team) {
    if (args.T == 0 || (members == 1 && team.id > 0)) return;
    if (team.id == 0) start();
    if (members > 1) team.barrier();
    if (failed()) return;
#if QWENOPT_X86
    if (args.packed_x) {
      pack_experts(args, experts, first.num_experts, members, team);
      if (members > 1) team.barrier();
    }
#endif
    if (team.id < members) first.work(args, QWENOPT_PICK(isa, moe_gate_up));
    if (members > 1) team.barrier();
    if (team.id < members) second.work(args, QWENOPT_PICK(isa, moe_down));
    if (members > 1) team.barrier();
    int64_t begin, end;
    team.share(args.T, members, &begin, &end);
    if (begin < end) QWENOPT_PICK(isa, moe_combine)(args, begin, end);
  }

  // The ids may have been written by the step before, so they are looked at here. A wrong one stops the op before it
  // writes anything.
  void start() {
    for (int64_t p = 0; p < args.T * args.K && bad < 0; ++p) {
      if (args.indices[p] < 0 || args.indices[p] > args.E) bad = p;
    }
    if (bad >= 0) return;
    const int64_t hit = group_pairs(args, pairs, experts);
    first.num_experts = second.num_experts = hit;
    for (int64_t e = 0, tile = 0; args.packed_x && e < hit; ++e) {
      if (experts[e].count < kTileRows) continue;
      experts[e].tile = tile;
      tile += (experts[e].count + 15) / 16;
    }
  }

  bool failed() const { return bad >= 0; }
  void finish() {
    QWENOPT_CHECK_RANGE(!failed(), "moe_experts: expert id ", args.indices[bad], " of ", args.E,
                        " experts; ids must be 0..", args.E - 1, ", or ", args.E, " to skip");
  }
};

void check_sizes(int64_t T, int64_t N, int64_t I, int64_t E, int64_t K) {
  check_size("moe_experts", "T", T);
  check_size("moe_experts", "N", N, 1);
  check_size("moe_experts", "I", I, 1);
  check_size("moe_experts", "E", E, 1);
  check_size("moe_experts", "K", K, 1);
  QWENOPT_CHECK(T * K < (int64_t(1) << 31), "moe_experts: ", T, " tokens times ", K,
                " experts each; there must be fewer than 2^31 pairs");
}

int64_t scratch_bytes_py(int64_t T, int64_t N, int64_t I, int64_t E, int64_t K, int dtype, int threads) {
  check_common("moe_experts_scratch_bytes", dtype, threads);
  check_sizes(T, N, I, E, K);
  return layout(T, N, I, E, K, dtype).total;
}

MoeExpertsStep moe_experts_step(uintptr_t x, uintptr_t indices, uintptr_t weights, uintptr_t gate_up, uintptr_t down,
                                uintptr_t out, uintptr_t scratch, int64_t T, int64_t N, int64_t I, int64_t E, int64_t K,
                                int64_t x_stride, int dtype, int threads, int isa) {
  const char* op = "moe_experts";
  check_common(op, dtype, threads);
  check_sizes(T, N, I, E, K);
  isa = kernel_isa(op, isa, dtype);
  if (T > 0) {
    check_pointer(op, "x", x);
    check_pointer(op, "indices", indices);
    check_pointer(op, "weights", weights);
    check_pointer(op, "gate_up", gate_up);
    check_pointer(op, "down", down);
    check_pointer(op, "out", out);
    check_pointer(op, "scratch", scratch);
  }
  const Scratch s = layout(T, N, I, E, K, dtype);
  char* base = pointer<char>(scratch / 64 * 64);
  const bool tiles = in_tiles(N, I, dtype, isa);
  const MoeExpertsArgs args{pointer(x),
                            pointer<const int64_t>(indices),
                            pointer(weights),
                            pointer(gate_up),
                            pointer(down),
                            pointer(out),
                            base + s.hidden,
                            base + s.weighted,
                            T,
                            N,
                            I,
                            E,
                            K,
                            x_stride,
                            dtype,
                            tiles ? base + s.packed_x : nullptr,
                            tiles ? base + s.packed_hidden : nullptr};
  return {args, reinterpret_cast<int32_t*>(base + s.pairs), reinterpret_cast<ExpertRows*>(base + s.experts), threads,
          isa};
}

}  // namespace

void register_moe_experts(py::module_& m) {
  define_step<&moe_experts_step>(m, "moe_experts", "The chosen experts' SwiGLU blocks and their weighted sum",
                                 py::arg("x"), py::arg("indices"), py::arg("weights"), py::arg("gate_up"),
                                 py::arg("down"), py::arg("out"), py::arg("scratch"), py::arg("T"), py::arg("N"),
                                 py::arg("I"), py::arg("E"), py::arg("K"), py::arg("x_stride"), py::arg("dtype"),
                                 py::arg("threads"), py::arg("isa") = -1);
  m.def("moe_experts_scratch_bytes", &scratch_bytes_py, "Bytes of scratch that moe_experts needs", py::arg("T"),
        py::arg("N"), py::arg("I"), py::arg("E"), py::arg("K"), py::arg("dtype"), py::arg("threads"));
}

}  // namespace qwenopt
