"""Several gateways on one store: each sees and tells of all jobs, one works on each, and what a dead one leaves is done
by another, once. Gateways in threads over a fake mesh first, then real processes that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import httpx2
import numpy as np
import pytest
import structlog
from fake_mesh import MODEL_FOLDER, moving_frames
from postgres import PASSWORD, query
from served import BODY, Gateway, eventually, names, parse_events

from gateway.jobs.database import StoreUnavailable
from gateway.jobs.store import JobStore
from gateway.media.mp4 import read_frames
from launch.process import child_environment
from runtime.config import Config, save_frozen

LEASE_S = 1.5
PATIENCE_S = 30.0
FRAMES = 17
"""Of a video of which nothing is said."""


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
def pair(start, postgres):
    """Two gateways on one database and one output folder; a lease is short."""
    url = postgres.database()
    return [start(database_url=url, job_lease=LEASE_S) for _ in range(2)]


def working_on(gateway: Gateway) -> set[str]:
    return set(gateway.call(gateway.runner.working_on))


@contextlib.contextmanager
def following(gateway: Gateway, video_id: str, **query_):
    """Events as they come, in a list that grows; the reader has begun to read."""
    told, first = [], threading.Event()

    def read():
        with gateway.follow(video_id, **query_) as events:
            for event in events:
                told.append(event)
                first.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert first.wait(10)
    yield told
    reader.join(PATIENCE_S)
    assert not reader.is_alive(), names(told)


def frames_of(told) -> list[int]:
    """Every number of a frame that was told of, in order."""
    spans = [(data["first"], data["count"]) for _, name, data in told if name == "frames"]
    return [number for first, count in spans for number in range(first, first + count)]


def content(gateway: Gateway, video_id: str) -> bytes:
    return gateway.http.get(f"/v1/videos/{video_id}/content").raise_for_status().content


# ---- jobs of another gateway -------------------------------------------------------------------------------------


def test_what_another_gateway_does_is_told_from_the_row(pair, fake):
    owner, other = pair
    # A step that comes soon after the last one that was stored is not.
    fake.held, fake.steps_sleep_s, fake.untold = {"denoise:2"}, 0.3, {"denoise:4"}
    video_id = owner.create()
    fake.wait_for("denoise:2")
    with following(other, video_id) as told, following(other, video_id, frames="jpeg") as pictures:
        eventually(lambda: [data["step"] for _, name, data in told if name == "step"] == [2])
        video = other.video(video_id)
        assert (video["status"], video["stage"], video["step"], video["progress"]) == ("in_progress", "denoise", 2, 45)
        assert [listed["id"] for listed in other.http.get("/v1/videos").json()["data"]] == [video_id]
        mirrors = [name for name in other.tasks() if name.startswith("mirror")]
        assert len(mirrors) == 1, "one for all who read"
        fake.held = {"decode:2"}
        eventually(lambda: ("stage", {"stage": "decode"}) in [(name, data) for _, name, data in told])
        decoding = next(event for event in told if event[1:] == ("stage", {"stage": "decode"}))
        fake.release()
    assert names(told)[0] == "stage"
    assert names(told)[-1] == "done"
    steps = [data["step"] for _, name, data in told[: told.index(decoding)] if name == "step"]
    assert steps[-1] == 4, "those that no news told of"
    assert told[-1][2] | {"eta_s": None} == owner.wait(video_id)
    assert frames_of(told) == frames_of(pictures) == list(range(FRAMES))
    assert sum(len(data.get("jpeg", ())) for _, _, data in pictures) == FRAMES
    assert content(other, video_id) == content(owner, video_id)
    assert names(other.events(video_id)) == ["frames", "done"]
    assert len(fake.submitted) == 1
    assert other.tasks() & set(mirrors) == set()


def test_a_mirror_ends_when_nobody_looks_into_it(pair, fake, monkeypatch):
    monkeypatch.setattr("gateway.jobs.mirror.POLL_S", 0.01)
    owner, other = pair
    fake.held = {"denoise:2"}
    video_id = owner.create()
    for _ in range(2):
        with other.follow(video_id) as events:
            next(events)
            assert f"mirror of {video_id}" in other.tasks()
        eventually(lambda: f"mirror of {video_id}" not in other.tasks())


def test_a_job_of_another_gateway_is_cancelled_and_deleted(pair, fake):
    owner, other = pair
    fake.held = {"denoise:2"}
    ids = [owner.create(), owner.create()]
    eventually(lambda: working_on(owner) == set(ids))
    with following(other, ids[0]) as told, following(owner, ids[0]) as heard:
        answer = other.http.post(f"/v1/videos/{ids[0]}/cancel").json()
        assert (answer["status"], answer["error"]["code"]) == ("cancelled", "cancelled")
    for events in (told, heard):
        assert (events[-1][1], events[-1][2]["error"]["message"]) == ("error", "cancelled by the client")
    with following(other, ids[1]) as told:
        assert other.http.delete(f"/v1/videos/{ids[1]}").json()["deleted"]
    assert told[-1][1] == "error"
    assert owner.http.get(f"/v1/videos/{ids[1]}").status_code == 404
    assert fake.cancelled == ids
    assert working_on(owner) == set()
    assert list(owner.videos.iterdir()) == []


def test_a_job_that_is_deleted_under_its_owner_is_dropped(pair, fake):
    """By a gateway that did not wait for it."""
    owner, other = pair
    fake.held = {"decode:2"}
    video_id = owner.create()
    fake.wait_for("decode:2")
    with following(owner, video_id) as told:
        asyncio.run_coroutine_threadsafe(other.runner._store.delete(video_id), other._loop).result(10)
        eventually(lambda: working_on(owner) == set())
    assert told[-1][2]["error"]["message"] == "deleted by the client"
    assert fake.cancelled == [video_id]
    eventually(lambda: list(owner.videos.iterdir()) == [])


def test_one_idempotency_key_at_two_gateways_is_one_job(pair, fake):
    one, other = pair

    def post(gateway, **changes):
        return gateway.http.post("/v1/videos", json=BODY | changes, headers={"Idempotency-Key": "k"})

    first = post(one).json()["id"]
    assert post(other).json()["id"] == first
    refused = post(other, num_frames=5)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "idempotency_key_reused")
    one.wait(first)
    assert post(other).json()["status"] == "completed"
    assert len(fake.submitted) == 1


def test_a_repeated_request_with_another_seed_is_another_request(gateway):
    def post(**changes):
        return gateway.http.post("/v1/videos", json=BODY | changes, headers={"Idempotency-Key": "k"})

    assert post().status_code == post().status_code == 200
    assert post(seed=5).json()["error"]["code"] == "idempotency_key_reused"


# ---- who works on what -------------------------------------------------------------------------------------------


def cannot_renew(monkeypatch, gateway: Gateway) -> threading.Event:
    """Until the event is set."""
    real, healed = JobStore.renew, threading.Event()

    async def renew(store, *args):
        if store is gateway.runner._store and not healed.is_set():
            raise StoreUnavailable("the network is cut")
        return await real(store, *args)

    monkeypatch.setattr(JobStore, "renew", renew)
    return healed


def test_a_gateway_that_cannot_renew_leaves_its_jobs_and_its_readers_hear_the_rest(pair, fake, monkeypatch):
    cut, other = pair
    undisturbed = cut.create(seed=1)
    cut.wait(undisturbed)
    fake.held = {"decode:2"}
    video_id = cut.create(seed=1)
    fake.wait_for("decode:2")
    with following(cut, video_id) as told:
        eventually(lambda: frames_of(told))
        cannot_renew(monkeypatch, cut)
        eventually(lambda: working_on(other) == {video_id}, PATIENCE_S)
        assert working_on(cut) == set()
        eventually(lambda: len(fake.submitted) == 3)
        fake.release()
    assert names(told)[-1] == "done"
    assert frames_of(told) == list(range(FRAMES))
    assert fake.completed == [undisturbed, video_id]
    assert content(cut, video_id) == content(cut, undisturbed), "two gateways wrote into one file"


def test_a_gateway_alone_takes_its_jobs_up_again_when_the_database_is_back(pair, fake, monkeypatch):
    """A chunk that its reader has heard of comes again, and is not told again."""
    alone, other = pair
    other.close()
    fake.held = {"decode:2"}
    video_id = alone.create()
    fake.wait_for("decode:2")
    healed = cannot_renew(monkeypatch, alone)
    with following(alone, video_id) as told:
        eventually(lambda: frames_of(told))
        eventually(lambda: working_on(alone) == set(), PATIENCE_S)
        fake.release()
        healed.set()
    assert names(told)[-1] == "done"
    assert frames_of(told) == list(range(FRAMES))
    assert fake.completed == [video_id]


def test_a_clean_shutdown_gives_its_jobs_to_the_others(start, postgres, fake):
    url = postgres.database()
    first, second = (start(database_url=url, job_lease=12.0) for _ in range(2))
    fake.held = {"denoise:2"}
    video_id = first.create()
    fake.wait_for("denoise:2")
    first.close()
    since = time.monotonic()
    eventually(lambda: working_on(second) == {video_id})
    assert time.monotonic() - since < 8, "it waited for the lease to run out"
    fake.release()
    second.wait(video_id)


def test_a_restart_of_the_database_disturbs_no_job(pair, postgres, fake):
    owner, other = pair
    fake.held = {"denoise:2"}
    video_id = owner.create()
    fake.wait_for("denoise:2")
    with following(owner, video_id) as told:
        coming = postgres.restart(1.0)
        fake.release()
        coming.join()
    assert names(told)[-1] == "done"
    assert other.wait(video_id)["status"] == "completed"
    assert len(frames_of(told)) == FRAMES


def test_an_ending_that_could_not_be_stored_is_stored_later(start, fake, monkeypatch):
    gateway = start(job_lease=1.0)
    real, failed = JobStore.update, []

    async def update(store, job_id, **columns):
        if columns["status"] == "completed" and not failed:
            failed.append(job_id)
            raise StoreUnavailable("the database went away")
        return await real(store, job_id, **columns)

    monkeypatch.setattr(JobStore, "update", update)
    video_id = gateway.create()
    with following(gateway, video_id) as told:
        pass
    assert names(told)[-1] == "done"
    assert failed == [video_id]
    assert gateway.video(video_id)["status"] == "completed"
    assert len(fake.submitted) == 1, "the video was there already"


def test_the_password_of_the_database_is_shown_to_nobody(pair, logs):
    gateway, _ = pair
    gateway.wait(gateway.create())
    answer = gateway.http.get("/server_info")
    assert answer.json()["config"]["database_url"].startswith("postgresql://")
    assert PASSWORD not in answer.text
    assert PASSWORD not in str(logs)


def test_without_a_database_the_answer_is_503(gateway, monkeypatch):
    async def get(store, *args):
        raise StoreUnavailable("the database is not reachable: no route to host")

    video_id = gateway.create()
    gateway.wait(video_id)
    monkeypatch.setattr(JobStore, "get", get)
    answer = gateway.http.get(f"/v1/videos/{video_id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert int(answer.headers["retry-after"]) > 0


def test_a_cancelled_job_that_its_gateway_left_is_not_done(start, fake):
    fake.held = {"denoise:2"}
    first = start()
    video_id = first.create()
    fake.wait_for("denoise:2")
    first.close()
    query(f"sqlite:///{first.config.output_path}/jobs.sqlite3", "UPDATE jobs SET cancel_requested = 'enough'")
    video = start().video(video_id)
    assert (video["status"], video["error"]["message"]) == ("cancelled", "enough")
    assert len(fake.submitted) == 1


# ---- gateways that are killed ------------------------------------------------------------------------------------


class GatewayProcess:
    """One of several gateways on an output folder, as the launcher starts it."""

    def __init__(self, name: str, fake, folder, database_url: str | None) -> None:
        config = Config(output_path=str(folder / "outputs"), port=0, database_url=database_url, job_lease=2.0)
        save_frozen(config, folder / f"{name}.json")
        command = [sys.executable, "-P", "-m", "gateway", "--config", str(folder / f"{name}.json")]
        command += ["--model-folder", str(MODEL_FOLDER), "--scheduler", fake.endpoint]
        command += ["--frames", f"ipc://{fake.folder}/frames-{name}"]
        self.errors = (folder / f"{name}.log").open("a+")
        self.process = subprocess.Popen(
            command, env=child_environment({}), stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.videos = folder / "outputs" / "videos"

    def wait_ready(self) -> GatewayProcess:
        line = self.process.stdout.readline()
        assert line, self.said()
        self.http = httpx2.Client(base_url=json.loads(line)["url"], timeout=PATIENCE_S)
        return self

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def create(self) -> str:
        return self.http.post("/v1/videos", json=BODY | {"num_frames": 5}).raise_for_status().json()["id"]

    def statuses(self) -> dict[str, str]:
        page = self.http.get("/v1/videos", params={"limit": 100}).raise_for_status().json()
        return {video["id"]: video["status"] for video in page["data"]}

    def last_event(self, video_id: str) -> str:
        with self.http.stream("GET", f"/v1/videos/{video_id}/events") as response:
            return [name for _, name, _ in parse_events(response.iter_lines())][-1]

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.send_signal(signal.SIGCONT)
        self.process.communicate(timeout=PATIENCE_S)
        if hasattr(self, "http"):
            self.http.close()
        self.errors.close()


@pytest.fixture
def gateway_process(fake, tmp_path):
    """Starts gateways on one output folder."""
    started = []

    def start(name, database_url=None):
        started.append(GatewayProcess(name, fake, tmp_path, database_url))
        return started[-1]

    yield start
    for gateway in started:
        if not gateway.errors.closed:
            gateway.end()


def two_running_and_twenty_queued(fake, first: GatewayProcess, others: list[GatewayProcess]) -> list[str]:
    """Jobs of the first gateway for the most part: it is about to die."""
    fake.held = {"denoise:1"}
    running = [first.create() for _ in range(2)]
    eventually(lambda: Counter(r.mark for r in list(fake._running.values()))["denoise:1"] == 2)
    fake.held = {"denoise:1", "queued"}
    takers = [first, first, *others] * 20
    queued = [gateway.create() for gateway in takers[:20]]
    eventually(lambda: Counter(r.mark for r in list(fake._running.values()))["queued"] == 20)
    return running + queued


def check_all_done_once(fake, ids: list[str], gateways: list[GatewayProcess], database_url: str) -> None:
    done = dict.fromkeys(ids, "completed")
    for gateway in gateways:
        eventually(lambda gateway=gateway: gateway.statuses() == done, PATIENCE_S)
        assert gateway.last_event(ids[0]) == gateway.last_event(ids[-1]) == "done"
    assert sorted(fake.completed) == sorted(ids), "a job was done twice, or not at all"
    assert query(database_url, "SELECT count(*) FROM jobs WHERE completed_at IS NOT NULL") == [(len(ids),)]
    videos = gateways[0].videos
    assert sorted(path.name for path in videos.iterdir()) == sorted(f"{video_id}.mp4" for video_id in ids)
    params = fake.submitted[0].params
    for video_id in ids:
        frames = read_frames(videos / f"{video_id}.mp4")
        assert np.abs(frames.astype(int) - moving_frames(params)).mean() < 4


@pytest.mark.slow
def test_22_jobs_outlive_a_gateway_that_is_killed(gateway_process, fake, tmp_path):
    first = gateway_process("one").wait_ready()
    ids = two_running_and_twenty_queued(fake, first, [])
    first.end(signal.SIGKILL)
    second = gateway_process("one").wait_ready()
    eventually(lambda: len(fake.submitted) == 44)
    fake.release()
    check_all_done_once(fake, ids, [second], f"sqlite:///{tmp_path}/outputs/jobs.sqlite3")


@pytest.mark.slow
def test_22_jobs_outlive_a_gateway_that_is_killed_on_postgresql(gateway_process, fake, postgres):
    """One gateway alone, started again: it waits for its own old leases at most."""
    url = postgres.database()
    first = gateway_process("one", url).wait_ready()
    ids = two_running_and_twenty_queued(fake, first, [])
    first.end(signal.SIGKILL)
    second = gateway_process("one", url).wait_ready()
    eventually(lambda: len(fake.submitted) == 44)
    fake.release()
    check_all_done_once(fake, ids, [second], url)
    assert PASSWORD not in second.said()


@pytest.mark.slow
def test_22_jobs_outlive_one_of_two_gateways(gateway_process, fake, postgres):
    """One is killed, the other does its work; it comes back, and nothing is done twice."""
    url = postgres.database()
    doomed, other = gateway_process("one", url), gateway_process("two", url)
    doomed.wait_ready(), other.wait_ready()
    ids = two_running_and_twenty_queued(fake, doomed, [other])
    doomed.end(signal.SIGKILL)
    again = gateway_process("one", url).wait_ready()
    left = 2 + 14
    eventually(lambda: len(fake.submitted) == 22 + left, PATIENCE_S)
    fake.release()
    check_all_done_once(fake, ids, [other, again], url)
    assert len(fake.submitted) == 22 + left, "a job was taken by both"


@pytest.mark.slow
def test_a_gateway_that_slept_through_its_lease_does_no_harm(gateway_process, fake, postgres):
    """Stopped, given up, and awake again: what it still does is not written, and cancels nothing."""
    url = postgres.database()
    asleep, other = gateway_process("one", url), gateway_process("two", url)
    asleep.wait_ready(), other.wait_ready()
    fake.held = {"decode:1"}
    ids = [asleep.create() for _ in range(3)]
    eventually(lambda: len(fake.submitted) == 3)
    asleep.process.send_signal(signal.SIGSTOP)
    eventually(lambda: len(fake.submitted) == 6, PATIENCE_S)
    asleep.process.send_signal(signal.SIGCONT)
    # Of each job it hears when it renews its lease, or when it wants to store how far it is.
    words = ("a job is left to other gateways", "a job waits in the store")
    eventually(lambda: sum(asleep.said().count(word) for word in words) >= 3, PATIENCE_S)
    fake.release()
    check_all_done_once(fake, ids, [asleep, other], url)


def test_a_second_process_on_one_sqlite_file_is_refused_in_words(gateway_process):
    first, second = gateway_process("one"), gateway_process("two")
    codes = []
    for gateway in (first, second):
        with contextlib.suppress(AssertionError):
            gateway.wait_ready()
            continue
        codes.append(gateway.process.wait(PATIENCE_S))
        assert "another gateway (process" in gateway.said()
        assert "Traceback" not in gateway.said()
    assert codes == [1]
