"""What is not captured: a graph that reads or computes something on the CPU, whose value a CUDA graph would keep."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from qwenopt.lowering.cuda_graph import why_not


def graph(device: str) -> GraphModule:
    """A tensor of `device`, on the GPU, added to one that is there."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(where: str) -> torch.Tensor:
        with mode:
            return torch.empty(3, device=where)

    g = Graph()

    def noted(node: Node, where: str) -> Node:
        node.meta["example_value"] = fake(where)
        return node

    x, there = noted(g.placeholder("x"), device), noted(g.placeholder("there"), "cuda")
    moved = noted(g.call_method("to", (x, "cuda")), "cuda")
    g.output(noted(g.call_function(torch.add, (moved, there)), "cuda"))
    return GraphModule(torch.nn.Module(), g)


def test_what_lies_on_the_gpu_is_captured() -> None:
    assert why_not(graph("cuda"), []) is None


def test_a_read_of_the_cpu_is_named() -> None:
    reason = why_not(graph("cpu"), [])
    assert "to reads x from the CPU" in str(reason)
