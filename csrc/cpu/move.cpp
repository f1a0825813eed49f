// What a decode step does beside its ops: rows into a cache, positions, counters. Steps of a plan, serial or nearly so.
#include <cstring>

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

constexpr int64_t kSerialBytes = 64 << 10;  // what one thread copies while the others wait

// to[b, g, at(s)] = from[b, g, s], rows of row_bytes; at(s) is positions[s], or first + s without positions.
struct MoveRowsStep {
  char* to;
  const char* from;
  const int64_t* positions;
  int64_t first, B, G, S, L, row_bytes;
  int64_t to_sb, to_sg, to_ss, from_sb, from_sg, from_ss;  // strides in bytes
  int members;
  int64_t bad = -1;  // the row without a place

  int64_t at(int64_t s) const { return positions ? positions[s] : first + s; }
  bool fits(int64_t s) const { return at(s) >= 0 && at(s) < L; }

  void run(const Team& team) {
    // Every member looks at all places, so that nothing is written when one of them is wrong; one keeps the result.
    int64_t wrong = -1;
    for (int64_t s = 0; s < S && wrong < 0; ++s) {
      if (!fits(s)) wrong = s;
    }
    if (team.id == 0) bad = wrong;
    if (wrong >= 0) return;
    int64_t begin, end;
    team.share(B * G, members, &begin, &end);
    for (int64_t bg = begin; bg < end; ++bg) {
      char* to_head = to + bg / G * to_sb + bg % G * to_sg;
      const char* from_head = from + bg / G * from_sb + bg % G * from_sg;
      for (int64_t s = 0; s < S; ++s) std::memcpy(to_head + at(s) * to_ss, from_head + s * from_ss, size_t(row_bytes));
    }
  }

  bool failed() const { return bad >= 0; }
  void finish() {
    QWENOPT_CHECK_RANGE(!failed(), "move_rows: row ", bad, " goes to position ", at(bad), " of a cache of ", L,
                        "; positions must be 0..", L - 1, ": make the cache longer");
  }
};

MoveRowsStep move_rows_step(uintptr_t to, uintptr_t from, uintptr_t positions, int64_t first, int64_t B, int64_t G,
                            int64_t S, int64_t L, int64_t row_bytes, int64_t to_sb, int64_t to_sg, int64_t to_ss,
                            int64_t from_sb, int64_t from_sg, int64_t from_ss, int threads, int isa) {
  (void)isa;
  for (int64_t size : {B, G, S, L, row_bytes}) check_size("move_rows", "a size", size);
  if (B * G * S > 0) {
    check_pointer("move_rows", "to", to);
    check_pointer("move_rows", "from", from);
  }
  const int members = B * G * S * row_bytes <= kSerialBytes ? 1 : threads;
  return {pointer<char>(to),
          pointer<const char>(from),
          pointer<const int64_t>(positions),
          first,
          B,
          G,
          S,
          L,
          row_bytes,
          to_sb,
          to_sg,
          to_ss,
          from_sb,
          from_sg,
          from_ss,
          members};
}

// to[r] = from[index[r]], rows of row_bytes; as everywhere in torch, an index below zero counts from the end.
struct TakeRowsStep {
  char* to;
  const char* from;
  const int64_t* index;
  int64_t R, L, row_bytes, to_stride, from_stride;  // strides in bytes
  int members;
  int64_t bad = -1;  // the place of a wrong index

  int64_t at(int64_t r) const { return index[r] < 0 ? index[r] + L : index[r]; }

  void run(const Team& team) {
    int64_t begin, end, wrong = -1;
    for (int64_t r = 0; r < R && wrong < 0; ++r) {
      if (at(r) < 0 || at(r) >= L) wrong = r;
    }
    if (team.id == 0) bad = wrong;
    if (wrong >= 0) return;
    team.share(R, members, &begin, &end);
    for (int64_t r = begin; r < end; ++r) {
      std::memcpy(to + r * to_stride, from + at(r) * from_stride, size_t(row_bytes));
    }
  }

  bool failed() const { return bad >= 0; }
  void finish() {
    QWENOPT_CHECK_RANGE(!failed(), "take_rows: index ", index[bad], " of ", L, " rows; indices must be ", -L, "..",
                        L - 1);
  }
};

TakeRowsStep take_rows_step(uintptr_t to, uintptr_t from, uintptr_t index, int64_t R, int64_t L, int64_t row_bytes,
                            int64_t to_stride, int64_t from_stride, int threads, int isa) {
  (void)isa;
  for (int64_t size : {R, L, row_bytes}) check_size("take_rows", "a size", size);
  if (R > 0) {
    check_pointer("take_rows", "to", to);
    check_pointer("take_rows", "from", from);
    check_pointer("take_rows", "index", index);
  }
  const int members = R * row_bytes <= kSerialBytes ? 1 : threads;
  return {pointer<char>(to),
          pointer<const char>(from),
          pointer<const int64_t>(index),
          R,
          L,
          row_bytes,
          to_stride,
          from_stride,
          members};
}

// out[i] = i + (base ? *base : 0)
struct CountFromStep {
  int64_t* out;
  const int64_t* base;
  int64_t count;
  int members = 1;

