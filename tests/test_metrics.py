"""/metrics and /server_info over a fake mesh: what is counted, what it costs when nobody looks, and what is told."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families
from served import BODY, eventually

from gateway.jobs.database import StoreUnavailable
from gateway.jobs.keeper import Lost
from gateway.metrics import NO_ROUTE
from gateway.overview import public_config
from gateway.probe import PROBE_ACCOUNT
from gateway.watch import finished_reason
from runtime.config import Config
from runtime.errors import NotReady, RequestFailed
from runtime.protocol import Buckets, Totals

FRAMES = 17


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


class Scraped:
    """The values of one scrape."""

    def __init__(self, gateway):
        answer = gateway.http.get("/metrics").raise_for_status()
        assert answer.headers["content-type"].startswith("text/plain; version=")
        self.samples = {
            (sample.name.removeprefix("framemesh_"), frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
        assert answer.text.count("# TYPE framemesh_") == answer.text.count("# TYPE ")

    def __call__(self, name, **labels):
        return self.samples.get((name, frozenset(labels.items())))

    def labels(self, name):
        return [dict(labels) for found, labels in self.samples if found == name]


def test_a_job_is_counted_from_its_submission_to_its_end(gateway):
    gateway.wait(gateway.create())
    seen = Scraped(gateway)
    assert seen("requests_total", model="demo", finished_reason="completed") == 1
    assert seen("frames_total", model="demo") == FRAMES
    for name in ("e2e_request_latency", "time_to_first_frame", "request_queue_time"):
        assert seen(f"{name}_seconds_count", model="demo") == 1
    assert seen("request_queue_time_seconds_sum", model="demo") == pytest.approx(0.1), "as the mesh says"
    first, whole = (seen(f"{n}_seconds_sum", model="demo") for n in ("time_to_first_frame", "e2e_request_latency"))
    assert 0 < first <= whole < 10
    assert seen("encode_seconds_count") >= 2
    assert (seen("num_requests_running", model="demo"), seen("num_requests_waiting", model="demo")) == (0, 0)
    (build,) = seen.labels("build_info")
    assert set(build) == {"version", "python"}


def test_what_runs_and_what_waits(gateway, fake):
    fake.held = {"queued", "denoise:1"}
    video_id = gateway.create()
    gateway.create()
    for _ in range(2):
        fake.wait_for("queued")
    eventually(lambda: Scraped(gateway)("num_requests_waiting", model="demo") == 2)
    fake.release("queued")
    eventually(lambda: Scraped(gateway)("num_requests_running", model="demo") == 2)
    assert Scraped(gateway)("num_requests_waiting", model="demo") == 0
    eventually(lambda: Scraped(gateway)("mesh_requests", model="demo", mesh="0", state="running") == 2)
    gateway.http.post(f"/v1/videos/{video_id}/cancel").raise_for_status()
    seen = Scraped(gateway)
    assert seen("num_requests_running", model="demo") == 1
    assert seen("requests_total", model="demo", finished_reason="cancelled") == 1


def test_a_failure_is_counted_by_its_code(gateway, fake):
    fake.failures["denoise:1"] = ("out_of_memory", "too large")
    video = gateway.wait(gateway.create(), "failed")
    assert video["finished_reason"] == "out_of_memory"
    assert video["usage"] == {"queue_s": 0.1, "rank_seconds": 0.7, "attempts": 3, "peak_memory_mb": 4.8}
    seen = Scraped(gateway)
    assert seen("requests_total", model="demo", finished_reason="out_of_memory") == 1
    assert seen("e2e_request_latency_seconds_count", model="demo") in {None, 0}
    assert seen("num_requests_running", model="demo") == 0


def test_images_count_like_videos_streamed_or_not(gateway, fake):
    body = {"prompt": "a cat", "n": 2}
    answer = gateway.http.post("/v1/images/generations", json=body, headers={"x-request-id": "mine"})
    assert [entry["usage"]["attempts"] for entry in answer.raise_for_status().json()["data"]] == [1, 1]
    assert {request.trace for request in fake.submitted} == {"mine"}
    gateway.http.post("/v1/images/generations", json={"prompt": "a cat", "stream": True}).raise_for_status()
    fake.failures["denoise:1"] = ("out_of_memory", "too large")
    assert gateway.http.post("/v1/images/generations", json={"prompt": "a cat"}).is_error
    seen = Scraped(gateway)
    assert seen("requests_total", model="demo", finished_reason="completed") == 3
    assert seen("requests_total", model="demo", finished_reason="out_of_memory") == 1
    assert seen("e2e_request_latency_seconds_count", model="demo") == 3
    assert (seen("num_requests_running", model="demo"), seen("num_requests_waiting", model="demo")) == (0, 0)


def test_an_error_of_ours_is_counted_as_one(gateway, monkeypatch):
    def broken(*args):
        raise OSError("no space")

    monkeypatch.setattr("gateway.jobs.outputs.Recording.add", broken)
    assert gateway.wait(gateway.create(), "failed")["finished_reason"] == "internal_error"
    assert Scraped(gateway)("requests_total", model="demo", finished_reason="internal_error") == 1


def test_the_video_says_what_it_took(gateway, fake):
    fake.held = {"denoise:1"}
    video_id = gateway.create()
    assert (gateway.video(video_id)["usage"]["attempts"], gateway.video(video_id)["finished_reason"]) == (0, None)
    fake.release()
    video = gateway.wait(video_id)
    assert video["usage"] == {"queue_s": 0.1, "rank_seconds": 1.8, "attempts": 1, "peak_memory_mb": 4.8}
    assert {"queued", "total"} <= video["timings"].keys()
    assert video["finished_reason"] == "completed"
    listed = gateway.http.get("/v1/videos").json()["data"][0]
    assert listed["usage"] == video["usage"], "it is in the store"


def test_what_the_mesh_counts(gateway, fake):
    spread = Buckets((0.1, 0.2), (3, 4, 5), 6.5)
    fake.totals = Totals(spread, spread, {"decode": spread}, {"one": 12.5, "": 1.5, PROBE_ACCOUNT: 99.0})
    seen, mesh = Scraped(gateway), {"model": "demo", "mesh": "0"}
    for name, labels in (
        ("denoise_step_seconds", mesh),
        ("generation_batch_size", mesh),
        ("cost_prediction_error", mesh | {"stage": "decode"}),
    ):
        counts = [seen(f"{name}_bucket", le=le, **labels) for le in ("0.1", "0.2", "+Inf")]
        assert (counts, seen(f"{name}_count", **labels), seen(f"{name}_sum", **labels)) == ([3, 7, 12], 12, 6.5)
    assert seen("rank_seconds_total", account="one", **mesh) == 12.5
    assert seen("rank_seconds_total", account="(anonymous)", **mesh) == 1.5
    assert len(seen.labels("rank_seconds_total")) == 2, "probes are charged to nobody"
    assert [seen("worker_up", rank=str(rank), **mesh) for rank in range(2)] == [1, 1]
    memory = [seen("worker_memory_bytes", rank="1", of=of, **mesh) for of in ("held", "budget", "peak")]
    assert memory == [10, 100, 1000]
    assert (seen("worker_restarts_total", **mesh), seen("mesh_up", **mesh)) == (3, 1)
    assert {label["by"] for label in seen.labels("dropped_messages_total")} == {"gateway", "scheduler"}


def test_calls_are_counted_by_the_template_of_their_route(gateway):
    gateway.wait(gateway.create())
    for path in ("/v1/videos/video_1", "/v1/videos/video_2", "/nowhere", "/elsewhere"):
        assert gateway.http.get(path).status_code == 404
    gateway.http.request("BREW", "/v1/videos")
    seen = Scraped(gateway)
    assert seen("http_requests_total", route="/v1/videos", method="POST", status="200") == 1
    assert seen("http_requests_total", route="/v1/videos/{video_id}", method="GET", status="404") == 2
    assert seen("http_requests_total", route=NO_ROUTE, method="GET", status="404") == 2
    assert seen("http_request_duration_seconds_count", route="/v1/videos", method="POST") == 1
    assert {label["method"] for label in seen.labels("http_requests_total")} == {"GET", "POST", "(other)"}


def test_open_event_streams(gateway, fake):
    fake.held = {"denoise:1"}
    video_id = gateway.create()
    with gateway.follow(video_id) as events:
        next(events)
        assert Scraped(gateway)("sse_readers") == 1
    eventually(lambda: Scraped(gateway)("sse_readers") == 0)
    fake.release()
    gateway.wait(video_id)


# ---- looking costs little, and not looking nothing ---------------------------------------------------------------


def test_nobody_is_asked_while_nobody_looks(gateway, fake):
    gateway.wait(gateway.create())
    assert fake.looks == 0


def test_however_many_look_the_scheduler_is_asked_at_most_twice_a_second(gateway, fake):
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: gateway.http.get(("/server_info", "/metrics")[n % 2]), range(60)))
    assert {answer.status_code for answer in answers} == {200}
    assert 1 <= fake.looks <= 2 + 2 * (time.monotonic() - began)


def test_a_scheduler_that_does_not_answer_delays_nobody_for_long(gateway, fake, monkeypatch):
    monkeypatch.setattr("gateway.mesh.LOOK_S", 0.2)
    gateway.wait(gateway.create())
    fake.blind = True
    seen = Scraped(gateway)
    assert seen("mesh_up", model="demo", mesh="0") == 0
    assert seen("requests_total", model="demo", finished_reason="completed") == 1
    (mesh,) = gateway.http.get("/server_info").json()["meshes"]
    assert (mesh["ranks"], mesh["queued"], mesh["ready"]) == ([], None, True)
    fake.blind = False
    eventually(lambda: Scraped(gateway)("mesh_up", model="demo", mesh="0") == 1)


def test_a_new_scheduler_is_looked_at_like_the_old_one(gateway, fake):
    (before,) = gateway.http.get("/server_info").json()["meshes"]
    fake.restart()

    def epoch():
        return gateway.http.get("/server_info").json()["meshes"][0]["epoch"]

    eventually(lambda: epoch() == before["epoch"] + 1)
    gateway.wait(gateway.create())


def test_it_can_be_switched_off(start):
    answer = start(enable_metrics=False).http.get("/metrics")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "--enable-metrics" in answer.json()["error"]["message"]


# ---- /server_info ------------------------------------------------------------------------------------------------


def test_how_everything_stands(gateway, fake):
    eventually(lambda: gateway.http.get("/health").status_code == 200)
    fake.held = {"denoise:1"}
    gateway.create()
    fake.wait_for("denoise:1")
    info = gateway.http.get("/server_info").json()
    assert info.keys() == {"version", "uptime_s", "models", "meshes", "config"}
    (model,) = info["models"]
    assert (model["id"], model["task_type"], model["ready"]) == ("demo", "T2V", True)
    assert model["defaults"]["num_frames"] == FRAMES
    (mesh,) = info["meshes"]
    assert (mesh["model"], mesh["ready"], mesh["draining"], mesh["losses"]) == ("demo", True, False, 3)
    assert mesh["layout"] == {"cfg": 1, "ring": 1, "ulysses": 2, "num_ranks": 2}
    assert (mesh["queued"], mesh["running"], mesh["epoch"]) == (0, 1, fake.epoch)
    assert [rank["rank"] for rank in mesh["ranks"]] == [0, 1]
    wanted = {"host", "ready", "doing", "running_s", "predicted_s", "held_bytes", "budget_bytes"}
    assert wanted <= mesh["ranks"][0].keys()
    assert mesh["step_times"] == [{"kind": "denoise", "batch": 2, "units": 5, "seconds": 0.1, "predicted_s": 0.2}]
    assert 0 <= info["uptime_s"] < 60
    assert info["config"]["num_gpus"] == 1
    fake.release()


@dataclasses.dataclass(frozen=True)
class WithSecrets:
    database_url: str = "postgresql://me:hunter2@db.example:5432/jobs?sslpassword=hunter2&x=1"
    api_keys: tuple[str, ...] = ("hunter2",)
    no_key: str | None = None
    outputs: dict = dataclasses.field(default_factory=lambda: {"aws_secret_access_key": "hunter2", "region": "eu"})
    scheduler_urls: tuple[str, ...] = ("tcp://host:1", "redis://:hunter2@host")
    path: str = "a/path"


def test_no_secret_is_told(gateway):
    shown = public_config(WithSecrets())
    assert "hunter2" not in repr(shown)
    assert shown["database_url"] == "postgresql://me:***@db.example:5432/jobs"
    assert shown["outputs"] == {"aws_secret_access_key": "***", "region": "eu"}
    assert shown["scheduler_urls"] == ["tcp://host:1", "redis://:***@host"]
    assert (shown["path"], shown["no_key"]) == ("a/path", None)
    assert public_config(Config())["output_path"] == "outputs"


def test_before_the_scheduler_has_answered(start, fake):
    fake.ready = False
    gateway = start()
    info = gateway.http.get("/server_info").json()
    assert [model["ready"] for model in info["models"]] == [False]
    assert [mesh["ready"] for mesh in info["meshes"]] == [False]
    assert gateway.http.post("/v1/videos", json={**BODY, "num_frames": "many"}).status_code == 400


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (None, "completed"),
        (RequestFailed("a", "worker_lost", "it ran while the workers died"), "worker_lost"),
        (NotReady("draining", draining=True), "not_ready"),
        (asyncio.CancelledError(), "cancelled"),
        (Lost("it is another gateway's"), "lost"),
        (StoreUnavailable("gone"), "store_unavailable"),
        (OSError("no space"), "internal_error"),
    ],
)
def test_every_end_has_a_word(error, reason):
    assert finished_reason(error) == reason
