"""The engine over real sockets, with ranks, gateways and supervisors that are played by the test."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import structlog
from fake_mesh import demo_model

import runtime.engine
import runtime.roster
import runtime.scheduler
from runtime.cost import CostModel
from runtime.engine import Engine
from runtime.layout import Layout
from runtime.models.card import card_for
from runtime.protocol import (
    Cancel,
    Cancelled,
    Checkpoint,
    Checkpointed,
    Completed,
    Decode,
    Denoise,
    Done,
    Drain,
    Encode,
    Failed,
    Fence,
    FromScheduler,
    GatewayHello,
    Grant,
    Heartbeat,
    ItemFailed,
    MeshState,
    Progress,
    Ready,
    Release,
    Request,
    SavedState,
    Shutdown,
    Stored,
    Submit,
    SupervisorHello,
    ToScheduler,
    Welcome,
    WorkerHello,
)
from runtime.sampling import SamplingParams
from runtime.scheduler import Scheduler
from runtime.trace import Trace, TraceLine, read_trace
from runtime.wire import Channel

EPOCH = 77
PATIENCE_S = 10.0
QUIET_S = 0.15
MODEL = demo_model()
CARD = card_for(MODEL.configs)


def request(request_id, steps=2, frames=5, **terms):
    params = CARD.check(SamplingParams(prompt="a cat", seed=1, num_inference_steps=steps, num_frames=frames))
    return Request(request_id, params, **terms)


def eventually(condition):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.002)


class Peer:
    """One socket to the engine; keeps what it heard."""

    def __init__(self, endpoint, identity):
        self.channel = Channel.connect(endpoint, FromScheduler, identity)
        self.identity = identity
        self.heard = []

    def send(self, message, epoch=EPOCH):
        self.channel.set_epoch(epoch)
        self.channel.send(message)

    def next(self, timeout_s=PATIENCE_S):
        received = self.channel.receive(timeout_s)
        if received is None:
            return None
        assert received.epoch == EPOCH
        self.heard.append(received.message)
        return received.message

    def expect(self, kind, where=lambda message: True):
        """The next message of this kind; others may come before it."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            message = self.next(max(until - time.monotonic(), 0.0))
            if isinstance(message, kind) and where(message):
                return message
        raise AssertionError(f"{self.identity} heard no {kind}, but {[str(message)[:120] for message in self.heard]}")

    def hears_none(self, kind):
        while (message := self.next(QUIET_S)) is not None:
            assert not isinstance(message, kind), message


class Rank(Peer):
    def __init__(self, endpoint, rank, generation=0, life=0, num_ranks=2, host="here"):
        super().__init__(endpoint, f"worker{rank}-{generation}-{life}".encode())
        self.rank = rank
        self.generation = generation
        self.send(WorkerHello(rank, num_ranks, generation, host, 1000 + rank), epoch=0)

    def ready(self, **told):
        assert self.expect(Welcome).epoch == EPOCH
        self.send(Ready(self.rank, self.generation, MODEL if self.rank == 0 else None, **told))

    def done(self, item):
        self.send(Done(self.rank, item.seq, 1.0, 1.01))


class Stage:
    """An engine in a thread of its own, and everybody that the test lets appear."""

    def __init__(self, folder, stack, num_ranks=2):
        self.endpoint = f"ipc://{folder}/scheduler"
        self.trace = Path(folder) / "trace.jsonl"
        self.tracing = Trace(self.trace, EPOCH)
        self.scheduler = Scheduler(CARD, Layout(1, 1, num_ranks), CostModel(CARD))
        self.channel = Channel.bind(self.endpoint, ToScheduler)
        self.engine = Engine(self.channel, self.scheduler, EPOCH, self.tracing)
        self.ended = False
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()
        self.stack = stack
        stack.callback(self.close)

    def loop(self):
        while not self.engine.stopped and not self.ended:
            self.engine.step()

    def close(self):
        self.ended = True
        self.supervisor("closer")
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        self.channel.close()
        self.tracing.close()

    def enter(self, peer):
        self.stack.callback(peer.channel.close)
        return peer

    def rank(self, rank, **hello):
        return self.enter(Rank(self.endpoint, rank, **hello))

    def ranks(self, **hello):
        """Two ranks that are ready."""
        ranks = [self.rank(number, **hello) for number in (0, 1)]
        for rank in ranks:
            rank.ready()
        eventually(lambda: self.scheduler.ready)
        return ranks

    def gateway(self, name=b"gateway", credits=16):
        peer = self.enter(Peer(self.endpoint, name))
        peer.send(GatewayHello(f"ipc://{name.decode()}", credits), epoch=0)
        peer.expect(MeshState)
        return peer

    def supervisor(self, host):
        peer = self.enter(Peer(self.endpoint, f"supervisor-{host}".encode()))
        peer.send(SupervisorHello(host), epoch=0)
        return peer


