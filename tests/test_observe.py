"""Looking at a mesh: what a snapshot tells, which meshes are found, how requests are cancelled from a shell."""

import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import structlog
from fake_mesh import EPOCH, demo_model
from rich.console import Console

from framemesh import Progress, RequestFailed, SamplingParams
from launch import observe
from launch.cli import main
from launch.observe import (
    GATEWAY,
    MESH_FILE,
    Observer,
    Outcome,
    RunFolder,
    observe_mesh,
    read_mesh_file,
    sweep_dead_folders,
)
from launch.process import child_environment
from launch.top import view
from runtime.cost import CostModel
from runtime.engine import Engine
from runtime.errors import FramemeshError, InvalidInput, NotReady
from runtime.layout import Layout
from runtime.models.card import card_for
from runtime.protocol import (
    Cancelled,
    Completed,
    Decode,
    Denoise,
    Done,
    Encode,
    FromScheduler,
    GatewayHello,
    Observe,
    Ready,
    Request,
    Status,
    Stored,
    Submit,
    ToScheduler,
    Welcome,
    WorkerHello,
)
from runtime.scheduler import Scheduler
from runtime.status import MOST_QUEUED
from runtime.wire import Channel, incarnation

CARD = card_for(demo_model().configs)
BUDGET = 8 << 30
PATIENCE_S = 10.0


class Peer:
    """A worker or a gateway that says what the test wants."""

    def __init__(self, endpoint, role, hello):
        self.channel = Channel.connect(endpoint, FromScheduler, incarnation(role))
        self.channel.send(hello)
        self.channel.set_epoch(self.wait_for(Welcome).epoch)

    def wait_for(self, kind):
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            received = self.channel.receive(0.1)
            if received is not None and isinstance(received.message, kind):
                return received.message
        raise AssertionError(f"no {kind.__name__} came")


