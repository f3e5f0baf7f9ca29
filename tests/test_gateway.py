"""The HTTP edge over a fake mesh: real sockets on both sides, the real server, no model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from itertools import pairwise
from pathlib import Path

import av
import httpx2
import numpy as np
import openai
import psutil
import pytest
import structlog
from fake_mesh import MODEL_FOLDER, moving_frames
from PIL import Image
from served import BODY, eventually, names, parse_events
from sqlalchemy.exc import SQLAlchemyError

from gateway.__main__ import listen
from gateway.body import unbracket
from gateway.jobs import runner as runner_module
from gateway.jobs.database import Database
from gateway.media.mp4 import read_frames
from gateway.mesh import FRAME_CREDITS
from gateway.stream import EventLog
from launch.client import Client
from runtime.config import Config, save_frozen
from runtime.errors import InvalidInput, StartFailed
from runtime.sampling import SamplingParams

ROOT = Path(__file__).parent.parent
FRAMES = 17


@pytest.fixture(autouse=True)
def logs():
    """What was logged; structlog's own default spends seconds on drawing a traceback."""
    with structlog.testing.capture_logs() as logs:
        yield logs


# ---- bodies ------------------------------------------------------------------------------------------------------

SENT = {
    "json": {"json": {"prompt": "a cat", "size": "96x64", "seconds": 1, "seed": 7, "guidance_scale": 2}},
    "json, numbers as text": {"json": {"prompt": "a cat", "size": "96X64", "seconds": "1", "seed": "7"}},
    "json, unset": {"json": {"prompt": "a cat", "width": 96, "height": 64, "num_frames": 9, "seed": 7, "size": None}},
    "nested": {"json": {"prompt": "a cat", "extra_body": {"seed": 7, "size": "96x64"}, "extra_params": '{"fps": 8}',
                        "seconds": 1}},
    "multipart": {
        "files": {"prompt": (None, "a cat"), "size": (None, "96x64"), "seconds": (None, "1.0"), "seed": (None, "7")}
    },
    "multipart, brackets": {
        "files": {"prompt": (None, "a cat"), "extra_body[seed]": (None, "7"), "extra_body[size]": (None, "96x64"),
                  "extra_params": (None, '{"num_frames": 9}')}
    },
    "urlencoded": {"data": {"prompt": "a cat", "size": "96x64", "num_frames": "9", "seed": "7"}},
    "json that curl calls a form": {
        "content": b'{"prompt": "a cat", "size": "96x64", "seconds": 1, "seed": 7}',
        "headers": {"content-type": "application/x-www-form-urlencoded"},
    },
    "json without a type": {"content": b'{"prompt": "a cat", "size": "96x64", "seconds": 1, "seed": 7}'},
}  # fmt: skip


def test_one_request_in_every_form_is_one_request(gateway, fake):
    for sent in SENT.values():
        answer = gateway.http.post("/v1/videos", **sent)
        assert answer.status_code == 200, answer.text
        video = answer.json()
        gateway.wait(video["id"])
        expected = {"prompt": "a cat", "size": "96x64", "seconds": "1.125", "num_frames": 9, "fps": 8, "seed": 7}
        assert expected.items() <= video.items()
    params = [request.params for request in fake.submitted]
    assert len(params) == len(SENT)
    assert (params[0].guidance_scale, params[1].guidance_scale) == (2.0, 3.0)
    assert all((p.width, p.height, p.num_frames, p.seed, p.num_inference_steps) == (96, 64, 9, 7, 20) for p in params)
    assert len({str(request.token_ids) for request in fake.submitted}) == 1
    assert fake.submitted[0].token_ids["text_encoder"]["prompt"]


