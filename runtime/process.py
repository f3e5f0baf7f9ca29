"""What every process of ours does at birth. Knows nothing of what it will run."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when the thread that started it ends (Linux); elsewhere do nothing.

    Nothing else survives a `kill -9` of the parent: an exit handler never runs then.
    """
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        # The parent died before the call above: there is nobody left to serve.
        os.kill(os.getpid(), signal.SIGKILL)