class LiveScheduler:
    """A real Engine in a thread, in a run folder of its own."""

    def __init__(self):
        self.folder = RunFolder("demo")
        self.endpoint = f"ipc://{self.folder.path}/scheduler"
        channel = Channel.bind(self.endpoint, ToScheduler)
        self.scheduler = Scheduler(CARD, Layout(1, 1, 2), CostModel(CARD))
        self.engine = Engine(channel, self.scheduler, EPOCH)
        self.steps = 0
        self.ended = False
        self.peers = []
        self.thread = threading.Thread(target=self.loop, args=(channel,))
        self.thread.start()

    def loop(self, channel):
        while not self.ended:
            self.engine.step()
            self.steps += 1
        channel.close()

    def peer(self, role, hello):
        self.peers.append(Peer(self.endpoint, role, hello))
        return self.peers[-1]

    def workers(self, ready=True):
        ranks = [self.peer(f"worker{rank}", WorkerHello(rank, 2, 0, "here", 100 + rank)) for rank in range(2)]
        for rank, worker in enumerate(ranks):
            if ready:
                worker.channel.send(Ready(rank, 0, demo_model() if rank == 0 else None, BUDGET))
        return ranks

    def gateway(self, *ids, steps=50, **terms):
        gateway = self.peer("gateway", GatewayHello("ipc:///nowhere", 4))
        params = CARD.check(SamplingParams(prompt="a cat", seed=1, num_inference_steps=steps))
        gateway.channel.send(Submit(tuple(Request(name, params, **terms) for name in ids)))
        return gateway

    def observer(self):
        self.peers.append(observer := Observer(self.endpoint, self.folder.path))
        return observer

    def close(self):
        self.ended = True
        # An engine without peers sleeps until it is spoken to.
        self.observer().ask()
        self.thread.join(PATIENCE_S)
        for peer in self.peers:
            getattr(peer, "channel", None) and peer.channel.close()
            isinstance(peer, Observer) and peer.__exit__(None, None, None)
        self.folder.remove()


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default writes it among what the commands print."""
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture(autouse=True)
def short_tmp(monkeypatch):
    """A temporary folder of our own with a path short enough for sockets: no other mesh of this host is in it."""
    folder = Path(tempfile.mkdtemp(prefix="fm"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start():
    started = []

    def one():
        started.append(LiveScheduler())
        return started[-1]

    yield one
    for live in started:
        live.close()


@pytest.fixture
def live(start):
    return start()


def until(observer, wanted, prefix=""):
    """The first status that is as wanted; messages of different peers may overtake each other."""
    end = time.monotonic() + PATIENCE_S
    while not wanted(status := observer.look(prefix)):
        assert time.monotonic() < end, status
        time.sleep(0.01)
    return status


def finish(workers, item, seconds):
    for rank, worker in enumerate(workers):
        assert worker.wait_for(type(item)) == item if rank else True
        worker.channel.send(Done(rank, item.seq, 10.0, 10.0 + seconds))


# ---- the snapshot ------------------------------------------------------------------------------------------------


def test_a_mesh_that_starts_says_who_is_missing(live):
    observer = live.observer()
    status = observer.look()
    assert (status.epoch, status.ready, status.reason) == (EPOCH, False, "the workers are starting")
    assert (status.layout, status.policy, status.model, status.cost_error) == (Layout(1, 1, 2), "srpt", "", None)
    assert [(rank.rank, rank.pid, rank.doing) for rank in status.ranks] == [(0, 0, "not there"), (1, 0, "not there")]
    assert (status.jobs, status.queued, status.step_times) == ((), {}, ())
    live.workers(ready=False)
    status = until(observer, lambda status: all(rank.pid for rank in status.ranks))
    assert [(rank.pid, rank.host, rank.doing) for rank in status.ranks] == [
        (100, "here", "loading the model"),
        (101, "here", "loading the model"),
    ]


def test_a_running_item_shows_on_its_ranks_and_its_requests(live):
    workers, observer = live.workers(), live.observer()
    status = until(observer, lambda status: status.ready)
    assert (status.model, {rank.doing for rank in status.ranks}) == ("demo", {"idle"})
    live.gateway("a", "b", key="team", priority=3)
    encode = workers[0].wait_for(Encode)
    status = observer.look()
    assert {rank.doing for rank in status.ranks} == {"encode x2"}
    assert all(rank.request_ids == ("a", "b") and rank.predicted_s > 0 for rank in status.ranks)
    assert {rank.held_bytes for rank in status.ranks} == {2 * CARD.state_bytes(encode.requests[0].params, "denoise")}
    assert {rank.budget_bytes for rank in status.ranks} == {BUDGET}
    finish(workers, encode, 0.2)
    denoise = workers[0].wait_for(Denoise)
    workers[0].channel.send(Done(0, denoise.seq, 0.0, 0.5))
    status = until(observer, lambda status: "waits" in status.ranks[0].doing)
    batch, steps = len(denoise.request_ids), denoise.steps
    assert [rank.doing for rank in status.ranks] == [
        "waits for rank 1",
        f"denoise x{batch}, {steps} step{'s' if steps > 1 else ''}",
    ]
    assert 0 < status.ranks[1].running_s < PATIENCE_S
    (job, _) = status.jobs
    assert (job.id, job.key, job.stage, job.step, job.total, job.priority) == ("a", "team", "denoise", 0, 50, 3)
    assert job.eta_s > 0
    assert 0 <= job.waited_s < job.age_s
    encoded, denoised = status.step_times
    # Both want the same text, which is encoded once.
    assert (encoded.kind, encoded.batch, encoded.units, round(encoded.seconds, 6)) == ("encode", 1, 1, 0.2)
    assert (denoised.kind, denoised.batch, denoised.units) == ("denoise", batch, steps)
    assert denoised.seconds == pytest.approx(0.5 / steps)
    assert denoised.predicted_s == pytest.approx(status.ranks[1].predicted_s / steps)


def test_a_long_queue_is_counted_by_key_and_named_at_its_head(live):
    observer = live.observer()
    live.gateway(*(f"a{i:03}" for i in range(60)), key="one")
    live.gateway("b", key="two", priority=9)
    status = until(observer, lambda status: len(status.queued) == 2)
    assert status.queued == {"one": 60, "two": 1}
    assert len(status.jobs) == MOST_QUEUED
    assert [job.id for job in status.jobs[:3]] == ["b", "a000", "a001"]
    assert {job.stage for job in status.jobs} == {"queued"}
    assert [job.id for job in observer.look("a05").jobs] == [f"a05{i}" for i in range(10)]
    assert observer.look("nobody").jobs == ()


def test_an_id_in_full_names_one_request_alone(live):
    observer = live.observer()
    live.gateway("v", "v1")
    until(observer, lambda status: status.queued)
    assert [job.id for job in observer.look("v").jobs] == ["v"]


def test_observers_that_left_cost_nothing(live):
    for _ in range(3):
        with Observer(live.endpoint) as observer:
            observer.ask()
    status = live.observer().look()
    assert (status.stale, status.dropped) == (0, 0)
    time.sleep(0.2)
    steps = live.steps
    time.sleep(1.5)
    assert live.steps == steps, "an engine without workers and gateways woke up"


def test_a_message_of_an_older_epoch_is_counted(live):
    observer = live.observer()
    observer.look()
    observer._channel.set_epoch(EPOCH - 1)
    observer._channel.send(observe.Cancel("a"))
    assert observer.look().stale == 1


# ---- cancel ------------------------------------------------------------------------------------------------------


def test_a_queued_request_is_cancelled_by_its_beginning(live):
    observer = live.observer()
    gateway = live.gateway("video_1a", "video_2b")
    until(observer, lambda status: status.queued)
    assert observer.cancel("video_2", "why not") == ("video_2b", Outcome.CANCELLED)
    cancelled = gateway.wait_for(Cancelled)
    assert cancelled == Cancelled("video_2b", "why not", cancelled.usage)
    gateway.channel.send(Submit((Request("video_1c", CARD.check(SamplingParams(prompt="a", seed=1))),)))
    until(observer, lambda status: len(status.jobs) == 2)
    with pytest.raises(InvalidInput, match="the beginning of several"):
        observer.cancel("video", "why not")
    for nobody in ("video_2", ""):
        with pytest.raises(FramemeshError, match="no request of the mesh"):
            observer.cancel(nobody, "why not")


def test_a_running_request_ends_with_its_item(live, monkeypatch):
    monkeypatch.setattr(observe, "CANCEL_S", 0.2)
    workers, observer = live.workers(), live.observer()
    gateway = live.gateway("a")
    encode = workers[0].wait_for(Encode)
    assert observer.cancel("a", "why not") == ("a", Outcome.RUNNING)
    assert observer.look().jobs[0].cancelling
    finish(workers, encode, 0.1)
    cancelled = gateway.wait_for(Cancelled)
    assert cancelled == Cancelled("a", "why not", cancelled.usage)
    assert observer.look().jobs == ()


def done(workers, item):
    for rank in item.ranks:
        workers[rank].channel.send(Done(rank, item.seq, 10.0, 10.1))


def complete(workers, gateway, item):
    """The request's frames are stored before its decode is reported."""
    gateway.channel.send(Stored("a"))
    # The workers' sockets are others: only an answer shows that it was heard before what they say.
    gateway.channel.send(Observe("a"))
    gateway.wait_for(Status)
    done(workers, item)
    gateway.wait_for(Completed)