@pytest.mark.parametrize(
    ("sent", "deterministic"),
    [
        ({"json": {"prompt": "a cat"}}, False),
        ({"json": {"prompt": "a cat", "deterministic": False}}, False),
        ({"json": {"prompt": "a cat", "deterministic": True}}, True),
        ({"json": {"prompt": "a cat", "extra_body": {"deterministic": True}}}, True),
        ({"files": {"prompt": (None, "a cat"), "deterministic": (None, "true")}}, True),
        ({"data": {"prompt": "a cat", "deterministic": "false"}}, False),
    ],
)
def test_deterministic_reaches_the_mesh_in_every_form(gateway, fake, sent, deterministic):
    video = gateway.http.post("/v1/videos", **sent).json()
    gateway.wait(video["id"])
    gateway.wait(gateway.http.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a dog"}).json()["id"])
    assert gateway.http.post("/v1/images/generations", **sent).status_code == 200
    assert [request.params.deterministic for request in fake.submitted] == [deterministic] * 3


def test_the_clients_deterministic_reaches_the_mesh(gateway, fake):
    with Client(gateway.url) as client:
        for wanted in (True, None):
            gateway.wait(client.create(SamplingParams(prompt="a cat", deterministic=wanted))["id"])
    assert [request.params.deterministic for request in fake.submitted] == [True, False]


JPEG_FILE = ("cat.jpg", b"\xff\xd8\xff", "image/jpeg")
REFUSED = [
    ({"json": {"prompt": "a", "deterministic": "perhaps"}}, 400, "deterministic", "invalid_value", "boolean"),
    ({"json": {"prompt": "a", "sede": 1}}, 400, "sede", "unknown_parameter", "did you mean seed?"),
    ({"json": {"prompt": "a", "quality": "hd"}}, 400, "quality", "unknown_parameter", "no parameter"),
    ({"json": {"prompt": "a", "sede": None}}, 400, "sede", "unknown_parameter", "did you mean seed?"),
    ({"json": {"prompt": None}}, 400, "prompt", "missing_required_parameter", "required"),
    ({"json": {"seed": 1}}, 400, "prompt", "missing_required_parameter", "required"),
    ({"json": {"prompt": " "}}, 400, "prompt", "missing_required_parameter", "empty"),
    ({"json": {"prompt": 3}}, 400, "prompt", "invalid_value", "prompt: 3 should be a valid string"),
    ({"json": {"prompt": ["a"]}}, 400, "prompt", "invalid_value", "prompt: a list should be a valid string"),
    ({"json": {"prompt": {"a": 1}}}, 400, "prompt", "invalid_value", "prompt: an object should be a valid string"),
    ({"json": {"prompt": "a", "output_format": "avi"}}, 400, "output_format", "invalid_value", "'avi' should be 'mp4'"),
    ({"json": {"prompt": "a", "output_format": "\n" + "x" * 999}}, 400, "output_format", "invalid_value",
     "output_format: '\\n" + "x" * 39 + "…' should be 'mp4'"),
    ({"json": {"prompt": "a", "seed": "x"}}, 400, "seed", "invalid_value", "'x' should be a valid integer"),
    ({"json": {"prompt": "a", "seed": True}}, 400, "seed", "invalid_value", "seed: true must be a number"),
    ({"json": {"prompt": "a", "seed": -1}}, 400, "seed", "invalid_value", "out of range"),
    ({"json": {"prompt": "a", "seed": 2**63}}, 400, "seed", "invalid_value", "less than"),
    ({"json": {"prompt": "a", "num_frames": 18}}, 400, "num_frames", "invalid_value", "17 and 21"),
    ({"json": {"prompt": "a", "num_frames": 10**30}}, 400, "num_frames", "invalid_value", "very many digits"),
    ({"json": {"prompt": "a", "size": "0x64"}}, 400, "size", "invalid_value", "0 is too small; take at least 16"),
    ({"json": {"prompt": "a", "fps": 0}}, 400, "fps", "invalid_value", "1 to 240"),
    ({"json": {"prompt": "a", "num_inference_steps": 0}}, 400, "num_inference_steps", "invalid_value", "1 to 1000"),
    ({"json": {"prompt": "a", "guidance_scale": "nan"}}, 400, "guidance_scale", "invalid_value", "finite"),
    ({"json": {"prompt": "a", "width": 100}}, 400, "width", "invalid_value", "96 and 112"),
    ({"json": {"prompt": "a", "size": "100x64"}}, 400, "size", "invalid_value", "96 and 112"),
    ({"json": {"prompt": "a", "size": "large"}}, 400, "size", "invalid_value", "WIDTHxHEIGHT"),
    ({"json": {"prompt": "a", "size": "96x64", "width": 64}}, 400, "size", "invalid_value", "contradicts width=64;"),
    ({"json": {"prompt": "a", "seconds": 0}}, 400, "seconds", "invalid_value", "greater than 0"),
    ({"json": {"prompt": "a", "seconds": "4s"}}, 400, "seconds", "invalid_value", "number"),
    ({"json": {"prompt": "a", "seconds": 1e308}}, 400, "seconds", "invalid_value", "less than"),
    ({"json": {"prompt": "a", "seconds": 80000}}, 400, "seconds", "invalid_value", "too many"),
    ({"json": {"prompt": "a", "seconds": 1, "num_frames": 17}}, 400, "seconds", "invalid_value", "9 frames"),
    ({"json": {"prompt": "a", "model": "sora-2"}}, 404, "model", "model_not_found", "'demo'"),
    ({"json": {"prompt": "a " * 10_001}}, 400, "prompt", "string_above_max_length", "20000"),
    ({"json": {"prompt": "\u0416 " * 700}}, 400, "prompt", "string_above_max_length", "tokens"),
    ({"json": {"prompt": "a", "extra_body": {"seed": 1}, "seed": 2}}, 400, "seed", "invalid_value", "twice"),
    ({"json": {"prompt": "a", "extra_body": [1]}}, 400, "extra_body", "invalid_value", "object"),
    ({"json": {"prompt": "a", "extra_params": "{"}}, 400, "extra_params", "invalid_json", "JSON"),
    ({"json": {"prompt": "a", "input_reference": {"image_url": "http://x"}}}, 400, "input_reference",
     "image_input_not_supported", "text alone"),
    ({"files": {"prompt": (None, "a"), "input_reference": JPEG_FILE}}, 400, "input_reference",
     "invalid_image", "PNG, JPEG or WebP"),
    ({"files": {"prompt": (None, "a"), "input_reference[image_url]": (None, "x")}}, 400, "input_reference",
     "invalid_url", "https://"),
    ({"files": {"prompt": JPEG_FILE}}, 400, "prompt", "invalid_value", "prompt: a file should be a valid string"),
    ({"files": [("prompt", (None, "a")), ("prompt", (None, "b"))]}, 400, "prompt", "invalid_value", "twice"),
    ({"files": {"prompt[]": (None, "a")}}, 400, "prompt", "invalid_value", "string"),
    ({"json": [1]}, 400, "body", "invalid_json", "object"),
    ({"content": b""}, 400, "body", "invalid_json", "body: is empty; send a JSON object"),
    ({"content": b'{"prompt": "\\ud800"}'}, 400, "body", "invalid_json", "JSON"),
    ({"content": b"\xff\xfe"}, 400, "body", "invalid_json", "JSON"),
    ({"content": b'{"a":' * 20_000}, 400, "body", "invalid_json", "JSON"),
    ({"content": b"prompt=\xff", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 400, "body",
     "invalid_value", "form"),
    ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "body", "invalid_form", "boundary"),
    ({"content": b"a" * 100_001}, 413, None, "request_too_large", "100000"),
    ({"content": (b"a" * 10_000 for _ in range(11))}, 413, None, "request_too_large", "100000"),
    ({"json": BODY, "headers": {"idempotency-key": "k" * 256}}, 400, "idempotency-key", "invalid_value", "255"),
]  # fmt: skip


def test_bad_input_is_refused_by_name_and_nothing_is_submitted(gateway, fake):
    for sent, status, param, code, hint in REFUSED:
        answer = gateway.http.post("/v1/videos", **sent)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
        assert error["type"] == "invalid_request_error"
        assert hint in error["message"]
        assert "traceback" not in answer.text.lower()
    assert gateway.http.get("/v1/videos").json()["data"] == []
    assert fake.submitted == []


def test_what_a_query_says_is_refused_in_the_same_words(gateway):
    for name, value, said in [
        ("limit", "0", "limit: '0' should be greater than or equal to 1"),
        ("limit", "x", "limit: 'x' should be a valid integer"),
        ("order", "up", "order: 'up' should be 'asc' or 'desc'"),
        ("after", "x" * 50, f"after: '{'x' * 40}…' should match pattern"),
    ]:
        error = gateway.http.get("/v1/videos", params={name: value}).json()["error"]
        assert error["message"].startswith(said)


def test_a_long_text_in_a_form_reaches_our_own_check(start):
    """Starlette's own limit for a part is 1 MB, less than an image as a data URL."""
    gateway = start(max_body_bytes=3_000_000)
    url = "data:image/png;base64," + "A" * 2_000_000
    answer = gateway.http.post("/v1/videos", files={"prompt": (None, "a"), "input_reference": (None, url)})
    assert answer.json()["error"]["param"] == "input_reference"


@pytest.mark.parametrize(
    ("pairs", "fields"),
    [
        ([("a", "1"), ("b[c]", "2"), ("b[d][e]", "3"), ("l[]", "4"), ("l[]", "5")],
         {"a": "1", "b": {"c": "2", "d": {"e": "3"}}, "l": ["4", "5"]}),
        ([("b[l][]", "1")], {"b": {"l": ["1"]}}),
        ([("a[b", "1"), ("[x]", "3")], {"a[b": "1", "": {"x": "3"}}),
        ([("a", "1"), ("a[b]", "2")], None),
        ([("a[b]", "1"), ("a", "2")], None),
        ([("a[]", "1"), ("a[b]", "2")], None),
        ([("a[b]", "1"), ("a[]", "2")], None),
        ([("a[][b]", "1")], None),
        ([("a[b]", "1"), ("a[b]", "2")], None),
    ],
)  # fmt: skip
def test_bracket_forms(pairs, fields):
    if fields is None:
        with pytest.raises(InvalidInput):
            unbracket(pairs)
    else:
        assert unbracket(pairs) == fields


def test_every_error_has_the_one_shape(gateway):
    answers = [
        (gateway.http.get("/v1/nothing"), 404, None, "not_found"),
        (gateway.http.put("/v1/videos"), 405, None, "method_not_allowed"),
        (gateway.http.get("/v1/videos/video_00"), 404, "video_id", "video_not_found"),
        (gateway.http.get("/v1/videos/..%2Fjobs.sqlite3/content"), 404, None, "not_found"),
        (gateway.http.get("/v1/videos/video_00/events"), 404, "video_id", "video_not_found"),
        (gateway.http.delete("/v1/videos/video_00"), 404, "video_id", "video_not_found"),
        (gateway.http.post("/v1/videos/video_00/cancel"), 404, "video_id", "video_not_found"),
        (gateway.http.get("/v1/videos", params={"limit": 0}), 400, "limit", "invalid_value"),
        (gateway.http.get("/v1/videos", params={"order": "up"}), 400, "order", "invalid_value"),
        (gateway.http.get("/v1/videos", params={"after": "x"}), 400, "after", "invalid_value"),
        (gateway.http.get("/v1/models/sora-2"), 404, "model", "model_not_found"),
    ]
    for answer, status, param, code in answers:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error


def test_what_nobody_caught_is_told_without_its_inside(gateway, monkeypatch, logs):
    async def broken(*args):
        raise RuntimeError("secret")

    monkeypatch.setattr(gateway.runner, "list", broken)
    answer = gateway.http.get("/v1/videos", headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert [entry["request_id"] for entry in logs if entry["event"] == "a request failed"] == ["mine"]


def test_request_ids_are_echoed_if_harmless(gateway):
    sent = [("abc-1", True), ("x" * 128, True), ("x" * 129, False), ("", False), ("a\tb", False), ("\xe4", False)]
    for value, echoed in sent:
        got = gateway.http.get("/health/live", headers={b"x-request-id": value.encode("latin-1")}).headers[
            "x-request-id"
        ]
        assert (got == value) is echoed
        assert echoed or got.startswith("req_")


# ---- the life of a job -------------------------------------------------------------------------------------------


def test_frames_arrive_while_the_rest_is_still_being_decoded(gateway, fake):
    fake.held = {"decode:2"}
    video_id = gateway.create()
    with gateway.follow(video_id) as following:
        events = []
        while not events or events[-1][2] != {"first": 1, "count": 4, "total": FRAMES}:
            events.append(next(following))
        # The mesh holds: only the first two of five chunks exist.
        assert gateway.video(video_id)["status"] == "in_progress"
        assert 90 < gateway.video(video_id)["progress"] < 100
        assert fake.completed == []
        fake.release()
        events += list(following)

    told = [(name, data.get("stage") or data.get("step") or data.get("first")) for _, name, data in events]
    told.remove(("stage", "deliver"))  # it races with the last frames, which come on another socket
    assert told == [
        ("queued", None), ("stage", "encode"), ("stage", "denoise"), ("step", 1), ("step", 2), ("step", 3), ("step", 4),
        ("stage", "decode"), ("frames", 0), ("frames", 1), ("frames", 5), ("frames", 9), ("frames", 13),
        ("done", "deliver"),
    ]  # fmt: skip
    assert events[0][2] == {"position": 1, "eta_s": 4.0}
    step = next(data for _, name, data in events if name == "step")
    assert step == {"step": 1, "total_steps": 4, "eta_s": 2.5, "progress": 22}
    done = events[-1][2]
    assert (done["id"], done["status"], done["progress"]) == (video_id, "completed", 100)
    assert done["timings"]["total"] == 1.0
    assert done == gateway.video(video_id)


@pytest.mark.parametrize("overtaken", [False, True], ids=["told", "frames first"])
def test_whatever_decodes_has_done_all_its_steps(gateway, fake, overtaken):
    """The scheduler tells of the ends of items: of the last one only that the request decodes."""
    fake.untold = {"denoise:3", "denoise:4"} | ({"decode:0"} if overtaken else set())
    fake.held = {"decode:1"}
    video_id = gateway.create()
    fake.wait_for("decode:1")
    eventually(lambda: gateway.video(video_id)["stage"] == "decode")
    assert gateway.video(video_id)["step"] == 4
    with gateway.follow(video_id) as following:
        fake.release()
        events = list(following)
    told = [(name, data.get("stage") or data.get("step")) for _, name, data in events if name in {"stage", "step"}]
    told.remove(("stage", "deliver"))
    assert told == [
        ("stage", "encode"), ("stage", "denoise"), ("step", 1), ("step", 2), ("step", 4), ("stage", "decode"),
    ]  # fmt: skip
    assert next(data["progress"] for _, name, data in events if data.get("step") == 4) == 90
    assert (events[-1][2]["step"], events[-1][2]["progress"]) == (4, 100)


def test_the_mesh_hears_stored_only_after_the_file_is_there(gateway, fake, monkeypatch):
    slow, seen = threading.Event(), []
    real = runner_module.Recording.finish

    def finish(recording):
        seen.append(list(fake.stored))
        assert slow.wait(5)
        return real(recording)

    monkeypatch.setattr(runner_module.Recording, "finish", finish)
    video_id = gateway.create()
    eventually(lambda: seen)
    time.sleep(0.1)
    assert fake.stored == []
    assert gateway.video(video_id)["status"] == "in_progress"
    assert gateway.http.get(f"/v1/videos/{video_id}/content").json()["error"]["code"] == "video_not_ready"
    slow.set()
    gateway.wait(video_id)
    assert seen == [[]]
    assert fake.stored == fake.completed == [video_id]


def test_the_content_is_a_playable_mp4_that_says_how_it_was_made(gateway):
    video_id = gateway.create(seed=7, size="96x64")
    gateway.wait(video_id)
    answer = gateway.http.get(f"/v1/videos/{video_id}/content")
    assert answer.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(answer.content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        comment = json.loads(container.metadata["comment"])
    assert len(frames) == FRAMES
    assert frames[0].shape == (64, 96, 3)
    assert (comment["seed"], comment["model"], comment["prompt"]) == (7, "demo", BODY["prompt"])
    assert answer.content.index(b"moov") < answer.content.index(b"mdat")
    part = gateway.http.get(f"/v1/videos/{video_id}/content", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, answer.content[10:20])
    assert sorted(path.name for path in gateway.videos.iterdir()) == [f"{video_id}.mp4"]
    refused = gateway.http.get(f"/v1/videos/{video_id}/content", params={"variant": "poster"})
    assert refused.json()["error"]["param"] == "variant"


def assert_right_pictures(events, video_params) -> None:
    """Each JPEG shows the frame that the mesh sent under that number."""
    expected = moving_frames(video_params)
    shown = {}
    for _, name, data in events:
        if name == "frames":
            assert len(data["jpeg"]) == data["count"]
            for number, still in enumerate(data["jpeg"], data["first"]):
                shown[number] = np.asarray(Image.open(io.BytesIO(base64.b64decode(still))).convert("RGB"))
    assert sorted(shown) == list(range(len(expected)))
    for number, picture in shown.items():
        error = np.abs(picture.astype(int) - expected[number]).mean()
        others = [np.abs(picture.astype(int) - other).mean() for n, other in enumerate(expected) if n != number]
        assert error < 4 and error < min(others), f"frame {number}"  # noqa: PT018


def test_jpegs_live_late_and_after_the_end(gateway, fake, monkeypatch):
    encoded_live = []
    real = runner_module.encode_stills
    monkeypatch.setattr(runner_module, "encode_stills", lambda pixels: encoded_live.append(len(pixels)) or real(pixels))
    fake.held = {"queued", "decode:3"}
    video_id = gateway.create()
    with gateway.follow(video_id, frames="jpeg") as early:
        first = [next(early)]
        fake.release("queued")
        fake.wait_for("decode:3")
        with gateway.follow(video_id, frames="jpeg") as late:
            until_now = [next(late) for _ in range(11)]
            assert names(until_now)[-3:] == ["frames"] * 3
            fake.release()
            late_events = until_now + list(late)
        early_events = first + list(early)
    params = fake.submitted[0].params
    assert_right_pictures(early_events, params)
    assert_right_pictures(late_events, params)
    assert encoded_live == [1, 4, 4, 4, 4]
    ended = gateway.events(video_id, frames="jpeg")
    assert_right_pictures(ended, params)
    assert names(ended)[-1] == "done"

    encoded_live.clear()
    gateway.events(gateway.create())
    assert encoded_live == [], "nobody asked for pictures"


def test_a_reader_that_joins_late_without_a_watcher_gets_them_from_the_growing_file(gateway, fake):
    fake.held = {"decode:3"}
    video_id = gateway.create()
    fake.wait_for("decode:3")
    with gateway.follow(video_id, frames="jpeg") as late:
        until_now = [next(late) for _ in range(11)]
        assert [len(data["jpeg"]) for _, name, data in until_now if name == "frames"] == [1, 4, 4]
        fake.release()
        assert_right_pictures(until_now + list(late), fake.submitted[0].params)


def test_a_reader_that_comes_back_gets_what_it_missed(gateway, fake):
    fake.held = {"decode:1"}
    video_id = gateway.create()
    fake.wait_for("decode:1")
    with gateway.follow(video_id) as following:
        before = [next(following) for _ in range(6)]
    fake.held = {"decode:4"}
    fake.wait_for("decode:4")
    with gateway.follow(video_id, last=before[-1][0]) as following:
        missed = [next(following) for _ in range(3)]
        fake.release()
        after = missed + list(following)
    numbers = [int(event_id.split("-")[1]) for event_id, _, _ in before + after]
    assert numbers == list(range(1, len(numbers) + 1))
    assert names(before + after)[-1] == "done"


def test_a_job_that_ended_is_told_in_short(gateway):
    video_id = gateway.create()
    gateway.wait(video_id)
    frames = {"first": 0, "count": FRAMES, "total": FRAMES}
    assert gateway.events(video_id, last="other-12") == [("", "frames", frames), ("", "done", gateway.video(video_id))]


def test_event_ids_of_another_life_are_not_taken_for_ours():
    async def main():
        log = EventLog()
        await log.publish("stage", {"stage": "encode"})
        assert log.position(f"{log.token}-1") == 1
        assert [log.position(text) for text in (None, "", "1", f"{EventLog().token}-1", f"{log.token}-x")] == [0] * 5

    asyncio.run(main())


def test_a_failed_job_says_why(gateway, fake):
    fake.failures = {"denoise:2": ("out_of_memory", "rank 1 ran out of memory; take a smaller size")}
    video_id = gateway.create()
    events = gateway.events(video_id)
    error = {
        "message": "rank 1 ran out of memory; take a smaller size",
        "type": "server_error",
        "param": None,
        "code": "out_of_memory",
    }
    assert events[-1][1:] == ("error", {"error": error})
    video = gateway.video(video_id)
    assert (video["status"], video["error"]) == ("failed", error)
    assert gateway.events(video_id) == [("", "error", {"error": error})]
    answer = gateway.http.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "video_failed")


def test_a_job_that_fails_while_decoding_leaves_no_file(gateway, fake):
    fake.failures = {"decode:2": ("worker_lost", "rank 0 is gone")}
    gateway.wait(gateway.create(), "failed")
    assert list(gateway.videos.iterdir()) == []


def test_an_error_of_ours_is_an_internal_error_and_the_gateway_lives_on(gateway, fake, monkeypatch, logs):
    def full(recording, pixels, timings):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runner_module.Recording, "add", full)
        video_id = gateway.create()
        events = gateway.events(video_id)
    assert events[-1][1] == "error"
    assert events[-1][2]["error"]["code"] == "internal_error"
    assert gateway.video(video_id)["status"] == "failed"
    assert [entry["job"] for entry in logs if entry["event"] == "a job failed in the gateway"] == [video_id]
    assert fake.cancelled == [video_id], "the mesh would go on for nobody"
    gateway.wait(gateway.create())


@pytest.mark.parametrize("failures", [{}, {"denoise:2": ("out_of_memory", "too large")}])
def test_readers_hear_of_the_end_even_if_the_store_is_broken(gateway, fake, monkeypatch, logs, failures):
    def broken(database, work, until):
        raise SQLAlchemyError("the disk is gone")

    fake.held, fake.failures = {"denoise:1"}, failures
    video_id = gateway.create()
    with gateway.follow(video_id) as following, monkeypatch.context() as patch:
        fake.wait_for("denoise:1")
        patch.setattr(Database, "_transact", broken)
        fake.release()
        assert list(following)[-1][2]["error"]["code"] == "internal_error"
    assert gateway.runner._live == {}
    assert "the end of a job was not stored" in [entry["event"] for entry in logs]


@pytest.mark.parametrize("mark", ["queued", "denoise:2", "decode:2"])
def test_cancel_at_any_stage(gateway, fake, mark):
    fake.held = {mark}
    video_id = gateway.create()
    with gateway.follow(video_id) as following:
        fake.wait_for(mark)
        answer = gateway.http.post(f"/v1/videos/{video_id}/cancel").json()
        assert (answer["status"], answer["error"]["code"]) == ("cancelled", "cancelled")
        assert answer["error"]["message"] == "cancelled by the client"
        assert answer["usage"] == {"queue_s": 0.1, "rank_seconds": 0.3, "attempts": 1, "peak_memory_mb": 4.8}
        last = list(following)[-1]
    assert (last[1], last[2]["error"]["code"]) == ("error", "cancelled")
    assert gateway.http.post(f"/v1/videos/{video_id}/cancel").json()["status"] == "cancelled"
    assert fake.cancelled == [video_id]
    assert list(gateway.videos.iterdir()) == []


def test_a_timeout_of_its_own_is_told_from_a_cancel(gateway, fake):
    fake.failures = {"denoise:2": ("timed_out", "its timeout of 1 s passed in denoising, after step 2 of 4")}
    video = gateway.wait(gateway.create(timeout=1), "failed")
    assert (video["error"]["code"], video["error"]["type"]) == ("timed_out", "invalid_request_error")
    assert (video["finished_reason"], video["usage"]["attempts"]) == ("timed_out", 3)
    seen = 'framemesh_requests_total{finished_reason="timed_out",model="demo"} 1.0'
    assert seen in gateway.http.get("/metrics").text
    for path in ("/v1/videos/sync", "/v1/images/generations"):
        answer = gateway.http.post(path, json={"prompt": "a", "timeout": 1})
        # The OpenAI SDK repeats 408 as well as whatever is 500 or more.
        assert (answer.status_code, answer.headers["x-should-retry"]) == (400, "false")
        assert answer.json()["error"] == video["error"]


def test_a_cancel_does_not_wait_for_ever_for_what_the_job_took(gateway, fake, monkeypatch):
    monkeypatch.setattr(runner_module, "USAGE_PATIENCE_S", 0.2)
    fake.held, fake.loses_cancels = {"denoise:2"}, True
    video_id = gateway.create()
    fake.wait_for("denoise:2")
    began = time.monotonic()
    answer = gateway.http.post(f"/v1/videos/{video_id}/cancel").json()
    assert (answer["status"], answer["usage"]["rank_seconds"]) == ("cancelled", 0)
    assert 0.2 <= time.monotonic() - began < 2
    eventually(lambda: fake.cancelled == [video_id] * 2)


def test_a_finished_job_is_not_cancelled(gateway, fake):
    video_id = gateway.create()
    gateway.wait(video_id)
    assert gateway.http.post(f"/v1/videos/{video_id}/cancel").json()["status"] == "completed"
    assert fake.cancelled == []


def test_an_ending_that_is_in_the_store_already_stands(gateway, fake, tmp_path):
    """A cancel may come between the store's note that the video is complete and our hearing of it."""
    fake.held = {"denoise:1"}
    video_id = gateway.create()
    fake.wait_for("denoise:1")
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as store, store:
        store.execute("UPDATE jobs SET status = 'completed'")
    (gateway.videos / f"{video_id}.mp4").touch()
    with gateway.follow(video_id) as following:
        answer = gateway.http.post(f"/v1/videos/{video_id}/cancel").json()
        assert (answer["status"], answer["error"]) == ("completed", None)
        assert names(following)[-1] == "done"
    assert (gateway.videos / f"{video_id}.mp4").exists()


def test_delete_stops_the_work_and_removes_everything(gateway, fake):
    done = gateway.create()
    gateway.wait(done)
    fake.held = {"decode:2"}
    running = gateway.create()
    fake.wait_for("decode:2")
    for video_id in (done, running):
        answer = gateway.http.delete(f"/v1/videos/{video_id}")
        assert answer.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
        assert gateway.http.get(f"/v1/videos/{video_id}").status_code == 404
        assert gateway.http.delete(f"/v1/videos/{video_id}").status_code == 404
    assert fake.cancelled == [running]
    assert list(gateway.videos.iterdir()) == []
    assert gateway.http.get("/v1/videos").json()["data"] == []


def test_credits_come_back_when_a_reader_of_frames_leaves(gateway, fake, monkeypatch):
    """Chunks that wait for the encoder when their job is cancelled must not count as under way for ever."""
    slow = threading.Event()
    real = runner_module.Recording.add
    monkeypatch.setattr(runner_module.Recording, "add", lambda *args: (slow.wait(5), real(*args))[1])
    fake.held = {"decode:5"}
    video_id = gateway.create()
    fake.wait_for("decode:5")
    eventually(lambda: gateway.video(video_id)["stage"] == "deliver" or fake.credits == FRAME_CREDITS - 5)
    time.sleep(0.1)
    assert fake.credits == FRAME_CREDITS - 5
    threading.Timer(0.05, slow.set).start()
    gateway.http.post(f"/v1/videos/{video_id}/cancel")
    eventually(lambda: fake.credits == FRAME_CREDITS)
    assert list(gateway.videos.iterdir()) == [], "a thread went on writing after the end"


def test_what_arrives_together_is_sent_together_and_withdrawn_before_it_is_sent(start, fake):
    gateway = start(batching_delay_ms=300)
    fake.held = {"queued"}
    ids = [gateway.create() for _ in range(3)]
    gateway.http.post(f"/v1/videos/{ids[1]}/cancel")
    eventually(lambda: fake.submitted)
    assert [request.id for request in fake.submitted] == [ids[0], ids[2]]
    assert fake.batches == [2]
    assert fake.cancelled == []


def test_a_client_that_leaves_leaves_nothing_behind(gateway, fake):
    fake.held = {"denoise:1"}
    video_id = gateway.create()
    fake.wait_for("denoise:1")
    before = gateway.tasks()
    for _ in range(5):
        with gateway.follow(video_id, frames="jpeg") as following:
            next(following)
            assert gateway.call(lambda: gateway.runner.events(video_id).wants_stills)
    eventually(lambda: not gateway.call(lambda: gateway.runner.events(video_id).wants_stills))
    eventually(lambda: gateway.tasks() == before)
    assert gateway.video(video_id)["status"] == "in_progress", "watching is not owning"
    fake.release()
    gateway.wait(video_id)
    assert gateway.runner._live == {}


def test_an_idempotency_key_never_runs_twice(gateway, fake):
    def post(key, **changes):
        return gateway.http.post("/v1/videos", json=BODY | changes, headers={"idempotency-key": key})

    first = post("a").json()
    assert post("a").json()["id"] == first["id"]
    gateway.wait(first["id"])
    assert post("a").json()["status"] == "completed"
    assert post("b").json()["id"] != first["id"]
    refused = post("a", num_frames=5)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
    gateway.wait(post("b").json()["id"])
    assert len(fake.submitted) == 2


# ---- restarts ----------------------------------------------------------------------------------------------------


def test_after_a_restart_unfinished_jobs_run_again_under_the_same_id(start, fake):
    fake.held = {"decode:2"}
    first = start()
    done_before = first.create(num_frames=1)
    first.wait(done_before)
    ids = [first.create(seed=number) for number in range(2)]
    fake.wait_for("decode:2")
    eventually((first.videos / f"{ids[0]}.fragments.mp4").exists)
    first.close()
    fake.release()
    submitted = len(fake.submitted)

    second = start()
    for video_id in ids:
        video = second.wait(video_id)
        assert len(read_frames(second.videos / f"{video_id}.mp4")) == FRAMES
        assert video["seed"] == ids.index(video_id)
    assert sorted(request.id for request in fake.submitted[submitted:]) == ids
    assert second.video(done_before)["status"] == "completed"
    assert names(second.events(done_before)) == ["frames", "done"]


def test_after_a_restart_jobs_wait_for_the_model_and_can_be_watched_and_cancelled(start, fake):
    fake.held = {"denoise:1"}
    first = start()
    ids = [first.create() for _ in range(2)]
    first.close()
    fake.ready, fake.held = False, set()
    second = start()
    assert second.http.post(f"/v1/videos/{ids[0]}/cancel").json()["status"] == "cancelled"
    with second.follow(ids[1]) as following:
        fake.become_ready()
        events = list(following)
        assert names(events)[-1] == "done"
        assert [data["step"] for _, name, data in events if name == "step"] == [1, 2, 3, 4]
    assert [request.id for request in fake.submitted[2:]] == [ids[1]]


def test_after_a_restart_a_file_that_was_finished_is_a_finished_job(start, fake):
    fake.held = {"denoise:1"}
    first = start()
    video_id = first.create()
    first.close()
    (first.videos / f"{video_id}.mp4").write_bytes(b"whole")
    second = start()
    assert second.video(video_id)["status"] == "completed"
    assert len(fake.submitted) == 1


def test_after_a_restart_with_another_model_old_jobs_fail_with_the_reason(start, fake):
    fake.held = {"denoise:1"}
    first = start()
    video_id = first.create()
    first.close()
    video = start(served_model_name=("other",)).video(video_id)
    assert (video["status"], video["error"]["code"]) == ("failed", "model_changed")


# ---- lists, models, health ---------------------------------------------------------------------------------------


def test_lists_have_pages(gateway, fake):
    ids = [gateway.create(num_frames=1) for _ in range(5)]
    for video_id in ids:
        gateway.wait(video_id)
    page = gateway.http.get("/v1/videos", params={"limit": 2}).json()
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[4], ids[3], True)
    rest = gateway.http.get("/v1/videos", params={"after": page["last_id"]}).json()
    assert [video["id"] for video in rest["data"]] == ids[2::-1]
    assert rest["has_more"] is False
    upwards = gateway.http.get("/v1/videos", params={"order": "asc", "limit": 5}).json()
    assert [video["id"] for video in upwards["data"]] == ids
    assert upwards["has_more"] is False
    none = gateway.http.get("/v1/videos", params={"after": ids[0]}).json()
    assert none == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert all(earlier < later for earlier, later in pairwise(ids))


