"""What if a rank dies or hangs, or the whole is stopped? Real processes, real signals, and nothing left behind."""

import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_wan import DEMO

from framemesh import Frames, Generator, Progress, RequestFailed, SamplingParams
from launch.process import child_environment

LONG = SamplingParams(prompt="a red circle moving right", seed=1, num_inference_steps=1000)
MEDIUM = SamplingParams(prompt="a red circle moving right", seed=1, num_inference_steps=50)
SHORT = SamplingParams(prompt="a red circle moving right", seed=2, num_inference_steps=4)
LIMIT_S = 10.0


def rank_process(generator, rank):
    """The process of one rank, found from outside."""
    agent = psutil.Process(generator.pids["workers"])
    ranks = [p for p in agent.children(recursive=True) if "workers" in p.cmdline()]
    return next(p for p in ranks if p.environ().get("RANK") == str(rank))


def start_denoising(stream, step=1):
    """Consume until so many steps were taken; returns how many."""
    for event in stream:
        if isinstance(event, Progress) and event.stage == "denoise" and event.step >= step:
            return event.step
    raise AssertionError("it never denoised")


def fate(stream):
    """(exception, seconds until it came) of a stream that must fail."""
    since = time.monotonic()
    with pytest.raises(RequestFailed) as caught:
        for _ in stream:
            pass
    return caught.value, time.monotonic() - since


def processes_of(pids):
    """Every process below these, and they themselves."""
    found = []
    for pid in pids:
        process = psutil.Process(pid)
        found += [process, *process.children(recursive=True)]
    return found


def assert_all_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive, f"left behind: {[(p.pid, p.cmdline()) for p in alive]}"


@pytest.fixture
def short_tmp(monkeypatch):
    """A temporary folder of our own with a path short enough for sockets; must be empty at the end."""
    folder = Path(tempfile.mkdtemp(prefix="fm"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_costs_its_request_nothing_but_time():
    # Guidance groups are so fast that the last item has begun before the signal comes.
    with Generator.from_pretrained("demo", num_gpus=2, ulysses_degree=2) as generator:
        expected = generator.generate(MEDIUM).frames
        for rank, number in ((0, signal.SIGKILL), (1, signal.SIGSTOP)):
            stream = generator.stream(MEDIUM)
            steps, frames = [start_denoising(stream, step=25)], []
            rank_process(generator, rank).send_signal(number)
            for event in stream:
                if isinstance(event, Progress) and event.stage == "denoise":
                    steps.append(event.step)
                elif isinstance(event, Frames):
                    frames.append(event.pixels)
            again = [after for before, after in pairwise(steps) if after < before]
            assert len(again) == 1, f"{number.name} of rank {rank} was not noticed: {steps}"
            assert again[0] >= 10, "it began again instead of going on from a checkpoint"
            assert np.array_equal(np.concatenate(frames), expected), "what was resumed came out different"


@pytest.mark.slow
def test_a_crash_loop_ends_what_runs_and_what_comes_later_with_the_last_error():
    with Generator.from_pretrained("demo", num_gpus=1, crash_limit=1) as generator:
        stream = generator.stream(LONG)
        start_denoising(stream)
        everything = processes_of(generator.pids.values())
        rank_process(generator, 0).kill()
        for failing in (stream, generator.stream(SHORT)):
            error, _ = fate(failing)
            assert error.code == "mesh_lost"
            assert "worker" in error.reason
    assert_all_gone(everything)


def serve(tmp_path, *flags, model="demo"):
    command = [sys.executable, "-P", "-m", "launch", "serve", "--port", "0", "--model-path", str(model)]
    return subprocess.Popen(
        [*command, "--output-path", str(tmp_path / "outputs"), *flags],
        env=child_environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopping_a_server_leaves_no_process_and_no_socket(tmp_path, short_tmp, number):
    server = serve(tmp_path)
    assert server.stdout.readline().startswith("framemesh serves demo at http://127.0.0.1:")
    everything = processes_of([server.pid])
    assert len(everything) == 5, "launcher, scheduler, torchrun, one rank, gateway"
    server.send_signal(number)
    since = time.monotonic()
    code = server.wait(LIMIT_S)
    assert_all_gone(everything)
    server.communicate()
    if number != signal.SIGKILL:
        assert code == 0
        assert time.monotonic() - since < LIMIT_S
        assert not list(short_tmp.glob("framemesh-*")), "sockets were left behind"
        assert not list(short_tmp.glob("torchelastic*")), "torchrun's folder for logs was left behind"


@pytest.mark.slow
@pytest.mark.parametrize("moment_s", [0.2, 2.0])
def test_a_signal_during_the_start_ends_it_cleanly(tmp_path, short_tmp, moment_s):
    server = serve(tmp_path)
    time.sleep(moment_s)
    everything = processes_of([server.pid])
    server.send_signal(signal.SIGTERM)
    server.wait(LIMIT_S)
    assert_all_gone(everything)
    _, stderr = server.communicate()
    assert "Traceback" not in stderr
    assert not list(short_tmp.glob("framemesh-*"))


@pytest.mark.slow
@pytest.mark.parametrize("moment_s", [2.5, 4.0])
def test_ctrl_c_during_the_start_of_a_generation_leaves_no_task_behind(tmp_path, short_tmp, moment_s):
    command = [sys.executable, "-P", "-m", "launch", "generate", "--prompt", "a", "--num-inference-steps", "900"]
    started = subprocess.Popen(
        command, env=child_environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    time.sleep(moment_s)
    everything = processes_of([started.pid])
    started.send_signal(signal.SIGINT)
    _, stderr = started.communicate(timeout=LIMIT_S)
    assert started.returncode == 130
    assert not re.search("Traceback|ignored|destroyed", stderr), stderr
    assert_all_gone(everything)
    assert not list(short_tmp.glob("framemesh-*"))


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_fails_the_start_with_the_reason(tmp_path, short_tmp):
    folder = tmp_path / "broken"
    shutil.copytree(DEMO, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    command = [sys.executable, "-P", "-m", "launch", "generate", "--model-path", str(folder), "--prompt", "a"]
    done = subprocess.run(
        command, env=child_environment({}), capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "cannot load" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(short_tmp.glob("framemesh-*"))
