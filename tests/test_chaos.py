"""Nothing lost, nothing twice: real processes of one server are killed and suspended under load, and requests that kill
their rank or exhaust its memory are planted among others. `python -m bench.chaos` has the whole matrix."""

from __future__ import annotations

import os
import textwrap

import pytest

from bench.chaos import CASE_S, Case, longest_pause, served, steps_again
from bench.clients import Clients, Spec
from launch.process import HOME
from runtime.trace import TraceLine

SPECS = (
    Spec(prompt="a red circle moving right", steps=30, seed=1),
    Spec(prompt="a green square moving left", steps=30, seed=2),
    Spec(prompt="a blue triangle", steps=24, frames=33, seed=3, guidance=1.0, key="b"),
    Spec(prompt="a yellow star", steps=12, frames=1, seed=4, key="b", follow=False),
)
POISONED, CROWDED, TORN, ENORMOUS = "poisoned", "crowded", "torn", "enormous"
PLANTED = f"""
    import importlib.util, os, signal, sys

    def plant(module):
        import torch

        def step(self, states, layout, **kwargs):
            prompts = " ".join(state.params.prompt for state in states)
            if "{POISONED}" in prompts and states[0].step >= 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if "{CROWDED}" in prompts and len(states) > 1:
                note(f"{CROWDED} {{len(states)}}")
                raise torch.OutOfMemoryError("planted: out of memory")
            if "{TORN}" in prompts and len(states) > 1 and os.environ["RANK"] == "1":
                note(f"{TORN} {{len(states)}}")
                self.in_collectives = True
                raise torch.OutOfMemoryError("planted: out of memory")
            if "{ENORMOUS}" in prompts:
                note(f"{ENORMOUS} {{len(states)}}")
                raise torch.OutOfMemoryError("planted: out of memory")
            real(self, states, layout, **kwargs)

        real, module.Executor.step = module.Executor.step, step

    def note(line):
        with open(os.environ["PLANTED_LOG"], "a") as log:
            log.write(line + "\\n")

    class Planter:
        def find_spec(self, name, path=None, target=None):
            if name != "workers.executor":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), plant(module))
            return spec

    if "RANK" in os.environ:
        sys.meta_path.insert(0, Planter())
"""
"""Ranks with requests that no rank survives, without a line in the product for it."""


@pytest.fixture(scope="module")
def planted_log(tmp_path_factory):
    return tmp_path_factory.mktemp("planted") / "log"


@pytest.fixture(scope="module")
def bench(planted_log):
    """One server for all; at its end nothing may be left."""
    (planted_log.parent / "sitecustomize.py").write_text(textwrap.dedent(PLANTED))
    paths = os.pathsep.join([str(HOME), str(planted_log.parent)])
    with served(SPECS, environment={"PYTHONPATH": paths, "PLANTED_LOG": str(planted_log)}) as bench:
        yield bench
        bench.finish()
        assert bench.broken == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("kill worker1", "denoise"),
        ("kill scheduler", "denoise"),
        ("kill gateway", "decode"),
        ("stop worker0", "decode"),
    ],
)
def test_every_job_completes_once_whoever_dies(bench, fault, phase):
    case = bench.strike(fault, phase)
    assert case.broken == []
    assert case.failed == []
    assert case.completed == len(SPECS)
    assert case.losses >= ("gateway" not in fault)


def run_beside_others(bench, *specs):
    """The ends of these jobs; all others have to complete as ever, and the server goes on."""
    clients = Clients(bench.server.url, CASE_S).start(*specs, *SPECS[:2])
    assert clients.join() == []
    jobs = bench.take(clients, case := Case("planted", specs[0].prompt))
    assert [job.problem for job in jobs] == [""] * len(jobs)
    bench.judge(case, jobs[len(specs) :])
    assert (case.completed, case.broken) == (2, [])
    bench.server.wait_whole()
    return [job.video for job in jobs[: len(specs)]]


@pytest.mark.slow
def test_a_request_that_kills_its_rank_each_time_fails_and_takes_nobody_along(bench):
    (video,) = run_beside_others(bench, Spec(prompt=f"a {POISONED} circle", steps=20))
    assert (video["status"], video["error"]["code"]) == ("failed", "worker_lost")
    assert "3 times, the last time alone" in video["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(("word", "frames"), [(CROWDED, 5), (TORN, 13)])
def test_a_batch_that_runs_out_of_memory_is_halved(bench, planted_log, word, frames):
    pair = [Spec(prompt=f"a {word} circle", steps=20, frames=frames, seed=seed) for seed in (1, 2)]
    videos = run_beside_others(bench, *pair)
    assert [video["status"] for video in videos] == ["completed"] * 2, [video["error"] for video in videos]
    batches = [int(line.split()[1]) for line in planted_log.read_text().splitlines() if line.startswith(word)]
    # In the first batch, and in no larger one ever again; each of two ranks says so at most.
    assert batches
    assert len(batches) <= 2


@pytest.mark.slow
def test_a_request_that_is_too_large_alone_fails_with_advice(bench, planted_log):
    (video,) = run_beside_others(bench, Spec(prompt=f"an {ENORMOUS} circle", steps=20, frames=9))
    assert (video["status"], video["error"]["code"]) == ("failed", "out_of_memory")
    assert "planted: out of memory" in video["error"]["message"]
    assert "--ulysses-degree" in video["error"]["message"], "what would help"
    assert f"{ENORMOUS} 1" in planted_log.read_text()


# ---- the judge ---------------------------------------------------------------------------------------------------


def denoise(seq, first, units, *, epoch=1, ranks=(0, 1)):
    return [TraceLine(epoch, rank, seq, float(seq), seq + 0.5, "Denoise", units, {"a": first}) for rank in ranks]


def test_steps_that_were_done_again_are_counted_and_have_to_be_explained():
    smooth = [*denoise(1, 0, 5), *denoise(2, 5, 5)]
    assert steps_again(smooth, "a", 10, losses=0) == (0, "")
    resumed = [*denoise(1, 0, 5), *denoise(2, 5, 3), *denoise(3, 5, 5)]
    assert steps_again(resumed, "a", 10, losses=1) == (3, "")
    assert steps_again(resumed, "a", 10, losses=0) == (3, "it began again 1 times for 0 losses")
    torn = [*denoise(1, 0, 5), *denoise(2, 5, 3, ranks=(0,)), *denoise(3, 5, 5)]
    assert steps_again(torn, "a", 10, losses=0) == (0, "")
    assert steps_again(smooth, "a", 12, losses=0) == (0, "10 steps were done, of 12")
    assert steps_again([*denoise(1, 0, 5), *denoise(2, 6, 4)], "a", 10, losses=9)[1] == "step 6 came after step 5"


def test_recovery_is_the_longest_pause():
    assert longest_pause([1.0, 2.0, 2.5, 6.0, 6.1, 20.0], begin=2.2, end=9.0) == pytest.approx(3.5)
    assert longest_pause([1.0, 9.0, 9.5], begin=2.0, end=10.0) == pytest.approx(7.0)
    assert longest_pause([1.0], begin=2.0, end=9.0) is None