def test_running_jobs_tell_where_they_are_and_when_to_ask_again(gateway, fake):
    fake.held = {"queued", "denoise:1"}
    video_id = gateway.create()
    eventually(lambda: gateway.video(video_id)["eta_s"] is not None)
    answer = gateway.http.get(f"/v1/videos/{video_id}")
    video = answer.json()
    assert (video["status"], video["queue_position"], video["eta_s"], video["progress"]) == ("queued", 1, 4.0, 0)
    assert answer.headers["openai-poll-after-ms"] == "1000"
    fake.release("queued")
    eventually(lambda: gateway.video(video_id)["step"] == 1)
    video = gateway.http.get("/v1/videos").json()["data"][0]
    expected = {"status": "in_progress", "stage": "denoise", "step": 1, "eta_s": 2.5, "queue_position": None}
    assert expected.items() <= video.items()
    fake.release()
    gateway.wait(video_id)
    assert "openai-poll-after-ms" not in gateway.http.get(f"/v1/videos/{video_id}").headers


def test_the_api_describes_itself(gateway):
    told = gateway.http.get("/openapi.json").json()
    described = told["paths"]
    assert {"/v1/videos", "/v1/videos/{video_id}/events", "/v1/models/{model_id}", "/health/ready"} <= described.keys()
    bodies = described["/v1/videos"]["post"]["requestBody"]["content"]
    name = bodies["multipart/form-data"]["schema"]["$ref"].rpartition("/")[2]
    assert {"prompt", "size", "seconds", "num_frames"} <= told["components"]["schemas"][name]["properties"].keys()