@pytest.fixture
def stage(tmp_path_factory):
    with ExitStack() as stack:
        yield Stage(tmp_path_factory.mktemp("s"), stack)


def shared(ranks, kind):
    """The item that all ranks were given."""
    items = [rank.expect(kind) for rank in ranks]
    assert all(item == items[0] for item in items)
    return items[0]


def until_delivered(ranks):
    """Work on the only request until all its frames are out."""
    for kind in (Encode, Denoise):
        item = shared(ranks, kind)
        for rank in ranks:
            rank.done(item)
    decode = ranks[0].expect(Decode)
    assert decode.chunks == 1
    ranks[0].done(decode)


# ---- hello and the way of a request ------------------------------------------------------------------------------


def test_hello_welcome_ready(stage):
    gateway = stage.enter(Peer(stage.endpoint, b"gateway"))
    gateway.send(GatewayHello("ipc://frames", 16), epoch=0)
    assert gateway.next() == Welcome(EPOCH)
    assert gateway.next() == MeshState(False, "the workers are starting", 0, 2)
    supervisor = stage.supervisor("here")
    assert [supervisor.next(), supervisor.next()] == gateway.heard
    zero, one = stage.rank(0), stage.rank(1)
    zero.ready()
    for peer in (gateway, supervisor):
        assert peer.expect(MeshState) == MeshState(False, "the workers are starting", 1, 2, MODEL)
    one.ready()
    for peer in (gateway, supervisor):
        assert peer.expect(MeshState) == MeshState(True, "ready", 2, 2, MODEL)
    late = stage.enter(Peer(stage.endpoint, b"late"))
    late.send(GatewayHello("ipc://late", 16), epoch=0)
    assert [late.next(), late.next()] == [Welcome(EPOCH), MeshState(True, "ready", 2, 2, MODEL)]


def test_a_request_goes_to_the_ranks_and_back(stage):
    gateway, ranks = stage.gateway(), stage.ranks()
    gateway.send(Submit((request("r1", steps=1, frames=1),)))
    until_delivered(ranks)
    gateway.expect(Progress, lambda news: news.stage == "deliver")
    gateway.send(Grant(1))
    gateway.send(Stored("r1"))
    assert gateway.expect(Completed).request_id == "r1"
    assert shared(ranks, Release).request_ids == ("r1",)
    stages = [message.stage for message in gateway.heard if isinstance(message, Progress)]
    assert stages == ["queued", "encode", "denoise", "decode", "deliver"]
    traced = [(line.seq, line.rank, line.kind, line.units, line.requests) for line in read_trace(stage.trace)]
    assert sorted(traced) == [
        *((1, rank, "Encode", 0, {"r1": 0}) for rank in (0, 1)),
        *((2, rank, "Denoise", 1, {"r1": 0}) for rank in (0, 1)),
        (3, 0, "Decode", 1, {"r1": 0}),
    ]


def test_gateways_hear_how_much_work_there_is(stage):
    gateway = stage.gateway()
    gateway.send(Submit((request("r1"), request("r2"))))
    news = gateway.expect(MeshState, lambda state: state.backlog_s > 0)
    assert news.backlog_s == pytest.approx(2 * stage.scheduler.requests["r1"].remaining_s)
    gateway.send(Cancel("r2"))
    assert gateway.expect(MeshState).backlog_s == pytest.approx(news.backlog_s / 2)
    gateway.send(Cancel("r1"))
    assert gateway.expect(MeshState).backlog_s == 0
    gateway.expect(Welcome)
    gateway.hears_none(MeshState)


