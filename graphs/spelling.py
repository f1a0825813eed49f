"""Spellings: FX node -> canonical operation name and its bound arguments.

PyTorch code can say one thing in many ways (`x.pow(2)`, `torch.pow(x, 2)`); matchers speak of the canonical name only.
The table holds pure operations: whatever is not listed is opaque to every pass.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.nn import functional as F

from qwenopt.ops import PAGED_MASK


class Call(NamedTuple):
    """A node read through the spelling table: canonical name and arguments by canonical parameter name."""

    name: str
    args: dict[str, Any]


# canonical name -> (parameter names in order, spellings). A string is a tensor method.
_TABLE: dict[str, tuple[tuple[str, ...], tuple[Callable[..., Any] | str, ...]]] = {
    "add": (("x", "other"), (operator.add, torch.add, "add")),
    "sub": (("x", "other"), (operator.sub, torch.sub, "sub")),
    "mul": (("x", "other"), (operator.mul, torch.mul, "mul")),
    "div": (("x", "other"), (operator.truediv, torch.div, torch.true_divide, "div", "true_divide")),
    "div_": (("x", "other"), (operator.itruediv, "div_")),
    "floordiv": (("x", "other"), (operator.floordiv, torch.floor_divide, "floor_divide")),
    "neg": (("x",), (operator.neg, torch.neg, torch.negative, "neg")),
    "pow": (("x", "exponent"), (operator.pow, torch.pow, "pow")),
    "square": (("x",), (torch.square, "square")),
    "rsqrt": (("x",), (torch.rsqrt, "rsqrt")),
    "mean": (("x", "dim", "keepdim"), (torch.mean, "mean")),
    "sum": (("x", "dim", "keepdim"), (torch.sum, "sum")),
    "softmax": (("x", "dim"), (F.softmax, torch.softmax, "softmax")),
    "topk": (("x", "k", "dim", "largest", "sorted"), (torch.topk, "topk")),
    "silu": (("x", "inplace"), (F.silu, torch._C._nn.silu)),
    "linear": (("x", "weight", "bias"), (F.linear, torch._C._nn.linear)),
    "embedding": (("x", "weight"), (F.embedding, torch.embedding)),
    "sdpa": (
        ("q", "k", "v", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention),
    ),
    "grouped_mm": (("x", "weight", "offs", "bias", "out_dtype"), (torch._grouped_mm,)),
    "bmm": (("x", "other"), (torch.bmm, "bmm")),
    "matmul": (("x", "other"), (operator.matmul, torch.matmul, "matmul", "__matmul__")),
    "cat": (("tensors", "dim"), (torch.cat, torch.concat)),
    "chunk": (("x", "chunks", "dim"), (torch.chunk, "chunk")),
    "sort": (("x", "dim"), (torch.sort, "sort")),
    "histc": (("x", "bins", "min", "max"), (torch.histc, "histc")),
    "cumsum": (("x", "dim"), (torch.cumsum, "cumsum")),
    "repeat_interleave": (("x", "repeats", "dim"), (torch.repeat_interleave, "repeat_interleave")),
    "empty_like": (("x",), (torch.empty_like,)),
    "arange": (("start", "end", "step"), (torch.arange,)),
    "getitem": (("x", "index"), (operator.getitem,)),
    "transpose": (("x", "dim0", "dim1"), (torch.transpose, "transpose")),
    "unsqueeze": (("x", "dim"), (torch.unsqueeze, "unsqueeze")),
    "squeeze": (("x", "dim"), (torch.squeeze, "squeeze")),
    "view": (("x", "*shape"), ("view", "reshape", torch.reshape)),
    "expand": (("x", "*shape"), ("expand",)),
    "contiguous": (("x",), ("contiguous",)),
    "cast": (("x", "*how"), ("to", "float", "type", "bfloat16", "half", "long", "int", "bool")),
    "le": (("x", "other"), (operator.le, torch.le, "le")),
    "ge": (("x", "other"), (operator.ge, torch.ge, "ge")),
    "lt": (("x", "other"), (operator.lt, torch.lt, "lt")),
    "gt": (("x", "other"), (operator.gt, torch.gt, "gt")),
    "and": (("x", "other"), (operator.and_, torch.logical_and, torch.bitwise_and, "logical_and")),
    "new_ones": (("x", "size"), ("new_ones",)),
    "masked_fill": (("x", "mask", "value"), (torch.masked_fill, "masked_fill")),
    "clamp": (("x", "min", "max"), (torch.clamp, "clamp")),
    "argsort": (("x", "dim"), (torch.argsort, "argsort")),
    "cos": (("x",), (torch.cos, "cos")),
    "sin": (("x",), (torch.sin, "sin")),
    "size": (("x", "dim"), ("size",)),
    "paged_mask": (("q_starts", "q_positions", "num_keys", "window"), (PAGED_MASK.default,)),
}
_ALIASES = {"input": "x", "self": "x", "query": "q", "key": "k", "value": "v", "axis": "dim", "exponent": "exponent"}
_BY_FUNCTION = {s: name for name, (_, spellings) in _TABLE.items() for s in spellings if not isinstance(s, str)}
_BY_METHOD = {s: name for name, (_, spellings) in _TABLE.items() for s in spellings if isinstance(s, str)}
_PURE = frozenset(_TABLE) - {"div_"}


def _name(node: Node) -> str | None:
    if node.op == "call_method":
        return _BY_METHOD.get(str(node.target))
    if node.op != "call_function":
        return None
    name = _BY_FUNCTION.get(node.target)  # type: ignore[arg-type]
    if name is None and str(node.target).startswith("transformers.grouped_mm_fallback"):
        # Registered by transformers for dtypes that torch._grouped_mm does not take; same contract.
        return "grouped_mm"
    return name


def read(value: Any) -> Call | None:
    """The canonical reading of an FX node, or None when it is not a node or not a listed operation."""
    if not isinstance(value, Node):
        return None
    name = _name(value)
    if name is None:
        return None
    params = _TABLE[name][0]
    args: dict[str, Any] = {}
    for i, a in enumerate(value.args):
        if i < len(params) and params[i].startswith("*"):
            args[params[i][1:]] = value.args[i:]
            break
        if i >= len(params):
            return None
        args[params[i]] = a
    for key, a in value.kwargs.items():
        args[_ALIASES.get(key, key)] = a
    return Call(name, args)


def is_pure(node: Node) -> bool:
    """Whether the node is a listed operation without side effects, so that it may go when nobody uses it."""
    if _name(node) not in _PURE or "out" in node.kwargs:
        return False
    return node.kwargs.get("inplace") is not True


def fake(value: Any) -> Any:
    """What Dynamo knows of a node's value: a fake tensor, a symbolic number, a tuple of them; constants as they are."""
    return value.meta.get("example_value") if isinstance(value, Node) else value


