"""Misses: modules whose class says that an op should have been raised there, and was not."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph

from qwenopt.graphs import spelling
from qwenopt.graphs.context import Context
from qwenopt.report import Miss

# Ending of a module's class name -> what should have been raised inside it: for each, the op, or the others that may
# stand for it. The class is a hint for the report only; it never decides a rewrite.
_EXPECTED: dict[str, tuple[tuple[str, ...], ...]] = {
    "RMSNorm": (("rms_norm", "add_rms_norm", "qk_norm_rope"),),
    "Attention": (("attention", "paged_attention"), ("qk_norm_rope",)),
    "MLP": (("silu_mul",),),
    "Experts": (("moe_experts",),),
    "Router": (("moe_route",),),
}


def modules_of(graph: Graph) -> dict[str, str]:
    """Path -> class name of every module that some node of the graph comes from."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            found[spelling.clean_path(path)] = getattr(cls, "__name__", str(cls))
    return found


def is_qwen3(modules: dict[str, str]) -> bool:
    """Whether any module's class is one of Qwen3's."""
    return any(name.startswith("Qwen3") for name in modules.values())


def misses(ctx: Context, modules: dict[str, str], disable: Collection[str]) -> list[Miss]:
    """One miss for each module whose class promises an op that was not raised there, with the closest reason."""
    raised = {(s.op, s.module) for s in ctx.sites}
    found = []
    for path, cls in modules.items():
        for ending, wanted in _EXPECTED.items():
            if not cls.endswith(ending):
                continue
            for ops in wanted:
                if ops[0] not in disable and not _covered(path, ops, raised):
                    found.append(Miss(ops[0], path, _reason(ctx, ops, path)))
    return found


def _covered(path: str, ops: tuple[str, ...], raised: Collection[tuple[str, str]]) -> bool:
    """Whether one of the ops was raised in the module, or around it (a query norm inside qk_norm_rope's attention)."""
    parent = path.rpartition(".")[0]
    return any((op, where) in raised for op in ops for where in (path, parent))


def _reason(ctx: Context, ops: tuple[str, ...], path: str) -> str:
    for op in ops:
        for node, reason in reversed(ctx.failures.get(op, [])):
            where = spelling.module_path(node)
            if where == path or where.startswith(path + "."):
                return reason
    return "no node that the pattern starts from"