def test_news_of_the_backlog_leaves_the_model_out(stage):
    gateway, _ = stage.gateway(), stage.ranks()
    assert gateway.expect(MeshState, lambda state: state.ready).model == MODEL
    gateway.send(Submit((request("r1"),)))
    news = gateway.expect(MeshState)
    assert (news.ready, news.model) == (True, None)


def test_a_trace_goes_on_where_that_of_an_earlier_scheduler_ended(tmp_path):
    path = tmp_path / "trace.jsonl"
    item = Denoise(1, (0,), Layout(1, 1, 1), ("r1", "r2"), 3)
    for epoch in (1, 2):
        with contextlib.closing(Trace(path, epoch)) as trace:
            trace.note(Done(0, 1, 5.0, 6.0), item, {"r1": 4, "other": 9})
    path.write_bytes(path.read_bytes() + b'{"torn')
    lines = [TraceLine(epoch, 0, 1, 5.0, 6.0, "Denoise", 3, {"r1": 4, "r2": 0}) for epoch in (1, 2)]
    assert read_trace(path) == lines


def test_a_worker_of_another_mesh_size_gets_no_seat(stage):
    stranger = stage.rank(0, num_ranks=3)
    stranger.hears_none(Welcome)
    stage.ranks(life=1)


def test_a_failed_item_ends_its_request_and_the_mesh_lives_on(stage):
    gateway, ranks = stage.gateway(), stage.ranks()
    gateway.send(Submit((request("r1"),)))
    item = shared(ranks, Encode)
    ranks[0].send(ItemFailed(0, item.seq, "internal_error", "boom", group_broken=False))
    ranks[1].done(item)
    failed = gateway.expect(Failed)
    assert failed == Failed("r1", "internal_error", "boom", failed.usage)
    assert shared(ranks, Release).request_ids == ("r1",)
    gateway.send(Submit((request("r2"),)))
    assert shared(ranks, Encode).requests[0].id == "r2"


# ---- stale messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, EPOCH - 1, EPOCH + 1])
def test_messages_of_another_epoch_are_dropped_and_counted(stage, epoch):
    gateway, ranks = stage.gateway(), stage.ranks()
    gateway.send(Submit((request("stale"),)), epoch)
    gateway.send(Drain(), epoch)
    gateway.send(Submit((request("fresh"),)))
    item = shared(ranks, Encode)
    assert [r.id for r in item.requests] == ["fresh"]
    assert stage.engine.stale == 2
    for rank in ranks:
        rank.send(Done(rank.rank, item.seq, 0.0, 1.0), epoch)
    eventually(lambda: stage.engine.stale == 4)
    assert read_trace(stage.trace) == []
    assert not stage.engine.stopped
    for rank in ranks:
        rank.done(item)
    ranks[0].expect(Denoise)


def test_a_stale_peer_is_complained_of_once(stage):
    gateway = stage.gateway()
    with structlog.testing.capture_logs() as logs:
        for _ in range(5):
            gateway.send(Grant(1), EPOCH - 1)
        eventually(lambda: stage.engine.stale == 5)
    assert [line["sender"] for line in logs if line["event"] == "dropped: stale epoch"] == [b"gateway"]


def test_whoever_knew_an_earlier_scheduler_learns_the_epoch_and_joins(stage):
    """A scheduler that was started anew: ranks beat for the old epoch until they hear of the new one."""
    gateway = stage.enter(Peer(stage.endpoint, b"gateway"))
    gateway.send(Submit((request("r1"),)), EPOCH - 1)
    assert gateway.expect(Welcome).epoch == EPOCH
    gateway.send(GatewayHello("ipc://frames", 16), epoch=0)
    gateway.send(Submit((request("r1"),)))
    ranks = [stage.enter(Peer(stage.endpoint, b"worker%d" % number)) for number in (0, 1)]
    for number, rank in enumerate(ranks):
        heart = stage.enter(Peer(stage.endpoint, rank.identity + b"/heart"))
        heart.send(Heartbeat(number, 7, -1, "here", 1000 + number), EPOCH - 1)
        assert rank.expect(Welcome).epoch == EPOCH
        rank.send(WorkerHello(number, 2, 7, "here", 1000 + number), epoch=0)
        rank.send(Ready(number, 7, MODEL if number == 0 else None))
    assert shared(ranks, Encode).requests[0].id == "r1"


