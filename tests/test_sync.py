"""Videos whose client waits for them, remixes, and the routes that say what is not supported."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import threading
import warnings

import av
import httpx2
import msgspec
import openai
import pytest
import structlog
from served import BODY, eventually, names, parse_events

from runtime.trace import read_trace

PATH = "/v1/videos/sync"


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


def only(gateway) -> dict:
    """The one video that is listed."""
    (video,) = gateway.http.get("/v1/videos").json()["data"]
    return video


class Waiting:
    """A call of /sync in a thread."""

    def __init__(self, gateway, **changes) -> None:
        self._gateway = gateway
        self._body = BODY | changes
        self._answer: httpx2.Response | None = None
        self._thread = threading.Thread(target=self._call)
        self._thread.start()

    def _call(self) -> None:
        with httpx2.Client(base_url=self._gateway.url, timeout=30) as http, contextlib.suppress(httpx2.TransportError):
            self._answer = http.post(PATH, json=self._body)

    def answer(self) -> httpx2.Response | None:
        """None if the connection broke."""
        self._thread.join(30)
        return self._answer


@contextlib.contextmanager
def leaving(url: str, path: str, body: dict):
    """A client that asks and closes the connection at the end of the block."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + content)
        yield


# ---- sync ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "data"])
def test_the_answer_is_the_video(gateway, form):
    answer = gateway.http.post(PATH, **{form: BODY | {"seed": 7, "size": "96x64", "user": "me"}})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    with av.open(io.BytesIO(answer.content)) as container:
        assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(96, 64)] * 17
    video = only(gateway)
    assert (video["status"], answer.headers["x-video-id"], answer.headers["x-seed"]) == ("completed", video["id"], "7")
    assert json.loads(answer.headers["x-timings"]) == video["timings"]
    assert gateway.http.get(f"/v1/videos/{video['id']}/content").content == answer.content
    assert gateway.await_(gateway.runner.find(video["id"])).asked.user == "me"


@pytest.mark.parametrize("kind", ["mp4", "webm", "gif", "png"])
def test_a_deterministic_file_is_the_same_however_long_it_took(gateway, fake, kind):
    body = BODY | {"seed": 7, "output_format": kind}
    files = {}
    for fake.slowness in (1.0, 3.0):
        for deterministic in (True, False):
            answer = gateway.http.post(PATH, json=body | {"deterministic": deterministic})
            assert answer.status_code == 200, answer.text
            files.setdefault(deterministic, []).append(answer)
    fast, slow = files[True]
    assert fast.headers["x-timings"] != slow.headers["x-timings"]
    assert fast.content == slow.content
    fast, slow = files[False]
    assert fast.content != slow.content, "any other says how long it took"


def test_while_one_waits_the_job_is_like_any_other(gateway, fake):
    fake.held = {"denoise:2"}
    waiting = Waiting(gateway)
    video_id = fake.wait_for("denoise:2")
    with gateway.follow(video_id) as events:
        eventually(lambda: gateway.video(video_id)["step"] == 2)
        fake.release()
        assert names(list(events))[-1] == "done"
    assert waiting.answer().headers["x-video-id"] == video_id


@pytest.mark.parametrize("mark", ["queued", "denoise:2", "decode:2"])
def test_who_leaves_cancels(gateway, fake, mark):
    fake.held = {mark}
    with leaving(gateway.url, PATH, BODY):
        video_id = fake.wait_for(mark)
    eventually(lambda: fake.cancelled == [video_id])
    eventually(lambda: gateway.video(video_id)["status"] == "cancelled")
    assert gateway.video(video_id)["error"]["message"] == "the client left"
    assert list(gateway.videos.iterdir()) == []
    assert gateway.runner._live == {}


def test_reading_the_events_of_it_is_not_owning_it(gateway, fake):
    fake.held = {"denoise:2"}
    waiting = Waiting(gateway)
    video_id = fake.wait_for("denoise:2")
    with gateway.follow(video_id) as events:
        next(events)
    fake.release()
    assert waiting.answer().status_code == 200
    assert fake.cancelled == []


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [("out_of_memory", 400, "invalid_request_error"), ("worker_lost", 500, "server_error")],
)
def test_a_failure_is_an_error_of_http(gateway, fake, code, status, kind):
    fake.failures = {"denoise:2": (code, "it did not fit")}
    answer = gateway.http.post(PATH, json=BODY)
    error = {"message": "it did not fit", "type": kind, "param": None, "code": code}
    assert (answer.status_code, answer.json()) == (status, {"error": error})
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-video-id"] == only(gateway)["id"]


