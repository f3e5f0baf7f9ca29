"""One rank's life over real sockets with a real model: resumes, repeated decodes, new schedulers, errors."""

import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import structlog
import torch
from msgspec.structs import replace
from single_rank import ALONE, GIB, STEPS, SingleRank, a_seat
from tiny_wan import DEMO, build_tiny_wan

from launch.process import child_environment, python_module
from runtime.config import Config, save_frozen
from runtime.protocol import (
    Checkpoint,
    Checkpointed,
    CheckpointFailed,
    Decode,
    Denoise,
    Done,
    Encode,
    FramesChunk,
    FromScheduler,
    Heartbeat,
    ItemFailed,
    ModelInfo,
    Ready,
    Release,
    SavedState,
    Shutdown,
    ToScheduler,
    Welcome,
    WorkerHello,
)
from runtime.wire import Channel
from workers.frames import FrameSender
from workers.seat import Seat
from workers.spool import Spool
from workers.worker import MAX_REASON, GroupBroken, Heart, Worker, describe, failure_code

PATIENCE_S = 30.0
START_S = 120.0
NEXT_EPOCH = 2


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    folder = build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")
    return SingleRank(folder, tmp_path_factory.mktemp("spool"))


class Mesh:
    """The scheduler's and the gateway's end of one worker that runs in a thread."""

    def __init__(self, rank, sockets, spool_folder):
        self.rank = rank
        self.channel = Channel.bind(f"ipc://{sockets}/s", ToScheduler)
        self.channel.set_epoch(1)
        self.gateway = Channel.bind(f"ipc://{sockets}/g", FramesChunk)
        self.seat = a_seat(self.channel.endpoint)
        self.frames = FrameSender(self.seat.identity)
        self.spool = Spool(self.seat, spool_folder, GIB, rank.model)
        rank.executor.states.clear()
        rank.executor.spool, rank.executor._send_frames = self.spool, self.frames.send
        self.heart = Heart(self.seat)
        self.ready = Ready(0, 0, ModelInfo("m", "m", {}, (), "fp32", "fp32", "cpu", ALONE), 17)
        self.mine = Channel.connect(self.seat.scheduler, FromScheduler, self.seat.identity)
        self.mine.set_epoch(1)
        self.worker = Worker(self.seat, self.mine, rank.executor, self.heart, self.spool, self.ready)
        self.seq, self.ended, self.beats, self.epochs = 0, None, [], []
        self.mine.send(self.seat.hello)
        assert self.hear(WorkerHello)
        self.thread = threading.Thread(target=self._run)
        self.spool.start()
        self.thread.start()

    def _run(self):
        try:
            self.worker.run()
        except GroupBroken as error:
            self.ended = error

    def hear(self, *kinds):
        """The next message that is no heartbeat."""
        while True:
            received = self.channel.receive(PATIENCE_S)
            assert received is not None, f"no {kinds} came"
            self.epochs.append(received.epoch)
            if isinstance(received.message, Heartbeat):
                self.beats.append(received.message)
                continue
            assert isinstance(received.message, kinds), received.message
            return received.message

    def send(self, message, epoch=None):
        self.channel.set_epoch(epoch if epoch is not None else self.worker._epoch)
        self.channel.send(message, to=self.seat.identity)

    def run(self, kind, *args, expect=Done, ranks=(0,), **options):
        """One item, and what the rank says about it."""
        self.seq += 1
        self.send(kind(self.seq, ranks, *args, **options))
        answer = self.hear(expect)
        assert answer.seq == self.seq
        return answer

    def encode(self, *requests, **options):
        return self.run(Encode, requests, **options)

    def denoise(self, steps, *ids, **options):
        return self.run(Denoise, ALONE, ids, steps, **options)

    def decode(self, request, first_chunk=0, chunks=None, attempt=0, **options):
        chunks = len(self.chunks_of(request)) - first_chunk if chunks is None else chunks
        return self.run(Decode, request.id, chunks, self.gateway.endpoint, first_chunk, attempt, **options)

    def chunks_of(self, request):
        return self.rank.card.decode_chunks(request.params)

    def pictures(self, count):
        """(headers, pixels) of so many chunks, as the gateway gets them."""
        received = [self.gateway.receive(PATIENCE_S) for _ in range(count)]
        assert None not in received
        return [one.message for one in received], b"".join(bytes(one.payload) for one in received)

    def checkpoint(self, request):
        """Where the request's state went; the item's report and the spool's come in any order."""
        self.seq += 1
        self.send(Checkpoint(self.seq, (0,), (request.id,)))
        heard = [self.hear(Done, Checkpointed), self.hear(Done, Checkpointed)]
        return next(message.saved for message in heard if isinstance(message, Checkpointed))

    def close(self):
        if self.thread.is_alive():
            self.send(Shutdown())
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        self.spool.close(PATIENCE_S)
        self.frames.close()
        for channel in (self.channel, self.gateway, self.mine):
            channel.close()