def test_a_rank_that_hangs_in_an_item_of_an_earlier_epoch_is_fenced(stage, monkeypatch):
    monkeypatch.setattr(runtime.roster, "STRANGER_LIMIT_S", 0.1)
    monkeypatch.setattr(runtime.engine, "BEAT_S", 0.05)
    supervisor = stage.supervisor("here")
    heart = stage.enter(Peer(stage.endpoint, b"worker0/heart"))
    heart.send(Heartbeat(0, 7, 3, "here", 1000), EPOCH - 1)
    assert supervisor.expect(Fence) == Fence(0, 1000, "it lives on in a group that is gone")


def test_a_checkpoint_counts_though_its_writer_died_since(stage):
    gateway, ranks = stage.gateway(), stage.ranks()
    gateway.send(Submit((request("r1"),)))
    item = shared(ranks, Encode)
    writer = stage.enter(Peer(stage.endpoint, b"worker1-0-0/spool"))
    saved = SavedState(1, "a file", 10)
    stage.rank(0, generation=1)
    eventually(lambda: not stage.scheduler.ready)
    writer.send(Checkpointed(1, "r1", saved))
    eventually(lambda: stage.scheduler.requests["r1"].saved == saved)
    again = stage.ranks(generation=2)
    assert shared(again, Encode).resume == {"r1": saved}
    assert item.resume == {}


def test_a_stranger_cannot_speak_for_a_rank(stage):
    gateway, ranks = stage.gateway(), stage.ranks()
    gateway.send(Submit((request("r1"),)))
    item = shared(ranks, Encode)
    stranger = stage.enter(Peer(stage.endpoint, b"stranger"))
    stranger.send(Done(0, item.seq, 0.0, 1.0))
    stranger.send(Done(9, item.seq, 0.0, 1.0))
    stranger.send(ItemFailed(1, item.seq, "x", "y", group_broken=True))
    eventually(lambda: stage.engine.stale == 3)
    assert stage.scheduler.ready


# ---- a group that is lost ----------------------------------------------------------------------------------------


def break_by_generation(stage, ranks, item):
    stage.rank(0, generation=1)
    return "restarted"


def break_by_a_new_life(stage, ranks, item):
    """A torchrun that was started anew counts from generation 0."""
    stage.rank(1, generation=0, life=1)
    return "restarted"


def break_by_report(stage, ranks, item):
    ranks[1].send(ItemFailed(1, item.seq, "internal_error", "RuntimeError: boom", group_broken=True))
    return "rank 1: RuntimeError: boom"


@pytest.mark.parametrize("cause", [break_by_generation, break_by_a_new_life, break_by_report])
def test_what_ran_in_a_lost_group_runs_again_in_the_next(stage, cause):
    gateway, supervisor, ranks = stage.gateway(), stage.supervisor("here"), stage.ranks()
    gateway.send(Submit((request("running"),)))
    item = shared(ranks, Encode)
    reason = cause(stage, ranks, item)
    for peer in (gateway, supervisor):
        state = peer.expect(MeshState, lambda state: state.losses > 0)
        assert (state.ready, state.losses, state.ranks_ready) == (False, 1, 0)
        assert reason in state.reason
    gateway.expect(Progress, lambda news: news.stage == "queued")
    stale = stage.engine.stale
    for rank in ranks:
        rank.done(item)
    eventually(lambda: stage.engine.stale == stale + 2)
    again = stage.ranks(generation=2)
    assert shared(again, Encode).requests[0].id == "running"
    assert not any(isinstance(message, Failed) for message in gateway.heard)