def layout(t: torch.Tensor) -> tuple[Any, ...]:
    """Sizes, strides, dtype and device: all that says how memory for such a tensor is made."""
    return t.size(), t.stride(), t.dtype, t.device


def metadata(value: Any) -> Any:
    """What distinguishes a fake value, or a tree of them, from others: their layouts; symbols by name."""
    if isinstance(value, torch.Tensor):
        size, stride, dtype, device = layout(value)
        return metadata(tuple(size)), metadata(stride), dtype, device
    if isinstance(value, (tuple, list)):
        return tuple(metadata(one) for one in value)
    return value.node.expr if isinstance(value, torch.SymInt) else value


def module_path(node: Node) -> str:
    """Dotted path of the innermost module that the node comes from (`model.layers.0.mlp`), or `<graph>`."""
    path, _ = innermost_module(node)
    return path


def innermost_module(node: Node) -> tuple[str, str]:
    """Path and class name of the innermost module that the node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "<graph>", ""
    path, cls = list(stack.values())[-1]
    return clean_path(path), getattr(cls, "__name__", str(cls))


def clean_path(path: str) -> str:
    """`L['self'].model.layers.0.mlp` -> `model.layers.0.mlp`."""
    path = re.sub(r"^L\['\w+'\]", "", path).lstrip(".")
    return path.replace("_modules['", "").replace("']", "") or "<root>"