@pytest.fixture
def mesh(rank, tmp_path_factory):
    made = Mesh(rank, tmp_path_factory.mktemp("s"), tmp_path_factory.mktemp("spool"))
    yield made
    made.close()


@pytest.fixture
def broken(rank):
    """Have a module's forward do something else first."""
    hooks = []

    def start(module, work):
        def before(*_):
            work()

        hooks.append(module.register_forward_pre_hook(before))

    yield start
    for hook in hooks:
        hook.remove()


def fail(message="it broke", kind=RuntimeError):
    raise kind(message)


# ---- checkpoints and decodes -------------------------------------------------------------------------------------


def test_a_resumed_request_gives_the_same_frames(mesh, rank):
    request = rank.request("r")
    mesh.encode(request)
    mesh.denoise(3, "r")
    saved = mesh.checkpoint(request)
    mesh.denoise(STEPS - 3, "r")
    mesh.decode(request)
    _, expected = mesh.pictures(len(mesh.chunks_of(request)))
    mesh.encode(request, resume={"r": saved})
    assert rank.executor.states["r"].step == saved.step == 3
    mesh.denoise(STEPS - 3, "r")
    mesh.decode(request, attempt=1)
    headers, frames = mesh.pictures(len(mesh.chunks_of(request)))
    assert frames == expected
    assert {header.attempt for header in headers} == {1}


def test_one_bad_checkpoint_leaves_no_state_of_the_item(mesh, rank, tmp_path):
    one, two = rank.request("one"), rank.request("two")
    gone = SavedState(3, str(tmp_path / "gone.safetensors"), 1)
    failure = mesh.encode(one, two, resume={"two": gone}, expect=ItemFailed)
    assert (failure.code, failure.group_broken) == ("checkpoint_unusable", False)
    assert "two" in failure.reason
    assert str(tmp_path) not in failure.reason
    assert rank.executor.states == {}
    mesh.encode(one)


def test_a_solver_without_a_list_is_reported_and_the_item_is_done(mesh, rank):
    from diffusers import PNDMScheduler

    mesh.encode(rank.request("r"))
    rank.executor.states["r"].solver = PNDMScheduler()
    mesh.seq += 1
    mesh.send(Checkpoint(mesh.seq, (0,), ("r",)))
    heard = {
        type(message): message for message in (mesh.hear(Done, CheckpointFailed), mesh.hear(Done, CheckpointFailed))
    }
    assert set(heard) == {Done, CheckpointFailed}
    assert "PNDMScheduler" in heard[CheckpointFailed].reason


def test_a_release_removes_state_and_file(mesh, rank):
    request = rank.request("r")
    mesh.encode(request)
    saved = Path(mesh.checkpoint(request).path)
    assert saved.exists()
    mesh.send(Release(0, (0,), ("r",)))
    # A later checkpoint's report says that the removal before it is through.
    mesh.encode(rank.request("next"))
    mesh.checkpoint(rank.request("next"))
    assert not saved.exists()
    assert set(rank.executor.states) == {"next"}