def test_too_many_losses_in_a_short_time_are_said(stage):
    supervisor = stage.supervisor("here")
    for generation in range(4):
        stage.ranks(generation=generation)
    assert supervisor.expect(MeshState, lambda state: state.losses == 2).gave_up is False
    state = supervisor.expect(MeshState, lambda state: state.losses == 3)
    assert state.gave_up
    assert "the worker group was restarted" in state.reason


def test_a_rank_of_an_older_generation_is_not_mixed_in(stage):
    new = stage.rank(0, generation=3)
    new.ready()
    old = stage.rank(1, generation=2)
    old.hears_none(Welcome)
    assert stage.engine.stale == 1
    other = stage.rank(1, generation=3, life=1)
    other.ready()
    eventually(lambda: stage.scheduler.ready)


def test_a_hello_that_is_said_twice_is_one(stage):
    """Nobody answered in time, so it was said again."""
    ranks = stage.ranks()
    ranks[0].send(WorkerHello(0, 2, 0, "here", 1000), epoch=0)
    ranks[0].expect(Welcome)
    assert stage.scheduler.ready
    assert stage.scheduler.losses.total == 0


def test_ranks_that_join_one_by_one_are_one_group(stage):
    supervisor = stage.supervisor("here")
    for generation in (0, 1, 2):
        ranks = [stage.rank(number, generation=generation) for number in (0, 1)]
        for rank in ranks:
            rank.ready()
        state = supervisor.expect(MeshState, lambda state: state.ready)
        assert state.losses == generation


def test_a_silent_rank_is_fenced_by_its_own_host(stage, monkeypatch):
    monkeypatch.setattr(runtime.roster, "HEARTBEAT_LIMIT_S", 0.4)
    here, there = stage.supervisor("here"), stage.supervisor("there")
    zero, one = stage.rank(0, host="there"), stage.rank(1)
    zero.ready()
    one.ready()
    gateway = stage.gateway()
    gateway.send(Submit((request("r1"),)))
    heart = stage.enter(Peer(stage.endpoint, zero.identity + b"/heart"))
    fenced = None
    until = time.monotonic() + PATIENCE_S
    while fenced is None and time.monotonic() < until:
        heart.send(Heartbeat(0, 0, -1))
        message = here.next(0.05)
        fenced = message if isinstance(message, Fence) else None
    assert (fenced.rank, fenced.pid) == (1, 1001)
    assert "rank 1 was silent for 0." in fenced.reason
    assert "was silent" in gateway.expect(MeshState, lambda state: state.losses > 0).reason
    there.hears_none(Fence)


def test_a_rank_that_does_not_come_to_the_end_of_its_item_is_fenced(stage, monkeypatch):
    """Its heart beats, so that only the length of the item gives it away; how long that is has been measured."""
    monkeypatch.setattr(runtime.roster, "OVERDUE_S", 0.3)
    monkeypatch.setattr(runtime.engine, "BEAT_S", 0.05)
    gateway, supervisor, ranks = stage.gateway(), stage.supervisor("here"), stage.ranks()
    gateway.send(Submit((request("r1", steps=50),)))
    for kind in (Encode, Denoise):
        item = shared(ranks, kind)
        for rank in ranks:
            rank.done(item)
    item = shared(ranks, Denoise)
    ranks[0].done(item)
    fence = supervisor.expect(Fence)
    assert (fence.rank, fence.pid) == (1, 1001)
    assert fence.reason.startswith("rank 1 is not done with an item of ")
    assert gateway.expect(MeshState, lambda state: state.losses > 0).reason.endswith(fence.reason)


