"""raised graph  ->  Inductor, with the raised ops inside as custom ops; ops without a kernel are inlined back"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from qwenopt.graphs import Raised


def config_patches(mode: str | None, inductor: Mapping[str, Any]) -> dict[str, Any]:
    """The Inductor configuration of this one compilation: the mode's keys, then the user's."""
    patches: dict[str, Any] = {}
    if mode not in (None, "default"):
        from torch._inductor import list_mode_options

        patches.update(list_mode_options()[mode])
    patches.update({key.replace("-", "_"): value for key, value in inductor.items()})
    return patches


def compile_untouched(gm: GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Plain Inductor. Its result is returned as it is: wrapping it would lose `.serialize`."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs, config_patches=patches or None)  # type: ignore[return-value]


def lower(
    gm: GraphModule, inputs: Sequence[Any], raised: Iterable[Raised], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Bind each raised op to its provider's overload, or trace its reference in its place, and compile."""
    for r in raised:
        if r.provider is not None:
            r.node.target = r.provider.overload
        else:
            # A Python function in the graph is traced into by AOTAutograd, so Inductor sees and fuses what it does.
            r.node.target = r.op.default if r.op.opaque else r.op.reference
    gm.graph.lint()
    gm.recompile()
    return compile_untouched(gm, inputs, patches)