def test_a_request_that_was_complete_before_the_word_arrived_is_not_called_cancelled(live, monkeypatch):
    workers, observer = live.workers(), live.observer()
    gateway = live.gateway("a", steps=1)
    for kind in (Encode, Denoise):
        done(workers, workers[0].wait_for(kind))
    decode = workers[0].wait_for(Decode)
    find = observer._job

    def find_and_complete(prefix):
        found = find(prefix)
        complete(workers, gateway, decode)
        return found

    monkeypatch.setattr(observer, "_job", find_and_complete)
    assert observer.cancel("a", "why not") == ("a", Outcome.ENDED)


@pytest.mark.parametrize("stage", [Encode, Denoise, Decode])
def test_a_request_that_ends_while_it_is_watched_was_cancelled_unless_its_frames_may_be_stored(
    live, monkeypatch, stage
):
    workers, observer = live.workers(), live.observer()
    gateway = live.gateway("a", steps=1)
    while not isinstance(item := workers[0].wait_for(Encode | Denoise | Decode), stage):
        done(workers, item)

    def end(_seconds):
        if stage is Decode:
            complete(workers, gateway, item)
        else:
            done(workers, item)
            gateway.wait_for(Cancelled)

    monkeypatch.setattr(observe, "time", SimpleNamespace(monotonic=time.monotonic, sleep=end))
    expected = Outcome.ENDED if stage is Decode else Outcome.CANCELLED
    assert observer.cancel("a", "why not") == ("a", expected)


def test_the_command_says_what_is_known(capsys, monkeypatch):
    for outcome, said in (
        (Outcome.CANCELLED, "cancelled a"),
        (Outcome.ENDED, "a has ended"),
        (Outcome.RUNNING, "a ends when its work item does"),
    ):
        monkeypatch.setattr("launch.top.cancel_request", lambda *_, outcome=outcome: ("a", outcome))
        assert main(["cancel", "a"]) == 0
        assert capsys.readouterr().out == f"{said}\n"


# ---- which mesh --------------------------------------------------------------------------------------------------


def refusal(capsys, *words):
    """(exit code, what it said) of a command that prints nothing else."""
    code = main([*words])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def test_without_a_mesh_the_commands_say_so(capsys, short_tmp):
    (short_tmp / "framemesh-other").mkdir()
    for words in (["top"], ["jobs"], ["cancel", "a"]):
        assert refusal(capsys, *words) == (1, "error: no mesh is running\n")
    code, message = refusal(capsys, "jobs", "--mesh", str(short_tmp))
    assert (code, "no folder of a running mesh" in message) == (2, True)


