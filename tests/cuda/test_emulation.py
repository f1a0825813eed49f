"""The emulation finds what it is there to find, in kernels with one fault each (faulty.cuh)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwenopt.ops.cuda.launch import Launch, Run, pack
from qwenopt.testing import emulated

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if emulated.compiler() is None:
        pytest.skip("no C++ compiler (g++ or clang++)")
    library = tmp_path_factory.mktemp("faulty") / "faulty.so"
    return emulated.build(ROOT / "csrc", library, Path(__file__).with_name("faulty.cuh"))


def launch(library: Path, kernel: str, order: str = "in turn", threads: int = 64) -> Tensor:
    def start(run: Run, out: Tensor) -> None:
        run(Launch(kernel, (1, 1, 1), threads, pack(out)))

    out = torch.full((64,), -7, dtype=torch.int32)
    emulated.Emulation(library, order).call(start, out)
    return out


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_threads_wait_for_one_another(faulty: Path, order: str) -> None:
    assert launch(faulty, "right", order).tolist() == [*reversed(range(64))]


def test_a_missing_barrier_shows_in_another_order(faulty: Path) -> None:
    found = [launch(faulty, "no_barrier", order).tolist() for order in emulated.ORDERS]
    assert all(one != [*reversed(range(64))] for one in found)
    assert found[0] != found[2]


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        ("half_a_barrier_", r"thread \d+ waits for ever in __syncthreads at .*faulty\.cuh:\d+"),
        (
            "half_a_warp_",
            r"threads meet in different places: __shfl_xor_sync at .* and __shfl_xor_sync at .*thread \d+",
        ),
        ("past_the_end_", "a write past the end of a shared variable"),
        ("too_wide_", r"an access at no multiple of its size \(block 0, 0, thread \d+\)"),
        ("a_write_before_", "a write beside a tensor"),
        ("a_read_behind_", r"an access beside a tensor \(block 0, 0, thread 63\)"),
        ("a_part_of_a_warp_", r"__shfl_xor_sync at .* of a part of a warp \(block 0, 0, thread \d+\)"),
        ("unknown", "no kernel unknown"),
    ],
)
def test_a_fault_is_named(faulty: Path, kernel: str, text: str) -> None:
    with pytest.raises(emulated.EmulationError, match=text):
        launch(faulty, kernel)


def test_other_arguments_are_refused(faulty: Path) -> None:
    with pytest.raises(emulated.EmulationError, match="right has arguments of 8 bytes and 64 threads, not 8 and 32"):
        launch(faulty, "right", threads=32)