def test_a_hang_in_an_item_that_was_never_measured_ends_too(stage, monkeypatch):
    """Its length is a guess, so that it gets more time than others, but not for ever."""
    monkeypatch.setattr(runtime.roster, "OVERDUE_S", 0.0)
    monkeypatch.setattr(runtime.roster, "UNMEASURED_S", 0.3)
    monkeypatch.setattr(runtime.engine, "BEAT_S", 0.05)
    gateway, supervisor, ranks = stage.gateway(), stage.supervisor("here"), stage.ranks()
    gateway.send(Submit((request("r1"),)))
    item = shared(ranks, Encode)
    running = stage.scheduler.running[item.seq]
    assert not running.measured
    supervisor.expect(Welcome)
    fences = [supervisor.expect(Fence), supervisor.expect(Fence)]
    assert [(fence.rank, fence.pid) for fence in fences] == [(0, 1000), (1, 1001)]
    waited = float(fences[0].reason.removesuffix(" s").rpartition(" ")[2])
    assert waited >= 10 * running.predicted_s + 0.2


def test_ranks_that_wait_for_one_that_failed_are_not_left_to_wait(stage, monkeypatch):
    """It failed before its first collective and lives; the others would wait there as long as an unknown item may last.

    What it failed of counts: after an out-of-memory with the batch that it was in nobody is suspected of more.
    """
    monkeypatch.setattr(runtime.roster, "OVERDUE_S", 0.3)
    monkeypatch.setattr(runtime.engine, "BEAT_S", 0.05)
    supervisor, ranks = stage.supervisor("here"), stage.ranks()
    stage.gateway().send(Submit((request("r1"),)))
    item = shared(ranks, Encode)
    assert not stage.scheduler.running[item.seq].measured
    ranks[0].send(ItemFailed(0, item.seq, "out_of_memory", "no room", group_broken=False))
    fence = supervisor.expect(Fence)
    assert (fence.rank, fence.pid) == (1, 1001)
    assert fence.reason.endswith("in which another failed: no room")
    eventually(lambda: stage.scheduler.losses.total == 1)
    assert not any(record.losses for record in stage.scheduler.requests.values())


def test_heartbeats_keep_a_busy_rank_alive(stage, monkeypatch):
    monkeypatch.setattr(runtime.roster, "HEARTBEAT_LIMIT_S", 0.3)
    supervisor, ranks = stage.supervisor("here"), stage.ranks()
    hearts = [stage.enter(Peer(stage.endpoint, rank.identity + b"/heart")) for rank in ranks]
    until = time.monotonic() + 0.8
    while time.monotonic() < until:
        for number, heart in enumerate(hearts):
            heart.send(Heartbeat(number, 0, 5))
        time.sleep(0.05)
    assert stage.scheduler.ready
    assert not any(isinstance(message, Fence) for message in supervisor.heard)


def test_a_rank_that_loads_its_model_may_be_silent(stage, monkeypatch):
    monkeypatch.setattr(runtime.roster, "HEARTBEAT_LIMIT_S", 0.05)
    supervisor = stage.supervisor("here")
    loading = stage.rank(0)
    loading.expect(Welcome)
    time.sleep(0.2)
    stage.gateway()
    supervisor.hears_none(Fence)


def test_a_rank_that_is_gone_is_found_by_the_send(stage):
    gateway, ranks = stage.gateway(), stage.ranks()
    ranks[1].channel.close()
    time.sleep(QUIET_S)
    gateway.send(Submit((request("r1"),)))
    assert "rank 1 is gone" in gateway.expect(MeshState, lambda state: state.losses > 0).reason
    assert not stage.scheduler.ready


def test_a_rank_that_was_out_of_reach_for_a_moment_is_fenced(stage):
    """Its socket came back before anybody noticed; without the fence it would beat, and wait, for ever."""
    gateway, here, there = stage.gateway(), stage.supervisor("here"), stage.supervisor("there")
    ranks = stage.ranks()
    ranks[1].channel.close()
    time.sleep(QUIET_S)
    gateway.send(Submit((request("r1"),)))
    fence = here.expect(Fence)
    assert fence == Fence(1, 1001, "rank 1 is gone")
    there.hears_none(Fence)
    back = stage.ranks(generation=1)
    assert shared(back, Encode).requests[0].id == "r1"


