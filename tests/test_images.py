"""POST /v1/images/generations over a fake mesh: the real server, the real OpenAI SDK, stills of the demo model."""

from __future__ import annotations

import base64
import io
import json
import warnings

import httpx2
import numpy as np
import openai
import pytest
from fake_mesh import moving_frames
from PIL import Image
from served import eventually

PATH = "/v1/images/generations"
BODY = {"prompt": "a red square", "num_inference_steps": 4}


@pytest.fixture
def client(gateway):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


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
    assert image.url == f"{gateway.url}/v1/images/{image.id}/content"
    file = httpx2.get(image.url)
    assert file.headers["content-type"] == f"image/{suffix}"
    picture = opened(file.content)
    assert picture.format == kind.upper()
    shades = np.asarray(picture.convert("RGB")).astype(int) - expected(fake.submitted[0].params)
    assert abs(shades).max() <= (0 if kind == "png" else 12)
    if kind != "png":
        assert json.loads(picture.getexif()[0x010E])["seed"] == 3
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
        assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be").startswith("a\n")


def test_compression_makes_it_smaller(client):
    sizes = [
        len(client.images.generate(prompt="a", output_format="jpeg", output_compression=quality).data[0].b64_json)
        for quality in (100, 10)
    ]
    assert sizes[1] < sizes[0]


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
        user="someone",
        output_compression=100,
    )
    client.images.generate(prompt="a", quality="standard", background=None, n=None, response_format=None)
    assert len(fake.submitted) == 2


def test_sampling_parameters_arrive(client, fake):
    more = {"num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "blue", "height": 32, "width": 48}
    client.images.generate(prompt="a", extra_body=more)
    (request,) = fake.submitted
    assert {name: getattr(request.params, name) for name in more} == more
    assert request.token_ids["text_encoder"]["negative_prompt"]


# ---- refusals ------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"sede": 1}, "sede", "unknown_parameter", "did you mean seed?"),
    ({"num_frames": 5}, "num_frames", "unknown_parameter", "no parameter"),
    ({"prompt": ""}, "prompt", "missing_required_parameter", "empty"),
    ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
    ({"n": 11}, "n", "invalid_value", "less than or equal to 10"),
    ({"n": True}, "n", "invalid_value", "number"),
    ({"size": "big"}, "size", "invalid_value", "WIDTHxHEIGHT"),
    ({"size": "100x64"}, "size", "invalid_value", "96 and 112"),
    ({"seed": 2**63 - 1, "n": 2}, "seed", "invalid_value", "leaves no room"),
    ({"response_format": "file"}, "response_format", "invalid_value", "b64_json"),
    ({"output_format": "svg"}, "output_format", "invalid_value", "png"),
    ({"output_compression": 50}, "output_compression", "invalid_value", "no effect on png"),
    ({"quality": "hd"}, "quality", "unsupported_value", "auto or standard"),
    ({"background": "transparent"}, "background", "unsupported_value", "auto or opaque"),
    ({"stream": True}, "stream", "unsupported_value", "false"),
    ({"partial_images": 2}, "partial_images", "unsupported_value", "0"),
    ({"style": "vivid"}, "style", "unknown_parameter", "no parameter"),
    ({"true_cfg_scale": 3}, "true_cfg_scale", "invalid_value", "image models"),
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
    with pytest.raises(httpx2.ReadTimeout):
        gateway.http.post(PATH, json=BODY | {"n": 2}, timeout=0.5)
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
    monkeypatch.setattr("gateway.routes.images.MODEL_PATIENCE_S", 0.05)
    fake.ready = False
    answer = start().http.post(PATH, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
