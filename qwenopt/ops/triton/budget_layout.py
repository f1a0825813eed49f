"""What the Triton kernels of budget_step and budget_guard call the numbers of `budget_state`."""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING

from qwenopt.ops import budget_state

if TYPE_CHECKING:
    from qwenopt.triton_kernels.budget_layout import Layout


@functools.cache
def layout() -> Layout:
    """The one layout that there is; tests make others of it."""
    from qwenopt.triton_kernels.budget_layout import Layout, Names

    def numbers(names: type[enum.IntEnum] | type[enum.IntFlag]) -> Names:
        return Names({name: int(member) for name, member in names.__members__.items()})

    return Layout(
        column=numbers(budget_state.Column),
        phase=numbers(budget_state.Phase),
        reason=numbers(budget_state.Reason),
        bit=numbers(budget_state.Bit),
        id=numbers(budget_state.Id),
        signal=numbers(budget_state.Signal),
        num_signals=len(budget_state.Signal),
        width=budget_state.WIDTH,
        ring=budget_state.RING,
        no_id=budget_state.NO_ID,
        max_grace=budget_state.MAX_GRACE,
        max_implicit=budget_state.MAX_IMPLICIT,
        max_eos=budget_state.MAX_EOS,
        missing_shift=budget_state.MISSING_SHIFT,
        hash_factor=budget_state.HASH_FACTOR,
        hash_mask=budget_state.HASH_MASK,
    )