def test_a_decode_begins_anew_as_often_as_it_is_asked(mesh, rank):
    request = rank.request("r", num_frames=9)
    chunks = mesh.chunks_of(request)
    mesh.encode(request)
    mesh.denoise(STEPS, "r")
    latents = rank.executor.states["r"].latents.clone()
    mesh.decode(request, chunks=1)
    mesh.decode(request, first_chunk=1)
    headers, expected = mesh.pictures(len(chunks))
    assert [header.first_frame for header in headers] == [0, 1, 5]
    for attempt, cut in ((1, 1), (2, 2), (3, 3)):
        mesh.decode(request, chunks=cut, attempt=attempt)
        mesh.pictures(cut)
    mesh.decode(request, chunks=2, attempt=4)
    mesh.decode(request, first_chunk=2, attempt=5)
    headers, frames = mesh.pictures(len(chunks))
    assert frames == expected
    assert [(header.attempt, header.first_frame) for header in headers] == [(4, 0), (4, 1), (5, 5)]
    assert torch.equal(rank.executor.states["r"].latents, latents), "another repeat needs them"


def test_a_decode_that_cannot_go_on_there_is_an_error(mesh, rank):
    request = rank.request("r", num_frames=9)
    mesh.encode(request)
    mesh.denoise(STEPS, "r")
    for first_chunk, opened in ((1, 0), (2, 1), (1, 3)):
        if opened:
            mesh.decode(request, chunks=opened)
            mesh.pictures(opened)
        failure = mesh.decode(request, first_chunk=first_chunk, chunks=1, expect=ItemFailed)
        assert (failure.code, failure.group_broken) == ("internal_error", False)
        assert "cannot go on" in failure.reason


def test_the_old_decoder_is_gone_before_the_new_one_is_made(mesh, rank, monkeypatch):
    """Each holds the VAE's cache: two at once are gigabytes more than the scheduler reckons with."""
    request, alive, made = rank.request("r", num_frames=9), [], []
    right = rank.family.decode

    def decode(state, *group):
        alive.append([ref() is not None for ref in made])
        decoder = right(state, *group)
        made.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(rank.family, "decode", decode)
    mesh.encode(request)
    mesh.denoise(STEPS, "r")
    for _ in range(3):
        mesh.decode(request, chunks=1)
    assert alive == [[], [False], [False, False]]
    mesh.pictures(3)


# ---- what a rank tells of its work -------------------------------------------------------------------------------


def test_every_item_is_reported_with_the_memory_that_it_took(mesh, rank):
    request = rank.request("r")
    done = [mesh.encode(request), mesh.denoise(STEPS, "r"), mesh.decode(request)]
    mesh.pictures(len(mesh.chunks_of(request)))
    peaks = [one.peak_bytes for one in done]
    assert peaks == sorted(peaks), "on a CPU the process's own peak, which never falls"
    assert psutil.Process().memory_info().rss / 4 < peaks[0] < psutil.virtual_memory().total


