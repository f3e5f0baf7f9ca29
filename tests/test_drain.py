"""A mesh that is told to end: what runs finishes, what is new is refused, nothing is lost; at once if asked twice."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import structlog
from served import BODY, eventually, names

from gateway.jobs.store import JobStore
from launch.cli import main
from launch.process import child_environment
from launch.supervisor import Supervisor
from runtime.config import Config
from runtime.protocol import MeshState, Welcome
from runtime.wire import Received


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


# ---- the gateway, over a fake mesh -------------------------------------------------------------------------------


def drain(gateway, fake):
    fake.drain()
    eventually(lambda: gateway.call(lambda: gateway.mesh.state.draining))


def stored_status(tmp_path) -> dict[str, str]:
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as store:
        return dict(store.execute("SELECT id, status FROM jobs").fetchall())


def test_a_draining_gateway_refuses_new_work_and_serves_the_old(gateway, fake):
    done = gateway.create(num_frames=1)
    gateway.wait(done)
    fake.held = {"denoise:1", "queued"}
    ids = [gateway.create() for _ in range(2)]
    fake.release("queued")
    fake.wait_for("denoise:1")
    with gateway.follow(ids[0]) as following:
        before = next(following)
        drain(gateway, fake)
        refused = gateway.http.post("/v1/videos", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.json()["error"]["message"] == "not ready: draining: no new work is taken"
        assert int(refused.headers["retry-after"]) >= 1
        health = gateway.http.get("/health/ready")
        assert (health.status_code, health.json()["status"], health.json()["reason"]) == (503, "draining", "draining")
        assert gateway.http.get("/health/live").status_code == 200
        assert gateway.http.get(f"/v1/videos/{done}/content").status_code == 200
        assert gateway.http.post(f"/v1/videos/{ids[1]}/cancel").json()["status"] == "cancelled"
        assert gateway.video(ids[0])["status"] == "in_progress"
        fake.release()
        assert names([before, *following])[-1] == "done"
    assert gateway.http.post("/v1/videos", json=BODY | {"sede": 1}).status_code == 400
    assert len(gateway.http.get("/v1/videos").json()["data"]) == 3, "nothing of what was refused is kept"


def test_jobs_that_a_drain_cut_off_run_in_the_next_start(start, fake, tmp_path):
    fake.held = {"denoise:2"}
    first = start()
    video_id = first.create()
    fake.wait_for("denoise:2")
    drain(first, fake)
    fake.die()
    first.close()
    assert stored_status(tmp_path) == {video_id: "in_progress"}
    fake.draining, fake.held = False, set()
    fake.come_back()
    second = start()
    second.wait(video_id)


def test_a_job_that_was_accepted_a_moment_too_late_is_not_failed(start, fake, tmp_path, monkeypatch):
    """The mesh begins to drain between the check and the row; whoever follows it hears nothing that is not true."""
    first = start()
    first.wait(first.create(num_frames=1))
    inserting, go_on = threading.Event(), threading.Event()
    real = JobStore.insert

    async def insert(store, job):
        stored = await real(store, job)
        inserting.set()
        await asyncio.to_thread(go_on.wait, 10)
        return stored

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "insert", insert)
        answers = []
        late = threading.Thread(target=lambda: answers.append(first.create()))
        late.start()
        assert inserting.wait(5)
        drain(first, fake)
        go_on.set()
        late.join(10)
    (video_id,) = answers
    with first.follow(video_id):
        assert first.video(video_id)["status"] == "queued"
    first.close()
    assert stored_status(tmp_path)[video_id] == "queued"
    fake.draining = False
    start().wait(video_id)


def test_a_submit_that_meets_a_drain_on_the_way_waits_in_the_store(start, fake, tmp_path):
    gateway = start()
    gateway.wait(gateway.create(num_frames=1))
    fake.draining = True  # and nobody was told
    ids = [gateway.create(), gateway.create()]
    eventually(lambda: not gateway.call(gateway.runner.working_on))
    assert [gateway.video(video_id)["status"] for video_id in ids] == ["queued", "queued"]
    with gateway.follow(ids[0]) as following:
        assert gateway.http.post(f"/v1/videos/{ids[0]}/cancel").json()["status"] == "cancelled"
        assert names(following)[-1] == "error"
    gateway.close()
    assert stored_status(tmp_path)[ids[1]] == "queued"
    fake.draining = False
    start().wait(ids[1])


# ---- the whole server --------------------------------------------------------------------------------------------


def assert_clean(server, short_tmp):
    assert "Traceback" not in server.stderr
    assert not list(short_tmp.glob("framemesh-*")), "sockets were left behind"


@pytest.mark.slow
def test_a_signal_lets_running_work_end(serve, short_tmp):
    server = serve().wait_ready()
    video_id = server.create(num_inference_steps=30)
    with server.follow(video_id) as events:
        for _, name, _ in events:
            if name == "step":
                break
        server.process.send_signal(signal.SIGINT)
        assert names(events)[-1] == "done"
    assert server.end() == 0
    assert len(server.frames(video_id)) == 17
    assert re.search(r"draining: 1 running, 0 queued; again to stop at once", server.stderr)
    assert_clean(server, short_tmp)


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_the_next_server_goes_on(serve, short_tmp):
    server = serve().wait_ready()
    video_id = server.create(num_inference_steps=1000)
    server.until(video_id, "step", step=3)
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: "again to stop at once" in server.stderr)
    since = time.monotonic()
    assert server.end(signal.SIGINT) == 128 + signal.SIGINT
    assert time.monotonic() - since < 9, "three seconds, on a loaded machine"
    assert_clean(server, short_tmp)
    status = stored_status(server.outputs)
    assert status == {video_id: "in_progress"}
    again = serve().wait_ready()
    again.until(video_id, "step", step=1)
    assert again.http.post(f"/v1/videos/{video_id}/cancel").json()["status"] == "cancelled"
    assert again.end(signal.SIGTERM) == 0
    assert_clean(again, short_tmp)


@pytest.mark.slow
def test_the_drain_command_ends_a_server_when_its_work_has(serve, short_tmp):
    server = serve().wait_ready()
    video_id = server.create(num_inference_steps=150)
    server.until(video_id, "step", step=1)
    command = [sys.executable, "-P", "-m", "launch", "drain", "--timeout", "60"]
    drained = subprocess.run(command, env=child_environment({}), capture_output=True, text=True, timeout=60, check=True)
    told = drained.stderr.splitlines()
    assert (told[0], told[-1]) == ("draining: 1 running, 0 queued", "stopped")
    assert server.end() == 0
    assert stored_status(server.outputs) == {video_id: "completed"}
    assert_clean(server, short_tmp)


@pytest.mark.slow
def test_what_a_drain_has_no_time_for_goes_on_at_the_next_start(serve, short_tmp):
    server = serve("--drain-timeout", "0").wait_ready()
    video_id = server.create(num_inference_steps=300, seed=3)
    server.until(video_id, "step", step=20)
    assert server.end(signal.SIGTERM) == 0
    assert stored_status(server.outputs) == {video_id: "in_progress"}
    assert_clean(server, short_tmp)
    again = serve().wait_ready()
    with again.follow(video_id) as events:
        steps = [data["step"] for _, name, data in events if name == "step"]
    assert steps[0] > 10, "it began again instead of going on from the checkpoint"
    assert again.video(video_id)["status"] == "completed"


def test_drain_refuses_a_negative_time(capsys):
    assert main(["drain", "--timeout", "-1"]) == 2
    assert "--timeout: -1 is negative; take 0 or more seconds" in capsys.readouterr().err


def test_without_a_mesh_drain_says_so(capsys, short_tmp):
    assert main(["drain"]) == 1
    assert capsys.readouterr().err == "error: no mesh is running\n"


# ---- a scheduler that has not heard of it ------------------------------------------------------------------------


class Control:
    """A channel whose peer forgets what it was told in an earlier epoch."""

    def __init__(self, *words):
        self.sent, self._words = [], list(words)

    async def send(self, message):
        self.sent.append(message)

    async def receive(self):
        if not self._words:
            await asyncio.Event().wait()
        return Received(b"scheduler", 2, self._words.pop(0))

    def set_epoch(self, epoch):
        pass


def test_a_scheduler_that_was_started_anew_is_told_to_drain_again(short_tmp):
    async def scene():
        supervisor = Supervisor(Config(), short_tmp, quiet=True)
        draining = MeshState(False, "draining", 1, 1, draining=True)
        control = supervisor._control = Control(Welcome(2), Welcome(2), draining, Welcome(2))
        supervisor._ready.set()
        await supervisor.drain(20.0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(supervisor._listen(control), 0.2)
        drains = [message.timeout_s for message in control.sent]
        assert drains[0] == pytest.approx(20.0, abs=1)
        assert len(drains) == 3
        assert drains[2] <= drains[1] <= drains[0]

    asyncio.run(scene())
