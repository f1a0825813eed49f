// One register function per op; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace qwenopt {

void register_linear(pybind11::module_& m);
void register_rms_norm(pybind11::module_& m);
void register_add_rms_norm(pybind11::module_& m);
void register_qk_norm_rope(pybind11::module_& m);
void register_silu_mul(pybind11::module_& m);
void register_moe_route(pybind11::module_& m);
void register_moe_experts(pybind11::module_& m);
void register_attention(pybind11::module_& m);
void register_budget_step(pybind11::module_& m);
void register_top_tokens(pybind11::module_& m);
void register_logit_signals(pybind11::module_& m);
void register_kv_append(pybind11::module_& m);
void register_paged_attention(pybind11::module_& m);
void register_move(pybind11::module_& m);
void register_plan(pybind11::module_& m);
void register_probe(pybind11::module_& m);

}  // namespace qwenopt
