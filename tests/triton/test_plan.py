"""Which kernels a call launches, by shapes alone, and what it sets aside for them."""

from __future__ import annotations

import pytest
import torch

if not pytest.importorskip("triton", reason="triton is not installed (pip install triton)"):
    raise AssertionError

from qwenopt.triton_kernels.paged_attention import (
    CHUNK,
    DECODE,
    PREFILL,
    PREFILL_HOPPER,
    Device,
    Plan,
    plan,
    workspace,
)

H100, A100 = Device(132, 9), Device(108, 8)


def planned(rows: int, tokens: int, packed: bool = True, device: Device = H100, **sizes: int) -> Plan:
    heads, kv_heads, dim = sizes.get("heads", 32), sizes.get("kv_heads", 8), sizes.get("dim", 128)
    q = torch.empty(1 if packed else rows, heads, tokens, dim, dtype=torch.bfloat16, device="meta")
    return plan(q, kv_heads, rows, packed, device)


@pytest.mark.parametrize("rows", [1, 2, 64, 1000])
@pytest.mark.parametrize("packed", [True, False])
def test_decode_is_the_flat_list_alone(rows: int, packed: bool) -> None:
    found = planned(rows, rows if packed else 1, packed)
    assert (found.flat, found.blocks) == (DECODE[2, 128], None)
    assert found.num_programs == 2 * 132, "the grid and the memory follow the device, not the batch"


def test_a_long_prompt_among_decoding_rows_is_split_by_length() -> None:
    found = planned(8, 4096)
    assert found.flat == DECODE[2, 128]
    assert found.blocks == PREFILL_HOPPER[2, 128]
    assert found.skip == 16 // 4


def test_a_batch_of_prompts_needs_no_flat_list() -> None:
    found = planned(8, 512, packed=False)
    assert (found.num_programs, workspace(found, 128)) == (0, (0, 0))
    assert found.num_blocks == 8 * 512 // 32


def test_a_short_chunk_shares_out_its_keys() -> None:
    found = planned(1, 100, kv_heads=4, heads=32)
    assert (found.flat, found.blocks) == (CHUNK[2, 128], None)


def test_blocks_of_queries_follow_the_device() -> None:
    assert planned(1, 8192, device=A100).blocks == PREFILL[2, 128]
    assert planned(1, 8192, device=H100).blocks == PREFILL_HOPPER[2, 128]


@pytest.mark.parametrize("starts", [[0, 3, 3, 50], [0, 0, 0, 0], [0, 64, 65, 97], [0, 1, 2, 3]])
@pytest.mark.parametrize("block", [1, 3, 16, 32])
def test_numbers_of_blocks_suffice_and_differ(starts: list[int], block: int) -> None:
    # The numbering of `blocks_kernel`, tokens behind the last row among them as one more row.
    num_tokens = starts[-1] + 5
    numbers = []
    for row, (begin, end) in enumerate(zip(starts, [*starts[1:], num_tokens], strict=True)):
        numbers += [begin // block + row + i for i in range(-(-(end - begin) // block))]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < num_tokens // block + len(starts)


def test_workspace_holds_two_blocks_for_each_program() -> None:
    found = planned(4, 4)
    assert workspace(found, 128) == (2 * 264 * 16 * 129, 264 * 5)
    assert workspace(found, 72) == (2 * 264 * 16 * 129, 264 * 5)
