"""The spool: what is reported as written can be read, a full or lost disk costs a checkpoint and never the rank."""

import errno
import fcntl
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from ranks import ROOT
from single_rank import GIB, a_seat
from tiny_wan import DEMO

from runtime.models.card import card_for, read_configs
from runtime.protocol import Checkpointed, CheckpointFailed, Request, SavedState, ToScheduler
from runtime.sampling import SamplingParams
from runtime.wire import Channel
from workers.checkpoint import digest
from workers.spool import Spool, SpoolFolder, SpoolFull
from workers.state import RequestState

PATIENCE_S = 20.0
CARD = card_for(read_configs(DEMO))
PARAMS = CARD.check(SamplingParams(prompt="a cat", seed=1, num_inference_steps=50))


def a_state(request_id="a", step=0, value=0.0, width=8):
    """A request at some step, without a model; 128 KiB for a width of 2048."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    solver = FlowMatchEulerDiscreteScheduler()
    solver.set_timesteps(PARAMS.num_inference_steps)
    solver._step_index = step
    state = RequestState(Request(request_id, PARAMS), torch.full((1, 4, 2, 2, width), value), solver, {})
    state.generator, state.step = torch.Generator(), step
    return state


class Stage:
    """A spool, and the scheduler's end of its socket."""

    def __init__(self, folder, sockets, max_bytes=GIB, max_waiting=64, model="m"):
        self.channel = Channel.bind(f"ipc://{sockets}/s", ToScheduler)
        self.spool = Spool(a_seat(self.channel.endpoint), folder, max_bytes, model, max_waiting)

    def hear(self):
        received = self.channel.receive(PATIENCE_S)
        assert received is not None, "the spool said nothing"
        return received.message

    def saved(self, state):
        """Where the state went."""
        self.spool.save(state)
        message = self.hear()
        assert isinstance(message, Checkpointed), message
        assert (message.rank, message.request_id, message.saved.step) == (0, state.request.id, state.step)
        return message.saved

    def refused(self, state):
        self.spool.save(state)
        message = self.hear()
        assert isinstance(message, CheckpointFailed), message
        assert (message.rank, message.request_id, message.step) == (0, state.request.id, state.step)
        return message.reason

    def settle(self):
        """Until everything in line is done: reports come in order."""
        self.spool.save(a_state("settled"))
        while True:
            message = self.hear()
            if message.request_id == "settled":
                return message


@pytest.fixture
def stage(tmp_path, tmp_path_factory):
    stages = []

    def start(folder=tmp_path / "spool", run=True, **options):
        stages.append(Stage(folder, tmp_path_factory.mktemp("s"), **options))
        if run:
            stages[-1].spool.start()
        return stages[-1]

    yield start
    for one in stages:
        if one.spool.is_alive():
            one.spool.close(PATIENCE_S)
            assert not one.spool.is_alive()
        one.channel.close()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def name_of(request_id, step):
    return f"{digest(request_id)}-{step}.safetensors"


def eventually(condition):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.002)


# ---- what goes well ----------------------------------------------------------------------------------------------


def test_a_saved_state_is_read_back_and_takes_the_place_of_the_older_one(stage, tmp_path):
    mesh = stage()
    for step in (10, 20, 30):
        saved = mesh.saved(a_state(step=step, value=float(step)))
        assert saved.bytes == Path(saved.path).stat().st_size
    eventually(lambda: files(tmp_path / "spool") == [name_of("a", 30)])
    back = a_state()
    mesh.spool.resume(back, saved)
    assert (back.step, back.solver._step_index) == (30, 30)
    assert torch.equal(back.latents, torch.full_like(back.latents, 30))


def test_a_new_life_replaces_what_an_earlier_one_wrote(stage, tmp_path):
    stage().saved(a_state(step=10))
    later = stage()
    later.saved(a_state(step=20))
    eventually(lambda: files(tmp_path / "spool") == [name_of("a", 20)])


def test_release_removes_the_files_of_every_life_and_nobody_elses(stage, tmp_path):
    folder = tmp_path / "spool"
    stage().saved(a_state("a", step=10))
    mesh = stage()
    mesh.saved(a_state("b", step=10))
    mesh.saved(a_state("a" * 64, step=10))
    mesh.spool.release(("a", "never heard of"))
    eventually(lambda: files(folder) == sorted([name_of("b", 10), name_of("a" * 64, 10)]))


@pytest.mark.parametrize("request_id", ["../../escaped", "/etc/passwd", "a\0b", "*", "ü" * 500, "", "x/../y"])
def test_no_id_leaves_the_folder(stage, tmp_path, request_id):
    mesh = stage()
    bystander = mesh.saved(a_state("bystander"))
    saved = mesh.saved(a_state(request_id, step=3))
    assert Path(saved.path).parent == tmp_path / "spool"
    assert files(tmp_path) == ["spool"]
    mesh.spool.resume(a_state(request_id), saved)
    mesh.spool.release((request_id,))
    eventually(lambda: files(tmp_path / "spool") == [Path(bystander.path).name])