@pytest.mark.parametrize("method", ["cancel", "delete"])
def test_somebody_else_may_cancel_it(gateway, fake, method):
    fake.held = {"denoise:2"}
    waiting = Waiting(gateway)
    video_id = fake.wait_for("denoise:2")
    if method == "cancel":
        gateway.http.post(f"/v1/videos/{video_id}/cancel")
    else:
        gateway.http.delete(f"/v1/videos/{video_id}")
    answer = waiting.answer()
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "cancelled")


def test_a_mesh_that_drains_is_a_503_and_nothing_waits_for_the_next_one(gateway, fake):
    fake.failures = {"queued": ("draining", "the mesh is draining and takes no new work")}
    answer = gateway.http.post(PATH, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in answer.headers
    assert only(gateway)["status"] == "cancelled"


def test_a_server_that_stops_takes_it_along(start, fake):
    fake.held = {"denoise:2"}
    first = start()
    waiting = Waiting(first)
    video_id = fake.wait_for("denoise:2")
    first.close()
    assert waiting.answer() is None or waiting.answer().status_code >= 500
    fake.release()
    second = start()
    assert second.video(video_id)["status"] == "cancelled"
    assert len(fake.submitted) == 1


def test_a_server_that_was_killed_does_not_run_it_again(start, fake, tmp_path):
    """As if it had been: the row says that it runs, and nobody ended it."""
    fake.held = {"denoise:2"}
    first = start()
    video_id = first.create()
    fake.wait_for("denoise:2")
    job = first.await_(first.runner.find(video_id))
    first.await_(first.runner._store.update(video_id, asked=msgspec.structs.replace(job.asked, attached=True)))
    first.close()
    second = start()
    video = second.video(video_id)
    assert (video["status"], video["error"]["code"]) == ("cancelled", "cancelled")
    assert len(fake.submitted) == 1


def test_bad_input_is_refused_as_elsewhere(gateway, fake):
    for changes, param in [({"sede": 1}, "sede"), ({"num_frames": 18}, "num_frames"), ({"prompt": " "}, "prompt")]:
        answer = gateway.http.post(PATH, json=BODY | changes)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    answer = gateway.http.post(PATH, json=BODY, headers={"idempotency-key": "k"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert fake.submitted == []


LONG = {"prompt": "a red square", "num_inference_steps": 1000}


@pytest.mark.slow
def test_the_ranks_stop_when_the_client_leaves(serve, tmp_path):
    trace = tmp_path / "trace.jsonl"
    server = serve("--num-gpus", "2", "--trace-path", str(trace)).wait_ready()

    def steps() -> int:
        """Of the requests that were left, on all ranks."""
        lines = [line for line in read_trace(trace) if line.kind == "Denoise"]
        return sum(line.units for line in lines if not line.requests.keys() & brief)

    def brief_one() -> None:
        answer = server.http.post("/v1/videos/sync", json=BODY | {"num_frames": 1}).raise_for_status()
        brief.add(answer.headers["x-video-id"])

    brief: set[str] = set()
    progress = {"stream": True, "stream_options": {"include_progress": True}}
    with server.http.stream("POST", "/v1/images/generations", json=LONG | progress) as response:
        next(data for _, _, data in parse_events(response.iter_lines()) if data["step"] > 2)
    for path in ("/v1/images/generations", PATH):
        before = steps()
        with leaving(server.url, path, LONG):
            eventually(lambda: steps() > before, 30)  # noqa: B023
    cancelled = 'framemesh_requests_total{finished_reason="cancelled",model="demo"} 3.0'
    eventually(lambda: cancelled in server.http.get("/metrics").text, 60)
    brief_one()
    until_then = steps()
    brief_one()
    assert steps() == until_then < 3 * 1000
    assert server.end(signal.SIGTERM) == 0


# ---- remix ---------------------------------------------------------------------------------------------------------


def remix(gateway, source, **body):
    return gateway.http.post(f"/v1/videos/{source}/remix", json=body)


def test_the_sdk_remixes(gateway, fake):
    source = gateway.create(seed=7, size="96x64", seconds=1, guidance_scale=2.5, negative_prompt="blue", previews=2)
    gateway.wait(source)
    with warnings.catch_warnings(), openai.OpenAI(api_key="none", base_url=f"{gateway.url}/v1") as client:
        warnings.simplefilter("ignore")
        video = client.videos.remix(source, prompt="a dog")
    assert (video.remixed_from_video_id, video.prompt, video.seed, video.size) == (source, "a dog", 7, "96x64")
    gateway.wait(video.id)
    first, second = fake.submitted
    assert second.params.prompt == "a dog"
    assert msgspec.structs.replace(second.params, prompt=first.params.prompt) == first.params
    assert (first.previews, second.previews) == (2, 2)
    assert first.token_ids != second.token_ids


def test_whatever_is_given_differs_from_the_source(gateway, fake):
    source = gateway.create(seed=7, size="96x64", num_frames=9, fps=8, priority=3)
    for changes, expected in [
        ({"seed": 8}, {"seed": 8, "width": 96, "num_frames": 9}),
        ({"size": "64x96"}, {"width": 64, "height": 96}),
        ({"size": "auto"}, {"width": 96, "height": 64}),
        ({"height": 32}, {"width": 96, "height": 32}),
        ({"seconds": "2"}, {"num_frames": 17, "fps": 8}),
        ({"num_frames": 5}, {"num_frames": 5}),
        ({"fps": 4}, {"num_frames": 9, "fps": 4}),
        ({"num_inference_steps": 3, "negative_prompt": "x"}, {"num_inference_steps": 3, "negative_prompt": "x"}),
        ({"model": "demo"}, {"seed": 7}),
    ]:
        answer = remix(gateway, source, prompt="b", **changes)
        assert answer.status_code == 200, answer.text
        gateway.wait(answer.json()["id"])
        params = fake.submitted[-1].params
        assert {name: getattr(params, name) for name in expected} == expected
        assert fake.submitted[-1].priority == 3
    answer = remix(gateway, source, prompt="b", priority=5)
    gateway.wait(answer.json()["id"])
    assert fake.submitted[-1].priority == 5


def test_a_source_may_still_wait_or_have_lost_its_file(gateway, fake):
    fake.held = {"queued"}
    source = gateway.create(seed=7)
    fake.wait_for("queued")
    assert remix(gateway, source, prompt="b").json()["seed"] == 7
    fake.release()
    gateway.wait(source)
    (gateway.videos / f"{source}.mp4").unlink()
    assert remix(gateway, source, prompt="c").json()["remixed_from_video_id"] == source


def test_a_remix_is_made_once_under_one_key(gateway, fake):
    source = gateway.create()
    path, ids = f"/v1/videos/{source}/remix", set()
    for _ in range(2):
        answer = gateway.http.post(path, json={"prompt": "b"}, headers={"idempotency-key": "k"})
        ids.add(answer.json()["id"])
    assert len(ids) == 1
    gateway.wait(*ids)
    assert len(fake.submitted) == 2


def test_remixes_that_cannot_be(gateway, fake, start):
    source = gateway.create()
    gateway.wait(source)
    for body, param, code in [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": " "}, "prompt", "missing_required_parameter"),
        ({"prompt": "b", "sede": 1}, "sede", "unknown_parameter"),
        ({"prompt": "b", "num_frames": 18}, "num_frames", "invalid_value"),
        ({"prompt": "b", "size": "100x64"}, "size", "invalid_value"),
        ({"prompt": "b", "model": "other"}, "model", "invalid_value"),
    ]:
        error = remix(gateway, source, **body).json()["error"]
        assert (error["param"], error["code"]) == (param, code)
    unknown = remix(gateway, "video_00", prompt="b")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "video_not_found")
    gateway.close()
    gone = remix(start(served_model_name="other"), source, prompt="b")
    assert (gone.status_code, gone.json()["error"]["code"]) == (400, "model_not_served")
    assert len(fake.submitted) == 1


# ---- what there is not ---------------------------------------------------------------------------------------------


def test_what_starts_from_a_video_is_refused_as_that(gateway):
    upload = {"video": ("a.mp4", b"0" * 50_000, "video/mp4"), "prompt": (None, "a")}
    for path in ("edits", "extensions", "characters"):
        for body in ({"files": upload}, {"json": {"prompt": "a", "video": {"id": "video_1"}}}, {"content": b""}):
            answer = gateway.http.post(f"/v1/videos/{path}", **body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "video_input_not_supported")
        answer = gateway.http.post(f"/v1/videos/{path}", content=b"0" * 100_001)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    answer = gateway.http.get("/v1/videos/characters/char_1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "video_input_not_supported")
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        with pytest.raises(openai.BadRequestError, match="video"):
            client.videos.edit(video=b"0" * 100, prompt="a")


def test_adapters_are_refused_as_that(gateway):
    answers = [
        gateway.http.post("/v1/set_lora", json={"lora_nickname": "a", "lora_path": "b"}),
        gateway.http.post("/v1/set_lora", content=b'{"lora_nickname": "a"}', headers={"content-type": "text/plain"}),
        gateway.http.post("/v1/merge_lora_weights", json={"strength": 0.8}),
        gateway.http.post("/v1/unmerge_lora_weights", headers={"content-type": "application/json"}),
        gateway.http.get("/v1/list_loras"),
    ]
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "lora_not_supported")
        assert "LoRA" in answer.json()["error"]["message"]