def test_a_rank_that_beats_on_after_its_group_was_given_up_is_fenced(stage, monkeypatch):
    """No supervisor was there when the group was lost."""
    monkeypatch.setattr(runtime.roster, "STRANGER_LIMIT_S", 0.1)
    monkeypatch.setattr(runtime.engine, "BEAT_S", 0.05)
    gateway, ranks = stage.gateway(), stage.ranks()
    heart = stage.enter(Peer(stage.endpoint, ranks[0].identity + b"/heart"))
    ranks[1].channel.close()
    time.sleep(QUIET_S)
    gateway.send(Submit((request("r1"),)))
    gateway.expect(MeshState, lambda state: state.losses > 0)
    supervisor = stage.supervisor("here")
    heart.send(Heartbeat(0, 0, -1, "here", 1000))
    assert supervisor.expect(Fence) == Fence(0, 1000, "it lives on in a group that is gone")


def test_a_rank_that_joins_again_is_no_stranger(stage, monkeypatch):
    monkeypatch.setattr(runtime.roster, "STRANGER_LIMIT_S", 0.1)
    monkeypatch.setattr(runtime.engine, "BEAT_S", 0.05)
    supervisor, ranks = stage.supervisor("here"), stage.ranks()
    stage.rank(0, generation=1)
    eventually(lambda: not stage.scheduler.ready)
    heart = stage.enter(Peer(stage.endpoint, ranks[1].identity + b"/heart"))
    heart.send(Heartbeat(1, 0, -1, "here", 1001))
    eventually(lambda: stage.engine.stale == 1)
    ranks[1].send(WorkerHello(1, 2, 1, "here", 1001), epoch=0)
    time.sleep(0.3)
    for _ in range(len(supervisor.heard) + 5):
        supervisor.expect(Welcome)
    assert not any(isinstance(message, Fence) for message in supervisor.heard)


# ---- gateways ----------------------------------------------------------------------------------------------------


def test_news_go_to_the_gateway_that_asked(stage):
    one, two = stage.gateway(b"one"), stage.gateway(b"two")
    one.send(Submit((request("r1"),)))
    two.send(Submit((request("r2"),)))
    assert one.expect(Progress).request_id == "r1"
    assert two.expect(Progress).request_id == "r2"
    one.hears_none(Progress)


def test_a_gateway_that_dies_while_its_request_waits_for_it_is_noticed(stage, monkeypatch):
    """Delivered and not yet stored: no news is due, so that only a probe finds out."""
    monkeypatch.setattr(runtime.engine, "BEAT_S", 0.05)
    monkeypatch.setattr(runtime.scheduler, "ORPHAN_S", 0.1)
    gateway, ranks = stage.gateway(), stage.ranks()
    gateway.send(Submit((request("r1", steps=1, frames=1),)))
    until_delivered(ranks)
    gateway.expect(Progress, lambda news: news.stage == "deliver")
    gateway.channel.close()
    assert shared(ranks, Release).request_ids == ("r1",)
    eventually(lambda: stage.scheduler.idle)


def test_a_request_is_cancelled_by_the_gateway_that_has_it_or_by_an_observer(stage):
    """One that slept while another took its request over leaves it alone when it wakes up."""
    old, new = stage.gateway(b"old"), stage.gateway(b"new")
    old.send(Submit((request("r1"), request("r2"))))
    old.expect(Progress, lambda news: news.request_id == "r2")
    new.send(Submit((request("r1"), request("r2"))))
    new.expect(Progress, lambda news: news.request_id == "r2")
    old.send(Cancel("r1", "the submitter left"))
    new.hears_none(Cancelled)
    new.send(Cancel("r1", "enough"))
    assert new.expect(Cancelled).reason == "enough"
    observer = stage.enter(Peer(stage.endpoint, b"observer"))
    observer.send(Cancel("r2", "by hand"))
    assert new.expect(Cancelled).reason == "by hand"