def test_models_and_health(gateway):
    described = {
        "model_path": "demo",
        "task_type": "T2V",
        "pipeline_name": "wan_pipeline",
        "pipeline_class": "WanPipeline",
        "num_gpus": 2,
        "dit_precision": "fp32",
        "vae_precision": "fp32",
    }
    gateway.wait(gateway.create(num_frames=1))
    assert gateway.http.get("/models").json() == described
    card = {"id": "demo", "object": "model", "created": 0, "owned_by": "framemesh", "root": "demo"} | described
    assert gateway.http.get("/v1/models").json() == {"object": "list", "data": [card]}
    assert gateway.http.get("/v1/models/demo").json() == card
    for path in ("/health", "/health/ready"):
        answer = gateway.http.get(path)
        assert (answer.status_code, answer.json()["status"], answer.json()["ranks_ready"]) == (200, "ready", 2)
    assert gateway.http.get("/health/live").status_code == 200


def test_before_the_model_is_loaded(start, fake, monkeypatch):
    fake.ready = False
    monkeypatch.setattr(runner_module, "MODEL_PATIENCE_S", 0.1)
    gateway = start()
    assert gateway.http.get("/health/live").status_code == 200
    answer = gateway.http.get("/health")
    assert answer.status_code == 503
    for answer in (gateway.http.get("/v1/models"), gateway.http.post("/v1/videos", json=BODY)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert int(answer.headers["retry-after"]) >= 1
    assert gateway.http.post("/v1/videos", json={"prompt": "a", "sede": 1}).status_code == 400
    assert gateway.http.get("/v1/videos").json()["data"] == []
    monkeypatch.setattr(runner_module, "MODEL_PATIENCE_S", 5.0)
    threading.Timer(0.1, fake.become_ready).start()
    gateway.wait(gateway.create())


# ---- OpenAI's own client -----------------------------------------------------------------------------------------


def test_the_openai_sdk(gateway, fake, tmp_path):
    with warnings.catch_warnings(), openai.OpenAI(api_key="none", base_url=f"{gateway.url}/v1") as client:
        warnings.filterwarnings("ignore", message="The Sora API", category=DeprecationWarning)
        video = client.videos.create(prompt="a cat", size="96x64", seconds="1", extra_body={"seed": 7})
        assert (video.object, video.size, video.model, video.seed) == ("video", "96x64", "demo", 7)
        video = client.videos.poll(video.id)
        assert (video.status, video.progress, video.error) == ("completed", 100, None)
        assert client.videos.retrieve(video.id).completed_at >= video.created_at
        client.videos.download_content(video.id).write_to_file(tmp_path / "video.mp4")
        assert len(read_frames(tmp_path / "video.mp4")) == 9
        others = [client.videos.create_and_poll(prompt="a dog").id for _ in range(2)]
        assert [listed.id for listed in client.videos.list(limit=2)] == [*others[::-1], video.id]
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError) as gone:
            client.videos.retrieve(video.id)
        assert (gone.value.code, gone.value.param) == ("video_not_found", "video_id")
        assert gone.value.request_id.startswith("req_")
        with pytest.raises(openai.BadRequestError, match="17 and 21"):
            client.videos.create(prompt="a cat", extra_body={"num_frames": 18})
        fake.failures = {"denoise:1": ("out_of_memory", "too large")}
        failed = client.videos.create_and_poll(prompt="a cat")
        assert (failed.status, failed.error.code, failed.error.message) == ("failed", "out_of_memory", "too large")
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").id == "demo"