  void run(const Team& team) {
    if (team.id > 0) return;
    for (int64_t i = 0; i < count; ++i) out[i] = i + (base ? *base : 0);
  }
  void finish() {}
};

CountFromStep count_from_step(uintptr_t out, uintptr_t base, int64_t count, int threads, int isa) {
  (void)threads, (void)isa;
  check_size("count_from", "count", count);
  if (count > 0) check_pointer("count_from", "out", out);
  return {pointer<int64_t>(out), pointer<const int64_t>(base), count};
}

// at[i] += value
struct AdvanceStep {
  int64_t* at;
  int64_t count, value;
  int members = 1;

  void run(const Team& team) {
    if (team.id > 0) return;
    for (int64_t i = 0; i < count; ++i) at[i] += value;
  }
  void finish() {}
};

AdvanceStep advance_step(uintptr_t at, int64_t count, int64_t value, int threads, int isa) {
  (void)threads, (void)isa;
  check_size("advance", "count", count);
  if (count > 0) check_pointer("advance", "at", at);
  return {pointer<int64_t>(at), count, value};
}

// out[i] = which[i] ? a[i] : b[i], of ids; a null pointer stands for its value everywhere
struct ChooseStep {
  const bool* which;
  const int64_t *a, *b;
  int64_t a_value, b_value;
  int64_t* out;
  int64_t count;
  int members = 1;

  void run(const Team& team) {
    if (team.id > 0) return;
    for (int64_t i = 0; i < count; ++i) out[i] = which[i] ? (a ? a[i] : a_value) : (b ? b[i] : b_value);
  }
  void finish() {}
};

ChooseStep choose_step(uintptr_t which, uintptr_t a, uintptr_t b, int64_t a_value, int64_t b_value, uintptr_t out,
                       int64_t count, int threads, int isa) {
  (void)threads, (void)isa;
  check_size("choose", "count", count);
  if (count > 0) {
    check_pointer("choose", "which", which);
    check_pointer("choose", "out", out);
  }
  return {pointer<const bool>(which),
          pointer<const int64_t>(a),
          pointer<const int64_t>(b),
          a_value,
          b_value,
          pointer<int64_t>(out),
          count};
}

// A few short rows from one place to another.
struct CopyRowsStep {
  char* to;
  const char* from;
  int64_t rows, row_bytes, to_stride, from_stride;  // strides in bytes
  int members = 1;

  void run(const Team& team) {
    if (team.id > 0) return;
    for (int64_t r = 0; r < rows; ++r) std::memmove(to + r * to_stride, from + r * from_stride, size_t(row_bytes));
  }
  void finish() {}
};

CopyRowsStep copy_rows_step(uintptr_t to, uintptr_t from, int64_t rows, int64_t row_bytes, int64_t to_stride,
                            int64_t from_stride, int threads, int isa) {
  (void)threads, (void)isa;
  check_size("copy_rows", "rows", rows);
  check_size("copy_rows", "row_bytes", row_bytes);
  if (rows * row_bytes > 0) {
    check_pointer("copy_rows", "to", to);
    check_pointer("copy_rows", "from", from);
  }
  return {pointer<char>(to), pointer<const char>(from), rows, row_bytes, to_stride, from_stride};
}

}  // namespace

void register_move(py::module_& m) {
  define_step<&move_rows_step>(m, "move_rows", "to[b, g, position of s] = from[b, g, s]", py::arg("to"),
                               py::arg("source"), py::arg("positions"), py::arg("first"), py::arg("B"), py::arg("G"),
                               py::arg("S"), py::arg("L"), py::arg("row_bytes"), py::arg("to_sb"), py::arg("to_sg"),
                               py::arg("to_ss"), py::arg("from_sb"), py::arg("from_sg"), py::arg("from_ss"),
                               py::arg("threads"), py::arg("isa") = -1);
  define_step<&take_rows_step>(m, "take_rows", "to[r] = from[index[r]]", py::arg("to"), py::arg("source"),
                               py::arg("index"), py::arg("R"), py::arg("L"), py::arg("row_bytes"), py::arg("to_stride"),
                               py::arg("from_stride"), py::arg("threads"), py::arg("isa") = -1);
  define_step<&count_from_step>(m, "count_from", "out[i] = base + i", py::arg("out"), py::arg("base"), py::arg("count"),
                                py::arg("threads"), py::arg("isa") = -1);
  define_step<&choose_step>(m, "choose", "out[i] = which[i] ? a[i] : b[i]", py::arg("which"), py::arg("a"),
                            py::arg("b"), py::arg("a_value"), py::arg("b_value"), py::arg("out"), py::arg("count"),
                            py::arg("threads"), py::arg("isa") = -1);
  define_step<&copy_rows_step>(m, "copy_rows", "to[r] = from[r]", py::arg("to"), py::arg("source"), py::arg("rows"),
                               py::arg("row_bytes"), py::arg("to_stride"), py::arg("from_stride"), py::arg("threads"),
                               py::arg("isa") = -1);
  define_step<&advance_step>(m, "advance", "at[i] += value", py::arg("at"), py::arg("count"), py::arg("value"),
                             py::arg("threads"), py::arg("isa") = -1);
}

}  // namespace qwenopt
