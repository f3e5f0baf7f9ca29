"""The most memory that this rank held: on CUDA what torch had allocated during an item, else the process's peak."""

from __future__ import annotations

import resource

import torch


def reset_peak() -> None:
    """Begin to look for the peak anew; without CUDA there is only the process's own, which nothing resets."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Since the last reset, bytes."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
