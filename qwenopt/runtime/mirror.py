"""Mirror: a tensor that the host writes before each call; sent to the device when it changes, without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Mirror:
    """`tensor` and, where it lies on a GPU, its pinned twin on the host.

    What is computed next on the same stream sees what was written. Copies from pageable memory would make the host wait
    for the device, and a step writes several small tensors.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._is_apart = tensor.device.type == "cuda"
        self._host = tensor
        if self._is_apart:
            self._host = torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
        self._sent: torch.cuda.Event | None = None

    def write(self, values: Sequence[object]) -> None:
        """Put values, nested as the tensor is, at its beginning; of several rows, at the beginning of each."""
        new = torch.tensor(values, dtype=self.tensor.dtype)
        place = self._host[..., : new.shape[-1]]
        if not self._is_apart:
            place.copy_(new)
        elif not torch.equal(place, new):
            self._wait()
            place.copy_(new)
            self.tensor.copy_(self._host, non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record()

    def _wait(self) -> None:
        """Until what was sent last has left the host's memory; it has, where a result of that call was read since."""
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None