def test_several_meshes_are_shown_together_and_one_can_be_named(start, capsys):
    first, second = start(), start()
    first.folder.tell_url("http://127.0.0.1:1")
    first.gateway("one", "both")
    second.gateway("two", "both")
    for live, ids in ((first, {"one", "both"}), (second, {"two", "both"})):
        until(live.observer(), lambda status, ids=ids: {job.id for job in status.jobs} == ids)
    gateway = RunFolder("demo", role=GATEWAY)
    assert main(["jobs", "--json"]) == 0
    places = {str(live.folder.path): live for live in (first, second)}
    listed = [(job["id"], places[job["mesh"]]) for job in json.loads(capsys.readouterr().out)]
    assert sorted(listed, key=lambda job: job[0])[2:] == [("one", first), ("two", second)]
    assert main(["top"]) == 0
    shown = capsys.readouterr().out
    assert all(place in shown for place in places)
    assert "http://127.0.0.1:1" in shown
    for place in (str(second.folder.path), second.endpoint):
        assert main(["jobs", "--json", "--mesh", place]) == 0
        assert {job["id"] for job in json.loads(capsys.readouterr().out)} == {"two", "both"}
    code, message = refusal(capsys, "cancel", "nothing")
    assert (code, "begins with 'nothing'" in message) == (1, True)
    for prefix, name in (("tw", "two"), ("bo", "both")):
        assert main(["cancel", prefix]) == 0
        assert capsys.readouterr().out == f"cancelled {name}\n"
    assert main(["jobs", "--json"]) == 0
    assert [job["id"] for job in json.loads(capsys.readouterr().out)] == ["one"]
    with pytest.raises(InvalidInput, match="2 meshes are running, name one of them"), observe_mesh(None):
        pass
    gateway.remove()


def test_a_mesh_whose_scheduler_is_elsewhere_is_found_by_its_folder(live, capsys):
    folder = RunFolder("demo", scheduler=live.endpoint)
    assert main(["jobs", "--json", "--mesh", str(folder.path)]) == 0
    assert json.loads(capsys.readouterr().out) == []
    folder.remove()


def test_meshes_of_several_launchers_are_not_drained_together(start, capsys):
    first, _ = start(), start()
    first.folder._about = msgspec.structs.replace(first.folder._about, pid=1)
    first.folder.tell_url("http://127.0.0.1:1")
    code, message = refusal(capsys, "drain")
    assert code == 2
    lines = message.splitlines()
    assert lines[0] == "error: --mesh: 2 meshes are running, name one of them:"
    assert "http://127.0.0.1:1" in message


def test_a_scheduler_that_hangs_is_not_taken_for_a_mesh(live, capsys):
    folder = RunFolder("other")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(folder.path / "scheduler"))
        deaf.listen()
        since = time.monotonic()
        with observe_mesh(None) as (observer, _):
            assert observer.folder == live.folder.path
        assert time.monotonic() - since < 2 * observe.ANSWER_S
        with pytest.raises(NotReady, match="does not answer"), observe_mesh(str(folder.path)):
            pass
    folder.remove()