def test_names_are_digests():
    assert digest("a") == hashlib.sha256(b'"a"').hexdigest()


def test_what_is_in_line_for_a_released_request_is_never_written(stage, tmp_path):
    mesh = stage(run=False)
    mesh.spool.save(a_state("a", step=1))
    mesh.spool.save(a_state("b", step=1))
    mesh.spool.release(("a",))
    mesh.spool.start()
    assert isinstance(mesh.hear(), Checkpointed)
    assert mesh.settle().request_id == "settled"
    assert files(tmp_path / "spool") == sorted([name_of("b", 1), name_of("settled", 0)])


def test_a_request_may_come_back_after_its_release(stage, tmp_path):
    mesh = stage(run=False)
    mesh.spool.save(a_state("a", step=20))
    mesh.spool.release(("a",))
    mesh.spool.save(a_state("a", step=5))
    mesh.spool.start()
    assert mesh.hear().saved.step == 5
    assert files(tmp_path / "spool") == [name_of("a", 5)]


def test_nothing_waits_for_the_disk(stage):
    """With a writer that does not move at all; in each place the newest of a request."""
    mesh = stage(run=False, max_waiting=2)
    mesh.spool.save(a_state("a", step=10))
    mesh.spool.save(a_state("b", step=10))
    mesh.spool.save(a_state("c", step=10))
    mesh.spool.save(a_state("a", step=20))
    mesh.spool.start()
    heard = [mesh.hear() for _ in range(4)]
    first, second = heard[:2]
    assert isinstance(first, CheckpointFailed)
    assert (first.request_id, first.step, first.reason) == (
        "c",
        10,
        "the disk is slow: 2 checkpoints are in line before it",
    )
    assert isinstance(second, CheckpointFailed)
    assert (second.request_id, second.step) == ("a", 10)
    assert [(message.request_id, message.saved.step) for message in heard[2:]] == [("a", 20), ("b", 10)]


def test_a_snapshot_is_of_the_moment_of_the_call(stage):
    mesh = stage(run=False)
    state = a_state(step=10, value=1.0)
    mesh.spool.save(state)
    state.latents, state.step, state.solver._step_index = state.latents + 1, 11, 11
    state.generator.manual_seed(99)
    mesh.spool.start()
    saved, back = mesh.hear().saved, a_state()
    mesh.spool.resume(back, saved)
    assert (back.step, back.latents.flatten()[0].item()) == (10, 1.0)
    assert torch.equal(back.generator.get_state(), torch.Generator().get_state())


def test_reports_carry_the_epoch_of_now(stage):
    mesh = stage()
    mesh.spool.save(a_state("a"))
    received = mesh.channel.receive(PATIENCE_S)
    assert (received.epoch, received.sender) == (1, b"worker0/spool")
    mesh.spool.epoch = 2
    mesh.spool.save(a_state("b"))
    assert mesh.channel.receive(PATIENCE_S).epoch == 2


def test_an_unknown_solver_is_reported_each_time_and_logged_once(stage, tmp_path, capsys):
    from diffusers import PNDMScheduler

    mesh = stage()
    state = a_state(step=7)
    state.solver = PNDMScheduler()
    for state.step in (10, 20):
        assert "PNDMScheduler" in mesh.refused(state)
    assert capsys.readouterr().out.count("no checkpoints with PNDMScheduler") == 1
    assert not (tmp_path / "spool").exists()


def test_a_written_snapshot_keeps_no_tensor(stage):
    mesh = stage()
    state = a_state()
    latents = weakref.ref(state.latents)
    mesh.saved(state)
    del state
    eventually(lambda: latents() is None)


