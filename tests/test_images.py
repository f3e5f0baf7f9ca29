"""POST /v1/images/generations over a fake mesh: the real server, the real OpenAI SDK, stills of the demo model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import warnings

import numpy as np
import openai
import pytest
from fake_mesh import moving_frames, preview_brightness
from PIL import Image
from served import eventually, parse_events

from gateway.connection import event_stream

PATH = "/v1/images/generations"
BODY = {"prompt": "a red square", "num_inference_steps": 4}


@pytest.fixture
def client(gateway):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            yield client


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def expected(params) -> np.ndarray:
    return moving_frames(params)[0]


# ---- through OpenAI's own client -----------------------------------------------------------------------------------


def test_the_sdk_gets_a_png(client, fake):
    answer = client.images.generate(prompt="a red square", size="96x64", extra_body={"seed": 7})
    (image,) = answer.data
    picture = opened(base64.b64decode(image.b64_json))
    (request,) = fake.submitted
    assert (picture.format, picture.size) == ("PNG", (96, 64))
    assert np.array_equal(np.asarray(picture), expected(request.params))
    assert (request.params.num_frames, request.params.seed, image.seed) == (1, 7, 7)
    assert (answer.size, answer.output_format, answer.created > 1_700_000_000) == ("96x64", "png", True)
    assert answer.warnings == []
    written = json.loads(picture.text["framemesh"])
    assert (written["prompt"], written["seed"], written["size"]) == ("a red square", 7, "96x64")
    assert picture.text["parameters"].startswith("a red square\n")


def test_several_are_made_together_and_their_seeds_count_up(client, fake):
    answer = client.images.generate(prompt="a", n=3, size="auto", extra_body={"seed": 2**40})
    assert [image.seed for image in answer.data] == [2**40, 2**40 + 1, 2**40 + 2]
    assert {request.params.seed for request in fake.submitted} == {image.seed for image in answer.data}
    assert len({request.id for request in fake.submitted}) == 3
    assert {request.params.width for request in fake.submitted} == {64}


def test_an_unset_seed_is_drawn_and_reported(client, fake):
    seeds = {client.images.generate(prompt="a").data[0].seed for _ in range(3)}
    assert len(seeds) == 3
    assert seeds == {request.params.seed for request in fake.submitted}


@pytest.mark.parametrize(("kind", "suffix"), [("png", "png"), ("webp", "webp"), ("jpeg", "jpeg")])
def test_a_url_leads_to_the_file(client, gateway, fake, kind, suffix):
    answer = client.images.generate(prompt="a", response_format="url", output_format=kind, extra_body={"seed": 3})
    (image,) = answer.data
    assert image.b64_json is None
    assert image.url == f"/v1/images/{image.id}/content"
    file = gateway.http.get(image.url)
    assert file.headers["content-type"] == f"image/{suffix}"
    picture = opened(file.content)
    assert picture.format == kind.upper()
    shades = np.asarray(picture.convert("RGB")).astype(int) - expected(fake.submitted[0].params)
    assert abs(shades).max() <= (0 if kind == "png" else 12)
    if kind != "png":
        assert json.loads(picture.getexif()[0x010E])["seed"] == 3
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
        assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be").startswith("a\n")


def test_urls_are_absolute_where_the_server_knows_its_name(start):
    gateway = start(public_url="https://images.example.org/api/")
    (image,) = gateway.http.post(PATH, json=BODY | {"response_format": "url"}).json()["data"]
    assert image["url"] == f"https://images.example.org/api/v1/images/{image['id']}/content"


def test_compression_makes_it_smaller(client):
    words = {"prompt": "a", "output_format": "jpeg", "size": "256x256", "extra_body": {"seed": 1}}
    full, little = (
        len(client.images.generate(**words, output_compression=quality).data[0].b64_json) for quality in (100, 10)
    )
    assert little < full


def test_values_that_ask_for_nothing_are_taken(client, fake):
    client.images.generate(
        prompt="a",
        model="demo",
        n=1,
        size="auto",
        quality="auto",
        background="opaque",
        moderation="low",
        stream=False,
        partial_images=0,
        style="vivid",
        user="someone",
        output_compression=100,
    )
    nulls = {"background": None, "n": None, "response_format": None, "stream_options": None}
    client.images.generate(prompt="a", quality="standard", extra_body=nulls)
    assert len(fake.submitted) == 2


def test_sampling_parameters_arrive(client, fake):
    more = {"num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "blue", "height": 32, "width": 48}
    client.images.generate(prompt="a", extra_body=more)
    (request,) = fake.submitted
    assert {name: getattr(request.params, name) for name in more} == more
    assert request.token_ids["text_encoder"]["negative_prompt"]


def test_what_it_took_is_told_in_tokens_and_in_seconds(client, fake):
    answer = client.images.generate(prompt="a red square", n=2, safety_identifier="who")
    (request, _) = fake.submitted
    tokens = len(request.token_ids["text_encoder"]["prompt"])
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (tokens, 0, tokens)
    assert (usage.input_tokens_details.text_tokens, usage.input_tokens_details.image_tokens) == (tokens, 0)
    assert (usage.rank_seconds, usage.attempts, usage.peak_memory_mb) == (3.6, 2, 4.8)
    assert answer.data[0].usage == {"queue_s": 0.1, "rank_seconds": 1.8, "attempts": 1, "peak_memory_mb": 4.8}
    assert answer.data[0].timings["total"] == 1.0
    assert (answer.quality, answer.background, answer.safety_identifier) == ("auto", "opaque", "who")


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_counted_and_traced(gateway, fake, stream):
    parent = f"00-{1:032x}-{2:016x}-01"
    headers = {"x-request-id": "mine", "traceparent": parent}
    gateway.http.post(PATH, json=BODY | {"stream": stream}, headers=headers).raise_for_status()
    (request,) = fake.submitted
    assert (request.trace, request.traceparent) == ("mine", parent)
    told = gateway.http.get("/metrics").text
    assert 'framemesh_requests_total{finished_reason="completed",model="demo"} 1.0' in told
    assert 'framemesh_num_requests_running{model="demo"} 0.0' in told


# ---- streams -------------------------------------------------------------------------------------------------------


def decoded(event) -> Image.Image:
    return opened(base64.b64decode(event.b64_json))


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_stream_has_previews_and_then_the_picture(client, fake, kind):
    body = {"num_inference_steps": 8, "seed": 3}
    with client.images.generate(
        prompt="a", size="96x64", stream=True, partial_images=3, output_format=kind, extra_body=body
    ) as stream:
        *partials, last = stream
    (request,) = fake.submitted
    assert request.previews == 3
    # Of previews that wait for each other only the newest is left.
    assert 1 <= len(partials) <= 3
    assert [event.partial_image_index for event in partials] == list(range(len(partials)))
    for event in partials:
        assert type(event).__name__ == "ImageGenPartialImageEvent"
        assert (decoded(event).size, decoded(event).format) == ((96, 64), kind.upper())
        assert (event.size, event.output_format, event.quality, event.background) == ("96x64", kind, "auto", "opaque")
    assert type(last).__name__ == "ImageGenCompletedEvent"
    assert last.type == "image_generation.completed"
    shades = np.asarray(decoded(last).convert("RGB")).astype(int) - expected(request.params)
    assert abs(shades).max() <= (0 if kind == "png" else 12)
    assert last.usage.total_tokens == last.usage.input_tokens > 0
    assert (last.seed, last.usage.rank_seconds, last.warnings) == (3, 1.8, [])


def test_every_preview_comes_while_the_rest_is_still_denoised(client, fake):
    fake.held = {"denoise:2", "denoise:4", "denoise:6"}
    body = {"num_inference_steps": 8}
    with client.images.generate(prompt="a", stream=True, partial_images=3, extra_body=body) as stream:
        for number, step in enumerate((2, 4, 6)):
            event = next(stream)
            assert event.partial_image_index == number
            assert np.asarray(decoded(event)).mean() == preview_brightness(step)
            fake.release(f"denoise:{step}")
        assert [event.type for event in stream] == ["image_generation.completed"]


def read_stream(gateway, **changes):
    with gateway.http.stream("POST", PATH, json=BODY | {"stream": True} | changes) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        return [(name, data) for _, name, data in parse_events(response.iter_lines())]


def test_without_partial_images_there_is_only_the_picture(gateway):
    ((name, data),) = read_stream(gateway)
    assert name == data["type"] == "image_generation.completed"


def test_progress_is_told_if_it_is_asked_for(gateway):
    told = read_stream(gateway, stream_options={"include_progress": True})
    progress = [data for name, data in told if name == "image_generation.progress"]
    assert progress[0] == {
        "type": "image_generation.progress",
        "stage": "queued",
        "step": 0,
        "total_steps": 4,
        "eta_s": 4.0,
        "queue_position": 1,
    }
    assert [data["step"] for data in progress if data["stage"] == "denoise"] == [0, 1, 2, 3, 4]
    assert told[-1][0] == "image_generation.completed"


def test_a_failure_ends_the_stream_as_an_error(client, gateway, fake):
    fake.failures = {"denoise:2": ("out_of_memory", "it did not fit")}
    stream = client.images.generate(prompt="a", stream=True)
    with stream, pytest.raises(openai.APIError, match="it did not fit") as failed:
        list(stream)
    assert failed.value.code == "out_of_memory"
    ((name, data),) = read_stream(gateway)
    error = {"message": "it did not fit", "type": "invalid_request_error", "param": None, "code": "out_of_memory"}
    assert (name, data) == ("error", {"type": "error", "error": error})


def test_an_error_of_ours_ends_the_stream_as_one(gateway, fake, monkeypatch):
    def broken(*args):
        raise RuntimeError("secret")

    monkeypatch.setattr("gateway.pictures.still", broken)
    ((name, data),) = read_stream(gateway)
    assert (name, data["error"]["code"]) == ("error", "internal_error")
    assert "secret" not in str(data)


def test_the_mesh_does_not_wait_for_a_client_that_does_not_read():
    ended = asyncio.Event()

    async def events():
        for number in range(100):
            yield "event", {"number": number}
        ended.set()

    async def main():
        body = event_stream(events()).body_iterator
        assert await anext(body) == b'event: event\ndata: {"number":0}\n\n'
        await asyncio.wait_for(ended.wait(), 10)
        assert len([part async for part in body]) == 99

    asyncio.run(main())


def test_what_can_be_refused_at_once_is_no_stream(gateway, fake):
    for changes in ({"prompt": "red " * 600}, {"model": None, "size": "1x1"}):
        answer = gateway.http.post(PATH, json=BODY | {"stream": True} | changes)
        assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
    fake.drain()
    eventually(lambda: gateway.mesh.state.draining)
    assert gateway.http.post(PATH, json=BODY | {"stream": True}).status_code == 503
    assert fake.submitted == []


def test_a_silent_stream_shows_that_it_lives(gateway, fake, monkeypatch):
    monkeypatch.setattr("gateway.connection.KEEPALIVE_S", 0.02)
    fake.held = {"encode"}
    with gateway.http.stream("POST", PATH, json=BODY | {"stream": True}) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", ""] * 2
        fake.release()
        assert [name for _, name, _ in parse_events(lines)] == ["image_generation.completed"]


@pytest.mark.parametrize("mark", ["queued", "denoise:2"])
def test_who_leaves_a_stream_cancels(gateway, fake, mark):
    gateway.http.post(PATH, json=BODY)
    before = gateway.tasks()
    fake.held = {mark}
    body = BODY | {"stream": True, "stream_options": {"include_progress": True}}
    with gateway.http.stream("POST", PATH, json=body) as response:
        # A reader that is dropped closes the connection.
        events = parse_events(response.iter_lines())
        next(events)
        fake.wait_for(mark)
    eventually(lambda: fake.cancelled)
    assert fake.cancelled == [fake.submitted[1].id]
    eventually(lambda: len(gateway.tasks()) <= len(before))


# ---- refusals ------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"sede": 1}, "sede", "unknown_parameter", "did you mean seed?"),
    ({"num_frames": 5}, "num_frames", "unknown_parameter", "no parameter"),
    ({"prompt": ""}, "prompt", "missing_required_parameter", "empty"),
    ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
    ({"n": 11}, "n", "invalid_value", "n: 11 should be less than or equal to 10"),
    ({"n": True}, "n", "invalid_value", "number"),
    ({"size": "big"}, "size", "invalid_value", "WIDTHxHEIGHT"),
    ({"size": "100x64"}, "size", "invalid_value", "96 and 112"),
    ({"seed": 2**63 - 1, "n": 2}, "seed", "invalid_value", "leaves no room"),
    ({"response_format": "file"}, "response_format", "invalid_value", "b64_json"),
    ({"output_format": "svg"}, "output_format", "invalid_value", "'svg' should be 'png'"),
    ({"output_compression": 50}, "output_compression", "invalid_value", "no effect on png"),
    ({"quality": "hd"}, "quality", "unsupported_value", "auto or standard"),
    ({"background": "transparent"}, "background", "unsupported_value", "auto or opaque"),
    ({"style": "natural"}, "style", "unsupported_value", "vivid"),
    ({"frame_count": 9}, "frame_count", "unsupported_value", "leave it out"),
    ({"svg": {"model": "x"}}, "svg", "unsupported_value", "leave it out"),
    ({"input_fidelity": "low"}, "input_fidelity", "unknown_parameter", "no parameter"),
    ({"stream": True, "n": 2}, "n", "invalid_value", "one stream"),
    ({"stream": True, "response_format": "url"}, "response_format", "invalid_value", "b64_json"),
    ({"stream": True, "partial_images": 4}, "partial_images", "invalid_value", "less than or equal to 3"),
    ({"stream": True, "stream_options": {"progress": True}}, "stream_options", "unknown_parameter", ""),
    ({"partial_images": 2}, "partial_images", "invalid_value", "stream=true only"),
    ({"stream_options": {"include_progress": True}}, "stream_options", "invalid_value", "stream=true only"),
    ({"user": "u" * 513}, "user", "invalid_value", "512"),
    ({"true_cfg_scale": 3}, "true_cfg_scale", "unsupported_parameter", "image models"),
    ({"model": "flux"}, "model", "model_not_found", "does not exist here"),
    ({"prompt": "red " * 600}, "prompt", "string_above_max_length", "shorten"),
]


def test_refusals_name_the_field(gateway, fake):
    for changes, field, code, words in REFUSED:
        answer = gateway.http.post(PATH, json=BODY | changes)
        error = answer.json()["error"]
        assert answer.status_code == (404 if code == "model_not_found" else 400), changes
        assert (error["param"], error["code"]) == (field, code), changes
        assert words in error["message"], error
    assert fake.submitted == []


def test_an_idempotency_key_would_do_nothing(gateway, fake):
    answer = gateway.http.post(PATH, json=BODY, headers={"Idempotency-Key": "x"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert fake.submitted == []


@pytest.mark.parametrize("image_id", ["image_00", "image_x", "..%2f..%2fjobs", "video_00"])
def test_an_unknown_image_is_not_found(gateway, image_id):
    answer = gateway.http.get(f"/v1/images/{image_id}/content")
    assert answer.status_code == 404


# ---- what goes wrong on the way -----------------------------------------------------------------------------------


def test_who_leaves_cancels(gateway, fake):
    fake.held = {"denoise:1"}
    with contextlib.closing(http.client.HTTPConnection(gateway.url.removeprefix("http://"))) as client:
        client.request("POST", PATH, json.dumps(BODY | {"n": 2}), {"content-type": "application/json"})
        eventually(lambda: len(fake.submitted) == 2)
    eventually(lambda: len(fake.cancelled) == 2)
    assert set(fake.cancelled) == {request.id for request in fake.submitted}
    fake.release()
    assert gateway.http.post(PATH, json=BODY).status_code == 200


@pytest.mark.parametrize(
    ("code", "status", "retry"),
    [("out_of_memory", 400, False), ("draining", 503, True), ("internal_error", 500, False)],
)
def test_a_failure_is_told_and_stops_the_others(client, fake, code, status, retry):
    fake.failures = {"encode": (code, "it did not fit")}
    with pytest.raises(openai.APIStatusError, match="it did not fit") as failed:
        client.images.generate(prompt="a", n=2)
    assert (failed.value.status_code, failed.value.code) == (status, code)
    assert ("retry-after" in failed.value.response.headers) is retry
    eventually(lambda: not fake._running)


def test_a_model_that_still_loads_says_so(fake, start, monkeypatch):
    monkeypatch.setattr("gateway.pictures.MODEL_PATIENCE_S", 0.05)
    fake.ready = False
    answer = start().http.post(PATH, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