def test_a_killed_launchers_folder_is_skipped_and_swept_by_the_next(short_tmp, capsys):
    program = """
import os, signal
from launch.observe import RunFolder
folder = RunFolder("demo")
(folder.path / "scheduler").touch()
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment({}), capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    dead = Path(done.stdout.strip())
    about = read_mesh_file(dead)
    assert (about.model, about.url) == ("demo", "")
    assert refusal(capsys, "jobs") == (1, "error: no mesh is running\n")
    with Observer(f"ipc://{dead}/scheduler", dead) as observer:
        assert observer.stopped
    ours, other = RunFolder("ours"), short_tmp / "framemesh-video"
    other.mkdir()
    (short_tmp / "framemesh-link").symlink_to(dead)
    sweep_dead_folders()
    assert not dead.exists()
    assert ours.path.exists()
    assert other.exists()
    assert (short_tmp / "framemesh-link").is_symlink()
    ours.remove()
    ours.remove()
    assert not ours.path.exists()


def test_a_half_written_description_is_none(short_tmp):
    (short_tmp / MESH_FILE).write_text('{"pid": 1')
    assert read_mesh_file(short_tmp) is None
    assert read_mesh_file(short_tmp / "nowhere") is None


# ---- what a person sees ------------------------------------------------------------------------------------------


def test_the_commands_print_and_cancel(live, capsys):
    live.gateway("video_1a", key="team [red]\x1b", priority=2)
    live.gateway(*(f"more{i:03}" for i in range(MOST_QUEUED + 5)))
    until(live.observer(), lambda status: len(status.queued) == 2)
    assert main(["jobs"]) == 0
    out, err = capsys.readouterr()
    head, first, *_ = out.splitlines()
    assert head.split() == ["ID", "KEY", "STAGE", "DONE", "ETA", "WAITED", "PRIO"]
    assert first.startswith("video_1a  team [red]?  queued")
    assert err == "6 more are queued\n"
    assert main(["jobs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == MOST_QUEUED
    assert (listed[0]["id"], listed[0]["stage"], listed[0]["priority"]) == ("video_1a", "queued", 2)
    assert main(["top"]) == 0
    shown = capsys.readouterr().out
    assert "the workers are starting" in shown
    assert "6 more are queued" in shown
    assert main(["cancel", "video"]) == 0
    assert capsys.readouterr().out == "cancelled video_1a\n"
    code, message = refusal(capsys, "cancel", "video")
    assert code == 1
    assert "no request of the mesh" in message
    assert "begins with 'video'" in message
    code, message = refusal(capsys, "cancel", "more")
    assert code == 2
    assert message.startswith("error: ID: 'more' is the beginning of several ids: more000")


@pytest.mark.parametrize("end", ["q", "ctrl-c", "the mesh stops"])
def test_top_follows_the_mesh_on_a_terminal(live, end):
    """A real terminal: the picture changes with the mesh, one key ends it, and the shell gets its line mode back."""
    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    environment = child_environment({}) | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    command = [sys.executable, "-P", "-m", "launch", "top", "--mesh", str(live.folder.path)]
    process = subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    shown = b""

    def shows(words):
        nonlocal shown
        until = time.monotonic() + PATIENCE_S
        while words not in shown and time.monotonic() < until:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 1 << 16)
        assert words in shown, shown[-2000:]

    try:
        shows(b"the workers are starting")
        live.gateway("video_late")
        shows(b"video_late")
        if end == "q":
            os.write(ours, b"q")
        elif end == "ctrl-c":
            process.send_signal(signal.SIGINT)
        else:
            live.ended = True
            live.observer().ask()
            live.thread.join(PATIENCE_S)
            live.folder.remove()
            shows(b"has stopped")
        assert process.wait(PATIENCE_S) == (1 if end == "the mesh stops" else 0)
        assert termios.tcgetattr(theirs) == before
        assert b"Traceback" not in shown
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def test_the_view_fits_into_100_columns(live):
    workers, observer = live.workers(), live.observer()
    live.gateway(f"video_{'5e' * 16}", key="team-of-eleven", priority=10)
    workers[0].wait_for(Encode)
    status = observer.look()
    long = msgspec.structs.replace(status.jobs[0], stage="denoise", step=100, total=1000, eta_s=4020, waited_s=4020)
    status = msgspec.structs.replace(status, jobs=(long,))
    wide, narrow = (drawn(view(status, observer.about, str(live.folder.path)), columns) for columns in (100, 76))
    assert f"video_{'5e' * 16}" in wide
    assert "…" not in wide
    assert "1h 07m" in narrow
    assert "100/1000" in narrow
    assert "video_5e5e" in narrow


def drawn(picture, columns):
    console = Console(width=columns, file=io.StringIO())
    console.print(picture)
    return console.file.getvalue()


# ---- a real mesh -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_running_request_is_seen_and_cancelled_from_outside(mesh):
    folder = mesh._supervisor.scheduler_endpoint.removeprefix("ipc://").removesuffix("/scheduler")
    stream = mesh.stream(SamplingParams(prompt="a red circle", seed=1, num_inference_steps=1000))
    for event in stream:
        if isinstance(event, Progress) and event.stage == "denoise" and event.step > 0:
            break
    with observe_mesh(folder) as (observer, status):
        assert observer.about.pid == os.getpid()
        assert (observer.about.model, status.model, status.ready) == ("demo", "demo", True)
        (job,) = status.jobs
        assert (job.stage, job.total) == ("denoise", 1000)
        assert 0 < job.step < 1000
        assert {rank.pid for rank in status.ranks}.isdisjoint({0, os.getpid()})
        assert any(rank.held_bytes > 0 for rank in status.ranks)
        outcome = observer.cancel(job.id[:12], "cancelled by the operator")
        assert outcome == (job.id, Outcome.CANCELLED)
    with pytest.raises(RequestFailed) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "cancelled"
    assert caught.value.reason == "cancelled by the operator"