def test_a_line_for_every_stage_of_a_request_ties_it_to_the_call(mesh, rank):
    request = replace(rank.request("r"), trace="req_1", traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01")
    with structlog.testing.capture_logs() as logs:
        mesh.encode(request)
        mesh.denoise(1, "r")
        mesh.denoise(STEPS - 1, "r")
        mesh.decode(request, chunks=1)
        mesh.decode(request, first_chunk=1)
        mesh.pictures(len(mesh.chunks_of(request)))
        # The next report says that everything before it was told.
        mesh.encode(rank.request("next"))
    ours = [entry for entry in logs if entry.get("request") == "r"]
    assert [(entry["stage"], entry["log_level"]) for entry in ours] == [
        ("encode", "debug"), ("denoise", "debug"), ("decode", "debug")
    ]  # fmt: skip
    assert {(entry["trace"], entry["trace_id"]) for entry in ours} == {("req_1", "ab" * 16)}
    assert all(entry["s"] > 0 for entry in ours)


def test_a_failed_item_names_its_requests_and_their_calls(mesh, rank, broken):
    mesh.encode(replace(rank.request("r"), trace="req_1"), rank.request("s"))
    broken(rank.family.denoiser, fail)
    with structlog.testing.capture_logs() as logs:
        mesh.denoise(1, "r", "s", expect=ItemFailed)
    (told,) = [entry for entry in logs if entry["event"] == "item failed"]
    assert told["requests"] == [{"request": "r", "trace": "req_1"}, {"request": "s"}]
    assert "it broke" in told["traceback"]


# ---- epochs ------------------------------------------------------------------------------------------------------


def test_messages_of_another_epoch_are_dropped_and_counted(mesh, rank):
    mesh.encode(rank.request("r"))
    for epoch in (0, NEXT_EPOCH):
        mesh.send(Release(0, (0,), ("r",)), epoch=epoch)
        mesh.send(Denoise(99, (0,), ALONE, ("r",), 1), epoch=epoch)
        mesh.send(Shutdown(), epoch=epoch)
    mesh.denoise(1, "r")
    assert mesh.worker.stale == 6
    assert rank.executor.states["r"].step == 1


def test_a_new_scheduler_finds_a_rank_that_begins_anew(mesh, rank):
    request = rank.request("r")
    mesh.encode(request)
    mesh.denoise(2, "r")
    saved = mesh.checkpoint(request)
    mesh.send(Welcome(NEXT_EPOCH), epoch=NEXT_EPOCH)
    mesh.epochs.clear()
    assert mesh.hear(WorkerHello) == WorkerHello(0, 1, 0, "here", 4711)
    assert mesh.hear(Ready) == mesh.ready, "model, budget and measurements as at the start"
    assert rank.executor.states == {}
    mesh.send(Denoise(99, (0,), ALONE, ("r",), 1), epoch=1)
    # Its answer to our hello, and one more for another stale heartbeat.
    mesh.send(Welcome(NEXT_EPOCH), epoch=NEXT_EPOCH)
    mesh.send(Welcome(NEXT_EPOCH), epoch=NEXT_EPOCH)
    mesh.encode(request, resume={"r": saved})
    assert rank.executor.states["r"].step == 2, "what is in the spool outlives a scheduler"
    mesh.checkpoint(request)
    assert set(mesh.epochs) == {NEXT_EPOCH}
    assert mesh.heart.epoch == NEXT_EPOCH
    assert mesh.worker.stale == 1


def test_the_heart_says_where_it_beats_and_goes_on_during_an_item(mesh, rank, broken):
    beaten = threading.Event()
    broken(rank.family.denoiser, lambda: beaten.wait(PATIENCE_S) or fail())
    mesh.encode(rank.request("r"))
    mesh.heart.start()
    mesh.seq += 1
    mesh.send(Denoise(mesh.seq, (0,), ALONE, ("r",), 1))
    busy = []
    while len(busy) < 2:
        received = mesh.channel.receive(PATIENCE_S)
        if received.message.busy_seq == mesh.seq:
            busy.append(received)
    assert busy[0].message == Heartbeat(0, 0, mesh.seq, "here", 4711)
    assert busy[0].sender == mesh.seat.identity + b"/heart"
    mesh.heart.epoch = NEXT_EPOCH
    while mesh.channel.receive(PATIENCE_S).epoch != NEXT_EPOCH:
        pass
    beaten.set()
    mesh.hear(Done)


def test_a_seat_says_hello_as_it_was_taken():
    assert a_seat().hello == WorkerHello(0, 1, 0, "here", 4711)
    assert isinstance(a_seat(), Seat)


# ---- as a process ------------------------------------------------------------------------------------------------


class Process:
    """`python -m workers`, one life of one rank, and the scheduler's end of its sockets."""

    def __init__(self, channel, folder, config_file, epoch):
        command = python_module("workers", "--scheduler", channel.endpoint, "--config", str(config_file))
        environment = child_environment({"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"})
        self.channel = channel
        self.process = subprocess.Popen([*command, "--model-folder", str(folder)], env=environment)
        hello = self.channel.receive(START_S)
        self.identity = hello.sender
        assert hello.message.pid == self.process.pid
        self.channel.set_epoch(epoch)
        self.channel.send(Welcome(epoch), to=self.identity)
        self.hear(Ready)

    def hear(self, kind, where=lambda message: True):
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            received = self.channel.receive(START_S)
            assert received is not None
            assert not isinstance(received.message, ItemFailed), received.message
            if isinstance(received.message, kind) and where(received.message):
                return received.message
        raise AssertionError(f"no {kind} came")

    def run(self, item):
        self.channel.send(item, to=self.identity)
        return self.hear(Done, lambda done: done.seq == item.seq)


@pytest.mark.slow
def test_a_rank_that_is_killed_goes_on_in_its_next_life_and_under_the_next_scheduler(rank, tmp_path, tmp_path_factory):
    """Real processes: kill -9 after a checkpoint, and a scheduler of another epoch; the frames are the same bytes."""
    sockets, config_file = tmp_path_factory.mktemp("s"), tmp_path / "config.json"
    save_frozen(Config(device="cpu", spool_dir=str(tmp_path / "spool")), config_file)
    channel = Channel.bind(f"ipc://{sockets}/s", ToScheduler)
    gateway = Channel.bind(f"ipc://{sockets}/g", FramesChunk)
    request = rank.request("r")
    chunks = len(rank.card.decode_chunks(request.params))

    def frames():
        return b"".join(bytes(gateway.receive(PATIENCE_S).payload) for _ in range(chunks))

    life = Process(channel, DEMO, config_file, epoch=1)
    life.run(Encode(1, (0,), (request,)))
    life.run(Denoise(2, (0,), ALONE, ("r",), 3))
    channel.send(Checkpoint(3, (0,), ("r",)), to=life.identity)
    saved = life.hear(Checkpointed).saved
    life.run(Denoise(4, (0,), ALONE, ("r",), STEPS - 3))
    life.run(Decode(5, (0,), "r", chunks, gateway.endpoint))
    expected = frames()
    life.process.kill()
    life.process.wait(PATIENCE_S)

    life = Process(channel, DEMO, config_file, epoch=1)
    life.run(Encode(1, (0,), (request,), {"r": saved}))
    life.run(Denoise(2, (0,), ALONE, ("r",), STEPS - 3))
    life.run(Decode(3, (0,), "r", chunks, gateway.endpoint))
    assert frames() == expected

    beat = life.hear(Heartbeat)
    assert (beat.host, beat.pid) == (socket.gethostname(), life.process.pid)
    channel.set_epoch(NEXT_EPOCH)
    channel.send(Welcome(NEXT_EPOCH), to=life.identity)
    assert life.hear(WorkerHello).pid == life.process.pid
    assert life.hear(Ready).model.name == "demo"
    life.run(Encode(1, (0,), (request,), {"r": saved}))
    life.run(Denoise(2, (0,), ALONE, ("r",), STEPS - 3))
    life.run(Decode(3, (0,), "r", chunks, gateway.endpoint, 0, 2))
    assert frames() == expected
    channel.send(Release(0, (0,), ("r",)), to=life.identity)
    channel.send(Shutdown(), to=life.identity)
    assert life.process.wait(PATIENCE_S) == 0
    assert list((tmp_path / "spool").iterdir()) == []
    channel.close()
    gateway.close()


# ---- errors ------------------------------------------------------------------------------------------------------


def test_only_a_shared_forward_breaks_the_group(mesh, rank, broken):
    mesh.encode(rank.request("r"))
    broken(rank.family.denoiser, fail)
    failure = mesh.denoise(1, "r", ranks=(0, 1), expect=ItemFailed)
    assert (failure.code, failure.group_broken, failure.reason) == ("internal_error", True, "RuntimeError: it broke")
    mesh.thread.join(PATIENCE_S)
    assert isinstance(mesh.ended, GroupBroken)


@pytest.mark.parametrize(("steps", "breaks"), [(1, False), (3, True)])
def test_a_solver_that_fails_before_the_last_step_leaves_the_others_in_the_next(mesh, rank, steps, breaks):
    request = rank.request("r")
    mesh.encode(request)
    solver = SimpleNamespace(timesteps=torch.ones(9), step=lambda *_, **__: fail())
    rank.executor.states["r"].solver = solver
    assert mesh.denoise(steps, "r", ranks=(0, 1), expect=ItemFailed).group_broken is breaks


def test_a_forward_alone_breaks_nobody(mesh, rank, broken):
    mesh.encode(rank.request("r"))
    broken(rank.family.denoiser, fail)
    assert not mesh.denoise(1, "r", expect=ItemFailed).group_broken
    mesh.encode(rank.request("s"))


def test_a_lost_gpu_ends_the_rank_though_it_was_alone(mesh, rank, broken):
    """Every later call on the device would fail too, and the rank would look alive."""
    mesh.encode(rank.request("r"))
    broken(rank.family.denoiser, lambda: fail("CUDA error: an illegal memory access", torch.AcceleratorError))
    assert mesh.denoise(1, "r", expect=ItemFailed).group_broken
    mesh.thread.join(PATIENCE_S)
    assert isinstance(mesh.ended, GroupBroken)


@pytest.mark.parametrize("where", ["inputs", "solver", "encode", "decode", "unknown request"])
def test_elsewhere_an_error_costs_the_item_alone(mesh, rank, broken, monkeypatch, where):
    """On two ranks too: no other rank waits for this one there."""
    bystander = rank.request("bystander")
    mesh.encode(bystander)
    mesh.encode(rank.request("r"))
    mesh.denoise(1, "bystander")
    before = rank.executor.states["bystander"].latents.clone()
    ranks = (0, 1)
    match where:
        case "inputs":
            rank.executor.states["r"].embeddings.clear()
            failure = mesh.denoise(1, "r", ranks=ranks, expect=ItemFailed)
        case "solver":
            rank.executor.states["r"].solver = SimpleNamespace(timesteps=torch.ones(9), step=lambda *_, **__: fail())
            failure = mesh.denoise(1, "r", ranks=ranks, expect=ItemFailed)
        case "encode":
            broken(rank.family.text_encoder, fail)
            failure = mesh.encode(rank.request("s"), ranks=ranks, expect=ItemFailed)
        case "decode":
            broken(rank.family.vae.decoder, fail)
            failure = mesh.decode(rank.request("r"), ranks=ranks, expect=ItemFailed)
        case _:
            failure = mesh.denoise(1, "nobody", ranks=ranks, expect=ItemFailed)
    assert (failure.code, failure.group_broken) == ("internal_error", False)
    assert torch.equal(rank.executor.states["bystander"].latents, before)
    mesh.denoise(1, "bystander")


def test_out_of_memory_is_said_so_and_lets_go_of_the_memory(mesh, rank, broken, monkeypatch):
    """A real refusal of the allocator, in the middle of a forward that holds a tensor: gone before it is reported."""
    held, alive, send = [], [], mesh.mine.send

    def exhaust():
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        torch.empty(1 << 60)

    def report(message):
        alive.append([ref() for ref in held])
        send(message)

    mesh.encode(rank.request("r"))
    broken(rank.family.denoiser, exhaust)
    monkeypatch.setattr(mesh.mine, "send", report)
    failure = mesh.denoise(1, "r", expect=ItemFailed)
    assert (failure.code, failure.group_broken) == ("out_of_memory", False)
    assert alive == [[None]]
    mesh.encode(rank.request("s"))


def test_errors_travel_short_and_without_the_machines_paths():
    long = describe(RuntimeError("x" * 1000))
    assert len(long) == MAX_REASON
    error = FileNotFoundError(2, "No such file or directory", "/home/somebody/models/wan/vae/config.json")
    assert describe(error) == "FileNotFoundError: [Errno 2] No such file or directory: 'config.json'"
    assert describe(ValueError("a\n  b/c and 1/2, see https://example.org/a/b")) == (
        "ValueError: a b/c and 1/2, see https://example.org/a/b"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("a shape is wrong"), "internal_error"),
    ],
)
def test_codes(error, code):
    assert failure_code(error) == code


def test_a_rank_ends_with_any_of_its_threads():
    code = (
        "import threading, time\n"
        "from workers.__main__ import die_with_thread\n"
        "threading.excepthook = die_with_thread\n"
        "threading.Thread(target=lambda: 1 / 0, name='frames').start()\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "a thread died, and the rank with it" in done.stdout + done.stderr
