"""Whether a gateway lives, whether its mesh takes work, and whether a picture comes out: over a fake mesh."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor, wait

import httpx2
import pytest
import structlog
from fake_mesh import demo_model
from served import eventually

from gateway import probe, replicas
from gateway.probe import PROBE_ACCOUNT, Probe, smallest
from runtime.models.card import card_for
from runtime.sampling import SamplingParams

CARD = card_for(demo_model().configs)


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


def ready(gateway):
    """(status code, status, reason) of /health/ready."""
    answer = gateway.http.get("/health/ready")
    body = answer.json()
    assert ("error" in body) == (answer.status_code == 503)
    return answer.status_code, body["status"], body["reason"]


# ---- ready -------------------------------------------------------------------------------------------------------


def test_not_ready_says_what_is_missing(start, fake):
    fake.ready = False
    gateway = start()
    eventually(lambda: ready(gateway) == (503, "not_ready", "the workers are starting"))
    answer = gateway.http.get("/health")
    assert (answer.json()["ranks_ready"], answer.json()["num_ranks"]) == (1, 2)
    assert answer.json()["error"]["code"] == "model_loading"
    assert answer.headers["retry-after"]
    assert gateway.http.get("/health/live").status_code == 200
    fake.become_ready()
    eventually(lambda: ready(gateway) == (200, "ready", "ready"))


def test_a_draining_mesh_is_not_ready(gateway, fake):
    eventually(lambda: ready(gateway)[0] == 200)
    fake.drain()
    eventually(lambda: ready(gateway)[:2] == (503, "draining"))
    assert gateway.http.get("/health/live").status_code == 200


def test_a_scheduler_that_does_not_beat_is_not_ready(gateway, fake, monkeypatch):
    eventually(lambda: ready(gateway)[0] == 200)
    fake.die()
    monkeypatch.setattr(replicas, "SILENT_S", 0.2)
    eventually(lambda: ready(gateway)[:2] == (503, "not_ready"))
    assert "silent" in ready(gateway)[2]
    monkeypatch.setattr(replicas, "SILENT_S", 5.0)
    fake.come_back()
    eventually(lambda: ready(gateway)[0] == 200)


# ---- the probe ---------------------------------------------------------------------------------------------------


def start_probe(gateway, pool):
    return pool.submit(gateway.http.get, "/health_generate")


def test_a_probe_makes_the_smallest_picture_and_leaves_nothing(gateway, fake):
    answer = gateway.http.get("/health_generate")
    assert (answer.status_code, answer.json()["status"], answer.json()["model"]) == (200, "ok", "demo")
    (request,) = fake.submitted
    params = request.params
    assert (params.num_inference_steps, params.num_frames, params.height, params.width) == (1, 1, 64, 64)
    assert request.key == PROBE_ACCOUNT
    eventually(lambda: fake.completed == [request.id])
    assert gateway.http.get("/v1/videos").json()["data"] == []
    assert "framemesh_requests_total{" not in gateway.http.get("/metrics").text
    assert gateway.http.get("/health_generate").status_code == 200
    assert len(fake.submitted) == 2, "every question is answered by a generation of its own time"


def test_callers_share_the_one_that_runs_and_one_that_leaves_ends_it_for_nobody(gateway, fake, monkeypatch):
    asked, run = [], Probe.run

    async def noted(self, model):
        asked.append(model)
        return await run(self, model)

    monkeypatch.setattr(Probe, "run", noted)
    fake.held = {"denoise:0"}
    with ThreadPoolExecutor(4) as pool:
        impatient = pool.submit(httpx2.get, f"{gateway.url}/health_generate", timeout=0.2)
        fake.wait_for("denoise:0")
        assert isinstance(impatient.exception(10), httpx2.TimeoutException)
        patient = [start_probe(gateway, pool) for _ in range(3)]
        eventually(lambda: len(asked) == 4)
        here = gateway.app.state.services
        caller = asyncio.run_coroutine_threadsafe(here.probe.run(here.catalog.default), gateway._loop)
        eventually(lambda: len(asked) == 5)
        caller.cancel()
        # The loop has seen to it when it answers the next call.
        gateway.call(lambda: None)
        fake.release()
        assert [one.result(10).status_code for one in patient] == [200] * 3
    assert len(fake.submitted) == 1
    assert fake.cancelled == []


def test_a_failure_is_told_with_its_reason(gateway, fake):
    fake.failures["denoise:1"] = ("internal_error", "boom")
    answer = gateway.http.get("/health_generate")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")
    assert "boom" in answer.json()["reason"]
    assert answer.json()["error"]["code"] == "probe_failed"
    fake.failures.clear()
    assert gateway.http.get("/health_generate").status_code == 200


def test_a_mesh_that_hangs_is_given_up_and_hears_of_it(gateway, fake, monkeypatch):
    monkeypatch.setattr(probe, "PROBE_S", 0.3)
    fake.held = {"denoise:0"}
    answer = gateway.http.get("/health_generate")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no picture after 0 s")
    eventually(lambda: fake.cancelled == [fake.submitted[0].id])


def test_before_the_model_is_loaded_and_for_no_model(start, fake):
    fake.ready = False
    gateway = start()
    assert gateway.http.get("/health_generate").status_code == 503
    answer = gateway.http.get("/health_generate", params={"model": "gpt-image-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_probe_that_runs_does_not_keep_the_server_from_ending(start, fake):
    gateway = start()
    fake.held = {"denoise:0"}
    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(httpx2.get, f"{gateway.url}/health_generate", timeout=30)
        fake.wait_for("denoise:0")
        gateway.close()
        wait([caller], 10)
        assert caller.done()


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 16])
def test_the_smallest_picture_leaves_every_rank_some_rows(num_ranks):
    params = smallest(CARD, num_ranks)
    assert params.num_inference_steps == params.num_frames == 1
    assert params.height >= min(32 * num_ranks, CARD.check(SamplingParams(prompt="any")).height)