def test_closing_writes_what_is_in_line(stage, tmp_path):
    mesh = stage(run=False)
    mesh.spool.save(a_state("a"))
    mesh.spool.save(a_state("b"))
    mesh.spool.start()
    mesh.spool.close(PATIENCE_S)
    assert files(tmp_path / "spool") == sorted([name_of("a", 0), name_of("b", 0)])


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_the_limit_counts_what_was_there_before_and_what_others_write(stage, tmp_path):
    folder = tmp_path / "spool"
    size = stage().saved(a_state("leftover")).bytes
    mesh = stage(max_bytes=3 * size + 100)
    mesh.saved(a_state("a", step=1))
    stage().saved(a_state("of another rank"))
    reason = mesh.refused(a_state("a", step=2))
    assert reason.startswith("the spool is full: ")
    assert len(files(folder)) == 3
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3 * size + 100
    mesh.spool.release(("leftover",))
    mesh.saved(a_state("a", step=3))
    eventually(lambda: name_of("a", 1) not in files(folder))


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no mount without privileges: {done.stderr.decode()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(stage, small_disk):
    folder = small_disk / "spool"
    mesh = stage(folder)
    saved = mesh.saved(a_state("a", step=1, width=2048))
    reason = mesh.refused(a_state("a", step=2, width=2048))
    assert reason == f"cannot write to the spool: {os.strerror(errno.ENOSPC)}"
    assert files(folder) == [name_of("a", 1)], "the half file is gone, the older one still holds"
    mesh.spool.resume(a_state("a", width=2048), saved)
    mesh.spool.release(("a",))
    mesh.saved(a_state("a", step=3, width=2048))


def test_a_folder_that_nobody_may_write_to(stage, small_disk):
    folder = small_disk / "spool"
    folder.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    mesh = stage(folder)
    assert mesh.refused(a_state("a")) == f"cannot write to the spool: {os.strerror(errno.EROFS)}"
    mesh.spool.release(("a",))
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    mesh.saved(a_state("a"))


def test_a_folder_that_cannot_be_made(stage, tmp_path):
    (tmp_path / "file").write_text("in the way")
    mesh = stage(tmp_path / "file" / "spool")
    assert mesh.refused(a_state("a")).startswith("cannot write to the spool: ")
    mesh.spool.release(("a",))
    assert mesh.refused(a_state("b"))


@pytest.fixture
def nobody():
    """Call it to lose root's right to write everywhere, until the end of the test."""
    yield lambda: os.geteuid() or os.seteuid(65534)
    os.seteuid(os.getuid())


def test_a_folder_of_somebody_else(stage, nobody):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        mesh = stage(Path(folder))
        state = a_state()
        state.solver = None
        mesh.refused(state)
        # Connected by now; from here on it is about the folder alone.
        nobody()
        assert mesh.refused(a_state()) == f"cannot write to the spool: {os.strerror(errno.EACCES)}"
        os.seteuid(os.getuid())


def test_a_folder_that_vanished_is_not_made_again(stage, tmp_path):
    """It may be a mount that was lost: below it lies another disk."""
    mesh = stage()
    saved = mesh.saved(a_state("a"))
    Path(saved.path).unlink()
    (tmp_path / "spool").rmdir()
    assert mesh.refused(a_state("a", step=1)) == f"cannot write to the spool: {os.strerror(errno.ENOENT)}"
    mesh.spool.release(("a",))
    (tmp_path / "spool").mkdir()
    mesh.saved(a_state("a", step=2))


def test_a_file_that_is_too_large_for_the_process(stage, tmp_path):
    mesh = stage()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        reason = mesh.refused(a_state("a", width=2048))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reason == f"cannot write to the spool: {os.strerror(errno.EFBIG)}"
    assert files(tmp_path / "spool") == []


def test_a_state_that_cannot_be_copied_costs_one_checkpoint(stage):
    mesh = stage()
    state = a_state("a")
    state.latents = torch.empty(1, device="meta")
    assert "meta" in mesh.refused(state)
    mesh.saved(a_state("a"))


# ---- who is killed -----------------------------------------------------------------------------------------------


def test_what_has_a_final_name_is_whole_whenever_the_writer_was_killed(tmp_path):
    folder, lives = tmp_path / "spool", 60
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(ROOT / "tests" / "spool_killed.py"), str(folder), str(lives)]
    subprocess.run(script, env=environment, check=True, timeout=120)
    seen = list(folder.iterdir())
    whole = [path for path in seen if path.suffix == ".safetensors"]
    torn = [path for path in seen if path.suffix == ".tmp"]
    assert len(whole) + len(torn) == len(seen)
    assert whole
    for path in whole:
        data = path.read_bytes()
        assert len(data) == 8 + int.from_bytes(data[:8], "little"), f"{path.name} is torn"
    assert torn, "no writer was killed while it wrote: the test has seen nothing"
    SpoolFolder(folder, GIB).sweep()
    assert sorted(folder.iterdir()) == sorted(whole)


def test_the_sweep_leaves_alone_what_is_being_written(stage, tmp_path):
    folder = tmp_path / "spool"
    folder.mkdir()
    (folder / "dead.safetensors.1.tmp").write_bytes(b"half")
    with open(folder / "alive.safetensors.2.tmp", "xb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        stage().settle()
        assert files(folder) == sorted(["alive.safetensors.2.tmp", name_of("settled", 0)])


def test_ranks_share_a_folder(tmp_path):
    """Two writers, one request: whoever is second replaces the same bytes, and nobody trips over the other."""
    folder, errors = tmp_path / "spool", []

    def rank():
        spool = SpoolFolder(folder, GIB)
        try:
            for step in range(100):
                path = spool.write("a", step, b"x" * 1000)
                spool.sweep()
                spool.remove("a", keep=path)
        except (OSError, SpoolFull) as error:
            errors.append(error)

    threads = [threading.Thread(target=rank) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert name_of("a", 99) in files(folder)


def test_a_path_is_all_that_a_resume_needs(stage, tmp_path):
    """The scheduler hands it to another life of the rank, in another folder."""
    saved = stage().saved(a_state("a", step=4))
    elsewhere = stage(tmp_path / "elsewhere")
    elsewhere.spool.resume(a_state("a"), SavedState(saved.step, saved.path, saved.bytes))
    assert Path(saved.path).is_absolute()
