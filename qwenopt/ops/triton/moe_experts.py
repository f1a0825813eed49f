"""moe_experts by the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenopt.ops.gpu import one_device
from qwenopt.ops.triton import dtypes, one_dtype, unit_strides

MAX_TOP_K = 16  # a token's experts are read side by side


def accepts(x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> str | None:
    floats = {"x": x, "weights": weights, "gate_up_proj": gate_up_proj, "down_proj": down_proj}
    if indices.shape[1] > MAX_TOP_K:
        return f"{indices.shape[1]} experts for each token (the kernel has up to {MAX_TOP_K})"
    return (
        one_device(**floats, indices=indices)
        or one_dtype(**floats)
        or dtypes((torch.int64,), indices=indices)
        or unit_strides(gate_up_proj=gate_up_proj, down_proj=down_proj)
    )


def moe_experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The reference raises IndexError for an id that is not in 0..E; here the kernel asserts, as torch's own indexing
    does on a GPU, and nothing foreign is read."""
    major = torch.cuda.get_device_properties(x.device).major
    return planned_experts(major, x, indices, weights, gate_up_proj, down_proj)


def planned_experts(
    major: int, x: Tensor, indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """`moe_experts` as it is run on a device of that major compute capability."""
    from qwenopt.triton_kernels.moe_experts import launch, plan, workspace

    (tokens, top_k), (experts, cols, inter) = indices.shape, down_proj.shape
    out = torch.empty(tokens, cols, dtype=x.dtype, device=x.device)
    if not out.numel() or not top_k or not inter or not experts:
        return out.zero_()
    x = x if x.stride(1) == 1 or cols == 1 else x.contiguous()
    p = plan(tokens, top_k, experts, x.element_size(), major)
    sizes = workspace(p, cols, inter, experts)
    hidden = torch.empty(sizes.hidden, dtype=x.dtype, device=x.device)
    rows = torch.empty(sizes.rows, dtype=x.dtype, device=x.device)
    ints = torch.empty(sizes.ints, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        launch(p, x, indices.contiguous(), weights.contiguous(), gate_up_proj, down_proj, out, hidden, rows, ints)
    return out
