"""An idle mesh costs nothing: no process spins, polls fast or wakes for nothing."""

import time

import psutil
import pytest

SECONDS = 8.0
LIMIT = 0.01
"""Of one core, per process."""


@pytest.mark.slow
def test_every_process_is_below_one_percent_when_idle(mesh):
    mesh.generate("a red circle", seed=1, num_inference_steps=2)
    time.sleep(2.0)
    processes = [psutil.Process(pid) for pid in mesh.pids.values()]
    processes += [rank for process in processes for rank in process.children(recursive=True)]
    assert len(processes) == 4, "scheduler, torchrun, two ranks"
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(SECONDS)
    for process, start in zip(processes, before, strict=True):
        share = (sum(process.cpu_times()[:2]) - start) / SECONDS
        assert share < LIMIT, f"{process.cmdline()} uses {share:.1%} of a core while idle"
