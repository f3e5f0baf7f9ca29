"""What is different where work is queued: waiting for it, and copies to the host that nobody waits for.

On CUDA a forward returns when its kernels are queued, not when they have run. On the CPU all of this does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray


def settle(device: torch.device) -> None:
    """Wait until the device has done all that this thread queued, without keeping a core busy meanwhile.

    What the device could not do raises here: without it an item would be reported before it ran, or failed.
    """
    if device.type == "cuda":
        _mark(device).synchronize()


@dataclass(frozen=True)
class HostCopy:
    """A tensor on its way to the host."""

    _values: torch.Tensor
    _done: torch.cuda.Event | None

    def wait(self) -> NDArray[Any]:
        """The values once they are there; any thread may ask."""
        if self._done is not None:
            self._done.synchronize()
        array: NDArray[Any] = self._values.numpy()
        return array


def to_host(tensor: torch.Tensor) -> HostCopy:
    """Copied after all work that is queued on the device, into pinned memory; a CPU tensor is what it is.

    torch pools pinned blocks and hands one out again only when its copies are done.
    """
    if tensor.device.type != "cuda":
        return HostCopy(tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return HostCopy(host, _mark(tensor.device))


def _mark(device: torch.device) -> torch.cuda.Event:
    """The end of what this thread has queued; who waits for it sleeps."""
    mark = torch.cuda.Event(blocking=True)
    mark.record(torch.cuda.current_stream(device))
    return mark
