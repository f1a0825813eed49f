// kv_append: tokens are shared out to threads; a slot that the pool does not have fails the step before it writes.
#include "kernels/kv_append.h"

#include "op_common.h"
#include "ops.h"

namespace qwenopt {
namespace {

struct KvAppendStep {
  void (*kernel)(const KvAppendArgs&, int64_t, int64_t);
  KvAppendArgs args;
  int64_t num_tokens, num_slots;
  int members;
  int64_t bad = -1;  // the token whose slot the pool does not have

  void run(const Team& team) {
    // Every member looks at all slots, so that nothing is written when one of them is wrong; one keeps the result.
    int64_t wrong = -1;
    for (int64_t t = 0; t < num_tokens && wrong < 0; ++t) {
      if (args.slots[t] >= num_slots) wrong = t;
    }
    if (team.id == 0) bad = wrong;
    if (wrong >= 0) return;
    int64_t begin, end;
    team.share(num_tokens, members, &begin, &end);
    if (begin < end) kernel(args, begin, end);
  }

  bool failed() const { return bad >= 0; }
  void finish() {
    QWENOPT_CHECK_RANGE(!failed(), "kv_append: token ", bad, " goes to slot ", args.slots[bad], " of a pool of ",
                        num_slots, "; slots must be 0..", num_slots - 1, ", or negative for none");
  }
};

KvAppendStep kv_append_step(uintptr_t k_pool, uintptr_t v_pool, uintptr_t k_scale, uintptr_t v_scale, uintptr_t k,
                            uintptr_t v, uintptr_t slots, int64_t B, int64_t G, int64_t S, int64_t D, int64_t num_pages,
                            int64_t page_size, int64_t kp_sp, int64_t kp_sg, int64_t kp_ss, int64_t vp_sp,
                            int64_t vp_sg, int64_t vp_ss, int64_t k_sb, int64_t k_sg, int64_t k_ss, int64_t v_sb,
                            int64_t v_sg, int64_t v_ss, int pool_dtype, int dtype, int threads, int isa) {
  const char* op = "kv_append";
  constexpr int64_t kSerialElements = 16 * 1024;
  check_common(op, dtype, threads);
  for (int64_t size : {B, G, S, D, num_pages, page_size}) check_size(op, "a size", size);
  QWENOPT_CHECK(pool_dtype >= kFloat32 && pool_dtype <= kInt8Pool, op, ": pool dtype code ", pool_dtype,
                "; it must be 0 (float32), 1 (bfloat16), 2 (float16) or 3 (int8)");
  isa = kernel_isa(op, isa, pool_dtype == kFloat16 ? pool_dtype : dtype);
  if (B * S > 0) check_pointer(op, "slots", slots);
  if (B * S * G * D > 0) {
    check_pointer(op, "k", k);
    check_pointer(op, "v", v);
    if (num_pages * page_size > 0) {
      check_pointer(op, "k_pool", k_pool);
      check_pointer(op, "v_pool", v_pool);
      if (pool_dtype == kInt8Pool) {
        check_pointer(op, "k_scale", k_scale);
        check_pointer(op, "v_scale", v_scale);
      }
    }
  }
  const bool scaled = pool_dtype == kInt8Pool;
  const KvAppendArgs args{pointer(k_pool),
                          pointer(v_pool),
                          scaled ? pointer<float>(k_scale) : nullptr,
                          scaled ? pointer<float>(v_scale) : nullptr,
                          pointer(k),
                          pointer(v),
                          pointer<const int64_t>(slots),
                          G,
                          S,
                          D,
                          page_size,
                          kp_sp,
                          kp_sg,
                          kp_ss,
                          vp_sp,
                          vp_sg,
                          vp_ss,
                          k_sb,
                          k_sg,
                          k_ss,
                          v_sb,
                          v_sg,
                          v_ss,
                          dtype,
                          pool_dtype};
  const int members = 2 * B * S * G * D <= kSerialElements ? 1 : threads;
  return {QWENOPT_PICK(isa, kv_append), args, B * S, num_pages * page_size, members};
}

}  // namespace

void register_kv_append(py::module_& m) {
  define_step<&kv_append_step>(
      m, "kv_append", "pool[slot / page_size, :, slot % page_size] = k[b, :, s], and the same of values",
      py::arg("k_pool"), py::arg("v_pool"), py::arg("k_scale"), py::arg("v_scale"), py::arg("k"), py::arg("v"),
      py::arg("slots"), py::arg("B"), py::arg("G"), py::arg("S"), py::arg("D"), py::arg("num_pages"),
      py::arg("page_size"), py::arg("kp_sp"), py::arg("kp_sg"), py::arg("kp_ss"), py::arg("vp_sp"), py::arg("vp_sg"),
      py::arg("vp_ss"), py::arg("k_sb"), py::arg("k_sg"), py::arg("k_ss"), py::arg("v_sb"), py::arg("v_sg"),
      py::arg("v_ss"), py::arg("pool_dtype"), py::arg("dtype"), py::arg("threads"), py::arg("isa") = -1);
}

}  // namespace qwenopt
