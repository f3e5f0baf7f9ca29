"""Who submits when somebody dies: nothing lost, no frame twice, no credit too many. The mesh is a fake on real sockets
in the first half, and real processes under real signals in the second."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
import structlog
from fake_mesh import EPOCH, MODEL_FOLDER, demo_model, moving_frames
from served import BODY, eventually, names, parse_events

from framemesh import Generator, RequestFailed, SamplingParams
from gateway import mesh as mesh_module
from gateway.jobs import runner as runner_module
from gateway.media.mp4 import FragmentWriter, read_frames
from gateway.mesh import FRAME_CREDITS, Frames, Mesh
from launch.client import Client
from launch.observe import Observer, observe_mesh
from launch.process import child_environment
from launch.supervisor import Supervisor
from runtime.config import Config, save_frozen
from runtime.errors import NotReady
from runtime.protocol import (
    Failed,
    FramesChunk,
    GatewayHello,
    Grant,
    MeshState,
    Message,
    Progress,
    Stored,
    Submit,
    ToScheduler,
    Welcome,
)
from runtime.sampling import ResolvedParams
from runtime.wire import Channel, incarnation

PATIENCE_S = 10.0


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
def eager(monkeypatch):
    """A scheduler that is gone is missed at once."""
    monkeypatch.setattr(mesh_module, "SILENCE_S", 0.2)


def content(gateway, video_id) -> bytes:
    return gateway.http.get(f"/v1/videos/{video_id}/content").raise_for_status().content


def attempts(fake, video_id) -> list[int]:
    return [request.attempt for request in fake.submitted if request.id == video_id]


# ---- a scheduler that starts anew, over HTTP ---------------------------------------------------------------------


def test_a_new_scheduler_is_told_once_of_all_that_runs(gateway, fake, eager):
    undisturbed = gateway.create(seed=1)
    gateway.wait(undisturbed)
    fake.held = {"denoise:2"}
    ids = [gateway.create(seed=1), gateway.create(seed=2)]
    for _ in ids:
        fake.wait_for("denoise:2")
    eventually(lambda: len(fake.submitted) == 3)
    with gateway.follow(ids[0]) as following:
        assert next(following)[1] == "queued"
        fake.restart()
        eventually(lambda: len(fake.submitted) == 5)
        fake.release()
        assert names(following)[-1] == "done"
    for video_id in ids:
        gateway.wait(video_id)
        assert attempts(fake, video_id) == [0, 1]
    assert fake.batches[-1] == 2, "one message"
    assert attempts(fake, undisturbed) == [0]
    assert content(gateway, ids[0]) == content(gateway, undisturbed)


def test_what_is_submitted_while_there_is_no_scheduler_runs_when_there_is_one(gateway, fake, eager):
    gateway.wait(gateway.create(num_frames=1))
    fake.die()
    video_id = gateway.create()
    cancelled = gateway.create()
    assert gateway.http.post(f"/v1/videos/{cancelled}/cancel").json()["status"] == "cancelled"
    fake.come_back()
    gateway.wait(video_id)
    assert attempts(fake, cancelled) == []
    assert fake.stale > 0, "what was said to the old one was dropped by the new one"


@pytest.mark.parametrize("accident", ["restart", "lose_worker"])
def test_frames_that_come_again_are_taken_once_and_every_credit_comes_back_once(
    gateway, fake, eager, monkeypatch, accident
):
    undisturbed = gateway.create(seed=1)
    gateway.wait(undisturbed)
    slow = threading.Event()
    real = runner_module.Recording.add
    monkeypatch.setattr(runner_module.Recording, "add", lambda *args: (slow.wait(PATIENCE_S), real(*args))[1])
    fake.held = {"decode:3"}
    video_id = gateway.create(seed=1)
    fake.wait_for("decode:3")
    # Three chunks are accepted and none of them consumed.
    eventually(lambda: gateway.call(lambda: gateway.mesh._inboxes[video_id].next_frame) == 9)
    getattr(fake, accident)()
    fake.wait_for("decode:3")
    slow.set()
    fake.release()
    gateway.wait(video_id)
    sent = [(attempt, first) for name, attempt, first in fake.chunks if name == video_id]
    assert sent == [(0, 0), (0, 1), (0, 5), (1, 0), (1, 1), (1, 5), (1, 9), (1, 13)]
    assert content(gateway, video_id) == content(gateway, undisturbed)
    eventually(lambda: fake.credits == FRAME_CREDITS)
    assert fake.most_credits <= FRAME_CREDITS, "more credits came back than were taken"
    assert gateway.call(lambda: gateway.mesh.dropped_chunks) == 3


def test_a_repeated_chunk_costs_its_credit_and_nothing_else(gateway, fake):
    fake.held = {"denoise:1"}
    video_id = gateway.create(seed=1)
    fake.repeats = [fake.wait_for("denoise:1")]
    fake.release()
    gateway.wait(video_id)
    eventually(lambda: fake.credits == FRAME_CREDITS)
    assert fake.most_credits <= FRAME_CREDITS
    assert gateway.video(video_id)["progress"] == 100


def test_a_video_that_is_stored_already_needs_no_new_scheduler(gateway, fake, eager):
    fake.held = {"deliver"}
    video_id = gateway.create()
    fake.wait_for("deliver")
    eventually(lambda: fake.stored == [video_id])
    fake.restart()
    eventually(lambda: fake.stored == [video_id] * 2)  # by each scheduler: a checkpoint of it can go
    assert gateway.wait(video_id)["timings"] == {"encode": 0.2, "denoise": 0.5}
    assert attempts(fake, video_id) == [0]


def test_a_video_whose_frames_are_all_here_needs_no_new_scheduler(gateway, fake, eager, monkeypatch):
    slow = threading.Event()
    real = runner_module.Recording.finish
    monkeypatch.setattr(runner_module.Recording, "finish", lambda r: (slow.wait(PATIENCE_S), real(r))[1])
    video_id = gateway.create()
    eventually(lambda: gateway.video(video_id)["progress"] == 99)
    fake.restart()
    eventually(lambda: fake.hellos.count(EPOCH + 1) >= 2)
    slow.set()
    gateway.wait(video_id)
    assert attempts(fake, video_id) == [0]
    eventually(lambda: fake.stored == [video_id])  # a checkpoint of it can go


def test_progress_may_fall_back_and_the_end_still_comes(gateway, fake, eager):
    fake.held = {"denoise:3"}
    video_id = gateway.create()
    fake.wait_for("denoise:3")
    with gateway.follow(video_id) as following:
        fake.restart()
        fake.held = {"queued"}
        fake.wait_for("queued")
        eventually(lambda: gateway.video(video_id)["status"] == "queued")
        assert gateway.video(video_id)["progress"] == 67, "what a person was shown does not fall"
        fake.release()
        steps = [data["step"] for _, name, data in following if name == "step"]
    assert steps == [1, 2, 3, 1, 2, 3, 4]
    assert gateway.video(video_id)["status"] == "completed"


def test_a_mesh_that_gives_up_fails_its_jobs_with_the_reason(gateway, fake):
    fake.held = {"denoise:1"}
    video_id = gateway.create()
    fake.wait_for("denoise:1")
    fake.give_up("rank 0 died three times: out of memory")
    error = gateway.wait(video_id, "failed")["error"]
    assert (error["code"], error["message"]) == ("mesh_lost", "rank 0 died three times: out of memory")
    assert fake.cancelled == [], "nobody is there to be told"


# ---- the library, message by message -----------------------------------------------------------------------------


class Script:
    """A scheduler and a rank that say what the test wants."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/scheduler"
        self.control = Channel.bind(self.endpoint, ToScheduler)
        self.frames = None
        self.gateway = b""

    def say(self, message, epoch=1):
        self.control.set_epoch(epoch)
        self.control.send(message, to=self.gateway)

    async def hear(self, kind):
        """The next message of a kind, and all that came before it."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                received = self.control.receive(0)
                if received is None:
                    await asyncio.sleep(0.005)
                elif isinstance(received.message, kind):
                    self.gateway = received.sender
                    return received.message

    def heard_nothing_of(self, kind):
        received = self.control.receive(0.1)
        while received is not None:
            assert not isinstance(received.message, kind), received.message
            received = self.control.receive(0.1)

    async def greet(self, epoch=1, **state):
        hello = await self.hear(GatewayHello)
        self.say(Welcome(epoch), epoch)
        self.say(MeshState(True, "ready", 2, 2, demo_model(), **state), epoch)
        if self.frames is None:
            self.frames = Channel.connect(hello.frames_endpoint, ToScheduler, incarnation("rank"))

    def chunk(self, request, attempt, first, count):
        params = request.params
        pixels = np.ascontiguousarray(moving_frames(params)[first : first + count])
        header = FramesChunk(request.id, attempt, first, count, params.num_frames, params.height, params.width)
        self.frames.send(header, payload=pixels.data)

    def close(self):
        self.control.close()
        if self.frames is not None:
            self.frames.close()


class Consumer:
    """Takes what comes of one request, as far as it is let."""

    def __init__(self, mesh, request, **how):
        self.events = []
        self.task = asyncio.create_task(self._take(mesh, request, how))

    async def _take(self, mesh, request, how):
        async with contextlib.aclosing(mesh.run(request, **how)) as events:
            async for event in events:
                self.events.append(event)

    @property
    def firsts(self):
        return [event.first for event in self.events if isinstance(event, Frames)]

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 what is waited for is another thread's or the mesh's
                await asyncio.sleep(0.005)


@pytest.fixture
def play(sockets, fake):
    """Runs scene(script, mesh, params) in a loop of its own."""
    folder = sockets / "s"
    folder.mkdir()
    params: ResolvedParams = fake.card.check(SamplingParams(prompt="a cat", seed=1, num_inference_steps=4))

    def play(scene, **options):
        async def main():
            script = Script(folder)
            mesh = Mesh(script.endpoint, f"ipc://{folder}/frames", **options)
            await mesh.start()
            try:
                async with asyncio.timeout(3 * PATIENCE_S):
                    await scene(script, mesh, params)
            finally:
                await mesh.close()
                script.close()

        asyncio.run(main())

    return play


async def begin(script, mesh, params, **how):
    """A request of which the script knows."""
    await script.greet()
    await mesh.wait_ready(PATIENCE_S)
    consumer = Consumer(mesh, mesh.request("a", params), **how)
    (request,) = (await script.hear(Submit)).requests
    return consumer, request


def test_messages_of_another_epoch_are_dropped_and_counted(play):
    async def scene(script, mesh, params):
        consumer, _ = await begin(script, mesh, params)
        script.say(Failed("a", "worker_lost", "of a scheduler that is gone"), epoch=0)
        script.say(Progress("a", "denoise", 1, 4, 1.0))
        await consumer.until(lambda: consumer.events)
        assert [event.step for event in consumer.events] == [1]
        assert mesh.stale == 1
        script.say(Welcome(2), epoch=2)
        assert (await script.hear(Submit)).requests[0].attempt == 1
        script.say(Progress("a", "denoise", 9, 4, 1.0), epoch=1)
        script.say(Progress("a", "denoise", 2, 4, 1.0), epoch=2)
        await consumer.until(lambda: len(consumer.events) == 2)
        assert [event.step for event in consumer.events] == [1, 2]
        assert mesh.stale == 2
        consumer.task.cancel()

    play(scene)


def test_the_new_attempt_is_one_above_the_highest_that_was_seen(play):
    async def scene(script, mesh, params):
        consumer, request = await begin(script, mesh, params)
        script.chunk(request, 0, 0, 1)
        script.chunk(request, 6, 0, 1)
        script.chunk(request, 6, 1, 4)
        await consumer.until(lambda: consumer.firsts == [0, 1])
        script.chunk(request, 0, 5, 4)  # of an attempt that was outdone
        await consumer.until(lambda: mesh.dropped_chunks == 2)
        script.chunk(request, 6, 5, 4)
        await consumer.until(lambda: consumer.firsts == [0, 1, 5])
        granted = [await script.hear(Grant) for _ in range(5)]
        assert sum(grant.credits for grant in granted) == 5
        script.say(Welcome(2), epoch=2)
        await script.hear(GatewayHello)
        assert [r.attempt for r in (await script.hear(Submit)).requests] == [7]
        script.chunk(request, 6, 9, 4)  # the old scheduler paid for it
        script.chunk(request, 7, 0, 1)
        script.chunk(request, 7, 1, 4)
        script.chunk(request, 7, 5, 4)
        script.chunk(request, 7, 9, 4)
        script.chunk(request, 7, 13, 4)
        heard = []
        while not heard or not isinstance(heard[-1], Stored):
            heard.append(await script.hear(Message))
        assert sum(message.credits for message in heard if isinstance(message, Grant)) == 5
        assert not any(isinstance(message, Submit) for message in heard)
        consumer.task.cancel()

    play(scene)


def test_what_waits_to_be_sent_together_is_told_to_a_new_scheduler_once(play):
    async def scene(script, mesh, params):
        await script.greet()
        await mesh.wait_ready(PATIENCE_S)
        consumer = Consumer(mesh, mesh.request("a", params))
        await consumer.until(lambda: mesh._outbox)
        script.say(Welcome(2), epoch=2)
        assert [r.attempt for r in (await script.hear(Submit)).requests] == [0], "the old one never heard of it"
        await mesh._flush
        script.heard_nothing_of(Submit)
        consumer.task.cancel()

    play(scene, batching_delay_s=0.5)


def test_a_silent_scheduler_is_greeted_again_and_a_new_welcome_from_the_same_changes_nothing(play, eager):
    async def scene(script, mesh, params):
        consumer, _ = await begin(script, mesh, params)
        for _ in range(2):
            assert (await script.hear(GatewayHello)).credits == FRAME_CREDITS
            script.say(Welcome(1))
        script.heard_nothing_of(Submit)
        consumer.task.cancel()

    play(scene)


def test_a_scheduler_that_speaks_is_not_greeted_again(play, eager):
    async def scene(script, mesh, params):
        await script.greet()
        await mesh.wait_ready(PATIENCE_S)
        for _ in range(10):
            await asyncio.sleep(mesh_module.SILENCE_S / 4)
            script.say(Welcome(1))
            received = script.control.receive(0)
            assert received is None, received

    play(scene)


def test_a_draining_mesh_takes_no_new_request_but_the_old_ones(play):
    async def scene(script, mesh, params):
        consumer, request = await begin(script, mesh, params)
        again = mesh.request("b", params)
        script.say(MeshState(False, "draining", 2, 2, draining=True))
        await consumer.until(lambda: mesh.state.draining)
        with pytest.raises(NotReady, match="draining"):
            mesh.request("c", params)
        with pytest.raises(NotReady, match="draining"):
            await anext(mesh.run(again))
        assert mesh.request("c", params, resumed=True).id == "c"
        script.chunk(request, 0, 0, 1)
        await consumer.until(lambda: consumer.firsts == [0])
        resumed = Consumer(mesh, again, resumed=True)
        assert [r.id for r in (await script.hear(Submit)).requests] == ["b"]
        consumer.task.cancel()
        resumed.task.cancel()

    play(scene)


def test_a_lost_mesh_ends_what_runs_and_what_comes_later(play):
    async def scene(script, mesh, params):
        consumer, request = await begin(script, mesh, params)
        mesh.abort("the workers process ended with exit code 1")
        with pytest.raises(RequestFailed, match="exit code 1") as caught:
            await consumer.task
        assert caught.value.code == "mesh_lost"
        with pytest.raises(RequestFailed, match="exit code 1"):
            await anext(mesh.run(request))

    play(scene)


# ---- a gateway that is killed ------------------------------------------------------------------------------------


class GatewayProcess:
    """The gateway as the launcher starts it."""

    def __init__(self, fake, folder: Path, port: int = 0) -> None:
        config_file = folder / "config.json"
        save_frozen(Config(output_path=str(folder / "outputs"), port=port), config_file)
        command = [sys.executable, "-P", "-m", "gateway", "--config", str(config_file)]
        command += ["--model-folder", str(MODEL_FOLDER), "--scheduler", fake.endpoint]
        command += ["--frames", f"ipc://{fake.folder}/frames"]
        self.process = subprocess.Popen(
            command, env=child_environment({}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.videos = folder / "outputs" / "videos"
        self.store = folder / "outputs" / "jobs.sqlite3"
        self.http = httpx2.Client(base_url=json.loads(self.process.stdout.readline())["url"], timeout=PATIENCE_S)

    @property
    def port(self) -> int:
        return self.http.base_url.port

    def post(self, key="", **changes):
        headers = {"idempotency-key": key} if key else {}
        return self.http.post("/v1/videos", json=BODY | changes, headers=headers).raise_for_status().json()

    def events(self, video_id, last=None):
        headers = {"last-event-id": last} if last else {}
        with self.http.stream("GET", f"/v1/videos/{video_id}/events", headers=headers) as response:
            assert response.status_code == 200
            yield from parse_events(response.iter_lines())

    def content(self, video_id):
        return self.http.get(f"/v1/videos/{video_id}/content").raise_for_status().content

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        self.http.close()
        return errors


@pytest.fixture
def gateway_process(fake, tmp_path):
    """Starts gateways one after the other, all on one output folder and one socket for frames."""
    started = []

    def start(port=0):
        started.append(GatewayProcess(fake, tmp_path, port))
        return started[-1]

    yield start
    for gateway in started:
        gateway.kill()


def test_a_gateway_killed_while_it_records_ends_the_same_jobs_with_the_same_bytes(gateway_process, fake):
    first = gateway_process()
    undisturbed = first.post("done", seed=1)["id"]
    assert names(list(first.events(undisturbed)))[-1] == "done"
    expected = first.content(undisturbed)
    fake.held = {"decode:3"}
    video_id = first.post("running", seed=1)["id"]
    seen = []
    for event in first.events(video_id):
        seen.append(event)
        if event[2].get("first") == 5:
            break
    first.kill()
    assert (first.videos / f"{video_id}.fragments.mp4").stat().st_size > 0

    second = gateway_process()
    fake.wait_for("decode:3")
    fake.release()
    told = list(second.events(video_id, last=seen[-1][0]))
    assert names(told)[-1] == "done"
    assert [data["first"] for _, name, data in told if name == "frames"] == [0, 1, 5, 9, 13]
    assert second.content(video_id) == expected
    sent = [(attempt, first) for name, attempt, first in fake.chunks if name == video_id]
    assert sent == [(0, 0), (0, 1), (0, 5), (1, 0), (1, 1), (1, 5), (1, 9), (1, 13)]
    # What is done is told and never run again, and a key means what it meant.
    assert second.content(undisturbed) == expected
    assert names(list(second.events(undisturbed, last="0-3"))) == ["frames", "done"]
    assert second.post("running", seed=1)["id"] == video_id
    assert second.post("done", seed=1)["id"] == undisturbed
    assert attempts(fake, undisturbed) == [0]
    assert sorted(path.name for path in second.videos.iterdir()) == sorted([f"{undisturbed}.mp4", f"{video_id}.mp4"])


def test_the_clients_events_go_on_over_a_lost_connection_and_a_new_gateway(gateway_process, fake):
    first = gateway_process()
    fake.held = {"decode:2"}
    video_id = first.post(seed=1)["id"]
    told, second = [], None
    with Client(str(first.http.base_url)) as client:
        for name, data in client.events(video_id):
            told.append((name, data.get("first")))
            if told[-1] == ("frames", 1) and second is None:
                first.kill()
                second = gateway_process(port=first.port)
            elif told.count(("frames", 1)) == 2:
                fake.release()
    assert told[-1] == ("done", None)
    assert [first for name, first in told if name == "frames"] == [0, 1, 0, 1, 5, 9, 13]


def test_the_clients_events_go_on_where_the_same_gateway_broke_off(gateway, fake, monkeypatch):
    """A proxy may cut a stream at any time."""
    fake.held = {"decode:1", "decode:3"}
    video_id = gateway.create()
    lasts = []
    with Client(gateway.url) as client:
        real = client._listen

        def listen(video_id, jpeg, last):
            lasts.append(last)
            for event in real(video_id, jpeg, last):
                yield event
                if event[1] == "frames" and len(lasts) == 1:
                    fake.release("decode:1")
                    raise httpx2.ReadError("cut")
                if len(lasts) == 2:
                    fake.release()

        monkeypatch.setattr(client, "_listen", listen)
        told = [(name, data.get("first")) for name, data in client.events(video_id)]
    assert lasts[0] == ""
    assert len(lasts) == 2
    assert [first for name, first in told if name == "frames"] == [0, 1, 5, 9, 13]
    assert [name for name, _ in told].count("queued") == 1
    assert told[-1][0] == "done"


def test_a_gateway_killed_between_the_file_and_its_row_runs_nothing_again(gateway_process, fake):
    first = gateway_process()
    video_id = first.post()["id"]
    assert names(list(first.events(video_id)))[-1] == "done"
    expected = first.content(video_id)
    first.kill()
    with contextlib.closing(sqlite3.connect(first.store)) as store, store:
        store.execute("UPDATE jobs SET status = 'in_progress', output_file = NULL")
    (first.videos / f"{video_id}.fragments.mp4").write_bytes(b"not yet unlinked")
    second = gateway_process()
    assert names(list(second.events(video_id))) == ["frames", "done"]
    assert second.content(video_id) == expected
    assert [path.name for path in second.videos.iterdir()] == [f"{video_id}.mp4"]
    assert len(fake.submitted) == 1
    eventually(lambda: fake.stored == [video_id] * 2)  # by each of the two: a checkpoint of it can go


# ---- the whole server, real signals ------------------------------------------------------------------------------

LONG, SEED = 60, 5
"""Denoising steps that leave time to break something; and one seed, so that every result can be compared."""


@pytest.fixture(scope="module")
def undisturbed():
    """The frames of `LONG` steps as a mesh makes them that nobody disturbs."""
    with Generator.from_pretrained("demo", num_gpus=1) as generator:
        return generator.generate(BODY["prompt"], seed=SEED, num_inference_steps=LONG).frames


@pytest.fixture(scope="module")
def recorded(undisturbed, tmp_path_factory):
    """The same after H.264."""
    path = tmp_path_factory.mktemp("recorded") / "video.mp4"
    with FragmentWriter(path, 64, 64, 8, {}) as writer:
        for first, count in ((0, 1), *((first, 4) for first in range(1, 17, 4))):
            writer.write(undisturbed[first : first + count])
    return read_frames(path)


def assert_ends_as_if_undisturbed(server, video_id, recorded):
    video = server.result(video_id)
    assert video["status"] == "completed", video
    assert np.array_equal(server.frames(video_id), recorded)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "number"),
    [
        ("scheduler", signal.SIGSTOP),
        ("workers", signal.SIGKILL),
        ("workers", signal.SIGSTOP),
        ("gateway", signal.SIGSTOP),
    ],
)
def test_a_process_that_dies_or_hangs_is_replaced_and_the_job_completes(serve, recorded, role, number):
    """The other faults are those of tests/test_chaos.py and tests/test_death.py."""
    server = serve().wait_ready()
    video_id = server.create(seed=SEED, num_inference_steps=LONG)
    server.until(video_id, "step", step=10)
    victim = server.find(role)
    victim.send_signal(number)
    server.find_another(role, than=victim)
    assert_ends_as_if_undisturbed(server, video_id, recorded)
    assert f"the {role} process" in server.stderr
    # The same address, a mesh that is found where it was, and no restart too many.
    assert observe_mesh_of(server).about.url == server.url
    assert server.result(server.create())["status"] == "completed"
    assert server.stderr.count("starting a process again") == 1
    assert server.end(signal.SIGTERM) == 0


def observe_mesh_of(server) -> Observer:
    with observe_mesh(None) as (observer, status):
        assert status.ready
        assert observer.about.pid == server.process.pid
        return observer


@pytest.mark.slow
def test_a_scheduler_killed_while_frames_arrive_is_replaced_and_the_job_completes(serve, recorded):
    server = serve().wait_ready()
    video_id = server.create(seed=SEED, num_inference_steps=LONG)
    victim = server.find("scheduler")
    server.until(video_id, "frames", first=0)
    victim.kill()
    server.find_another("scheduler", than=victim)
    assert_ends_as_if_undisturbed(server, video_id, recorded)
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.slow
def test_a_process_that_keeps_dying_ends_the_server_with_the_last_error(serve, short_tmp):
    server = serve("--crash-limit", "2").wait_ready()
    for _ in range(2):
        victim = server.find("gateway")
        victim.kill()
        if server.process.poll() is None and server.stderr.count("starting a process again") == 0:
            server.find_another("gateway", than=victim)
    assert server.end() == 1
    last = server.stderr.splitlines()[-1]
    assert last.startswith("error: the gateway process ended with exit code -9, 2 deaths in five minutes")
    assert "Traceback" not in server.stderr
    assert not list(short_tmp.glob("framemesh-*"))


@pytest.mark.parametrize("comes_back", [True, False])
def test_ranks_that_never_say_a_word_again_end_the_server(short_tmp, comes_back):
    """They die before they join, so that nobody counts their losses."""

    async def main():
        supervisor = Supervisor(Config(start_timeout=0), short_tmp, quiet=True)
        supervisor._trouble = asyncio.get_running_loop().create_future()
        supervisor._see_state(MeshState(True, "ready", 2, 2))
        supervisor._see_state(MeshState(False, "the workers are restarting: rank 1 died", 0, 2, losses=1))
        if comes_back:
            supervisor._see_state(MeshState(True, "ready", 2, 2, losses=1))
        for _ in range(3):
            await asyncio.sleep(0)
        await supervisor.stop()
        return supervisor._trouble

    trouble = asyncio.run(main())
    assert trouble.done() is not comes_back
    if not comes_back:
        assert trouble.result() == "the workers did not come back within 0 s: rank 1 died"


@pytest.mark.slow
def test_a_worker_group_that_keeps_dying_ends_the_server_with_the_last_error(serve, short_tmp):
    server = serve("--crash-limit", "2").wait_ready()
    with observe_mesh(None) as (observer, _):
        server.find("rank").kill()
        eventually(lambda: (status := observer.look()).losses == 1 and status.ready, 40)
    server.remember()
    server.find("rank").kill()
    assert server.end(patience_s=60) == 1
    assert server.stderr.splitlines()[-1] == (
        "error: the workers were lost too often (--crash-limit): the worker group was restarted"
    )
    assert "Traceback" not in server.stderr
    assert not list(short_tmp.glob("framemesh-*"))


@pytest.mark.slow
@pytest.mark.parametrize("role", ["scheduler", "workers"])
def test_what_dies_before_the_mesh_was_ready_ends_the_start(serve, short_tmp, role):
    server = serve()
    eventually(lambda: server.find(role) is not None)
    server.remember()
    server.find(role).kill()
    assert server.end() == 1
    assert f"error: the {role} process ended with exit code -9" in server.stderr
    assert "Traceback" not in server.stderr
    assert not list(short_tmp.glob("framemesh-*"))


@pytest.mark.slow
def test_the_sdk_does_not_notice_a_scheduler_that_dies(undisturbed):
    def break_it(event):
        if isinstance(event, Progress) and event.stage == "denoise" and event.step >= 10 and not broken:
            broken.append(os.kill(generator.pids["scheduler"], signal.SIGKILL))

    with Generator.from_pretrained("demo", num_gpus=1) as generator:
        before, broken = generator.pids, []
        result = generator.generate(BODY["prompt"], seed=SEED, num_inference_steps=LONG, on_event=break_it)
        assert broken
        assert np.array_equal(result.frames, undisturbed)
        assert generator.pids["scheduler"] != before["scheduler"]
        assert generator.pids["workers"] == before["workers"]


@pytest.fixture
def start_run(tmp_path, short_tmp):
    """Starts `framemesh run`, which has come to the denoising when this returns."""
    started = []

    def start(steps):
        command = [sys.executable, "-P", "-m", "launch", "run", "--port", "0", "--output-path", str(tmp_path / "out")]
        command += ["--prompt", BODY["prompt"], "--num-inference-steps", str(steps), "--output-file-name", "a.mp4"]
        environment = child_environment({})
        run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(run)
        assert "denoising\n" in iter(run.stderr.readline, "")
        return run

    yield start
    for run in started:
        run.kill()
        run.communicate()


@pytest.mark.slow
def test_one_run_over_http_outlives_its_gateway(start_run, tmp_path, short_tmp):
    run = start_run(LONG)
    children = psutil.Process(run.pid).children()
    next(child for child in children if "gateway" in child.cmdline()).kill()
    out, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert len(read_frames(tmp_path / "out" / "a.mp4")) == 17
    assert out.startswith("video "), "only the result is printed there"
    assert "starting a process again" in errors
    assert not list(short_tmp.glob("framemesh-*"))


@pytest.mark.slow
def test_a_run_that_is_interrupted_says_nothing_but_that(start_run, short_tmp):
    run = start_run(1000)
    run.send_signal(signal.SIGINT)
    out, errors = run.communicate(timeout=30)
    assert (run.returncode, out) == (130, "")
    assert errors == "stopping\n"
    assert not list(short_tmp.glob("framemesh-*"))