# ---- the process -------------------------------------------------------------------------------------------------


@pytest.fixture
def process(fake, tmp_path):
    config_file = tmp_path / "config.json"
    save_frozen(Config(output_path=str(tmp_path / "out put?"), port=0), config_file)
    command = [sys.executable, "-P", "-m", "gateway", "--config", str(config_file), "--model-folder", str(MODEL_FOLDER)]
    command += ["--scheduler", fake.endpoint, "--frames", f"ipc://{fake.folder}/frames"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def test_the_process_says_where_it_listens_costs_nothing_idle_and_ends_on_a_signal(process, fake, tmp_path):
    url = json.loads(process.stdout.readline())["url"]
    with httpx2.Client(base_url=url, timeout=10) as http:
        video_id = http.post("/v1/videos", json=BODY).raise_for_status().json()["id"]
        with http.stream("GET", f"/v1/videos/{video_id}/events") as response:
            assert names(parse_events(response.iter_lines()))[-1] == "done"
        assert http.get(f"/v1/videos/{video_id}/content").status_code == 200
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        used = sum(psutil.Process(process.pid).cpu_times()[:2])
        time.sleep(1)
        assert sum(psutil.Process(process.pid).cpu_times()[:2]) - used <= 0.02

        fake.held = {"denoise:1"}
        running = http.post("/v1/videos", json=BODY).raise_for_status().json()["id"]
        fake.wait_for("denoise:1")
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=5)
    assert output == ""
    assert "Traceback" not in errors
    assert fake.completed == [video_id]
    with contextlib.closing(sqlite3.connect(tmp_path / "out put?" / "jobs.sqlite3")) as store:
        assert store.execute("SELECT id, status FROM jobs").fetchall() == [
            (video_id, "completed"),
            (running, "in_progress"),
        ]


def test_an_address_that_is_taken_is_said_in_one_line():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartFailed, match=rf"^cannot listen on 127.0.0.1:{port}: Address already in use$"):
            listen("127.0.0.1", port)


def test_an_answers_body_does_not_wait_for_the_acknowledgement_of_its_head():
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