def test_a_gateway_that_was_given_up_cancels_nothing_of_another(stage, monkeypatch):
    """It slept, and lost its requests to another; its late word is not that of an observer."""
    monkeypatch.setattr(runtime.engine, "BEAT_S", 0.05)
    old, new = stage.gateway(b"old"), stage.gateway(b"new")
    old.send(Submit((request("r1"), request("r2"))))
    old.expect(Progress, lambda news: news.request_id == "r2")
    old.channel.close()
    eventually(lambda: stage.scheduler.requests["r1"].orphaned_until < math.inf)
    new.send(Submit((request("r1"),)))
    new.expect(Progress, lambda news: news.request_id == "r1")
    late = stage.enter(Peer(stage.endpoint, b"old"))
    late.send(Cancel("r1", "the submitter left"))
    assert late.expect(Cancelled).request_id == "r1"
    assert stage.scheduler.requests["r1"].cancel_reason is None
    late.send(Cancel("r2", "nobody else took it"))
    eventually(lambda: "r2" not in stage.scheduler.requests)
    observer = stage.enter(Peer(stage.endpoint, b"observer"))
    observer.send(Cancel("r1", "by hand"))
    assert new.expect(Cancelled).reason == "by hand"


def test_a_timeout_passes_though_nothing_happens(stage):
    gateway = stage.gateway()
    started = time.monotonic()
    gateway.send(Submit((request("r1", timeout_s=0.3),)))
    assert gateway.expect(Cancelled).request_id == "r1"
    assert 0.25 < time.monotonic() - started < 0.9


def test_the_poorest_rank_sets_the_budget(stage):
    gateway = stage.gateway()
    ranks = [stage.rank(0), stage.rank(1)]
    ranks[0].ready(memory_budget=1 << 40, device_memory=80 << 30)
    ranks[1].ready(memory_budget=1000, device_memory=24 << 30)
    eventually(lambda: stage.scheduler.ready)
    assert stage.scheduler.limits.device_memory == 24 << 30
    gateway.send(Submit((request("r1"),)))
    assert gateway.expect(Failed).code == "out_of_memory"


# ---- the end -----------------------------------------------------------------------------------------------------


def test_a_drain_finishes_what_runs_refuses_the_rest_and_shuts_the_ranks_down(stage):
    gateway, supervisor, ranks = stage.gateway(), stage.supervisor("here"), stage.ranks()
    gateway.send(Submit((request("running", steps=1, frames=1),)))
    gateway.expect(Progress, lambda news: news.stage == "encode")
    supervisor.send(Drain())
    eventually(lambda: stage.scheduler.draining)
    gateway.send(Submit((request("late"),)))
    refused = gateway.expect(Failed)
    assert (refused.request_id, refused.code) == ("late", "draining")
    until_delivered(ranks)
    assert not stage.engine.stopped
    gateway.send(Stored("running"))
    assert gateway.expect(Completed).request_id == "running"
    for rank in ranks:
        rank.expect(Shutdown)
        assert [type(message) for message in rank.heard[-2:]] == [Release, Shutdown]
    eventually(lambda: stage.engine.stopped)


def test_a_drain_that_runs_out_of_time_saves_and_leaves(stage):
    gateway, supervisor, ranks = stage.gateway(), stage.supervisor("here"), stage.ranks()
    stage.scheduler.checkpoint_every = 10
    gateway.send(Submit((request("r1", steps=50),)))
    for kind in (Encode, Denoise):
        item = shared(ranks, kind)
        for rank in ranks:
            rank.done(item)
    item = shared(ranks, Denoise)
    supervisor.send(Drain(0.0))
    state = gateway.expect(MeshState, lambda state: state.draining)
    assert (state.ready, state.reason) == (False, "draining")
    for rank in ranks:
        rank.done(item)
    assert ranks[0].expect(Checkpoint).request_ids == ("r1",)
    assert not stage.engine.stopped
    writer = stage.enter(Peer(stage.endpoint, ranks[0].identity + b"/spool"))
    writer.send(Checkpointed(0, "r1", SavedState(2, "a file", 10)))
    for rank in ranks:
        rank.expect(Shutdown)
    assert not any(isinstance(message, Failed) for message in gateway.heard)


def test_an_idle_mesh_drains_at_once(stage):
    supervisor, ranks = stage.supervisor("here"), stage.ranks()
    supervisor.expect(Welcome)
    supervisor.send(Drain())
    for rank in ranks:
        rank.expect(Shutdown)
    eventually(lambda: stage.engine.stopped)
