"""Pictures that clients send: what is taken for one, where it is kept, and who is told that the model takes none."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import random
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import openai
import pytest
import structlog
from PIL import Image
from served import eventually

from gateway import inputs
from gateway.inputs import examine
from runtime.errors import InvalidInput

PATH = "/v1/images/edits"
FIELDS = {"prompt": "make it blue", "num_inference_steps": "2"}


@pytest.fixture(autouse=True)
def logs():
    with structlog.testing.capture_logs() as logs:
        yield logs


def picture(size=(96, 64), mode="RGB", kind="PNG", shade=0, **options) -> bytes:
    """A file of noise, so that it cannot be decoded from half of its bytes."""
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    noise = np.random.default_rng(shade).integers(0, 256, (size[1], size[0], channels), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise.squeeze(), mode).save(sink, kind, **options)
    return sink.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.fixture
def taking(start, fake):
    """A gateway whose model takes up to three pictures, and fetches them from this host too."""
    fake.card = dataclasses.replace(fake.card, max_input_images=3)
    return start(max_body_bytes=10_000_000, allow_private_urls=True)


@pytest.fixture
def web():
    """A server of pictures: path -> bytes, or None for one that never answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            content = server.files.get(self.path)
            if content is None:
                server.ended.wait(20)
                return
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.ended = {}, [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


def kept(gateway) -> list[Path]:
    return sorted(path for path in Path(gateway.config.output_path, "inputs").rglob("*") if path.is_file())


def assert_kept(files, *contents) -> None:
    """They lie there whole, in this order, under the hash of their bytes."""
    assert [Path(file).read_bytes() for file in files] == list(contents)
    assert [Path(file).stem for file in files] == [hashlib.sha256(content).hexdigest() for content in contents]


def refusal(answer) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["param"], error["code"]


# ---- a model that takes pictures -----------------------------------------------------------------------------------


@pytest.fixture
def client(taking):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with openai.OpenAI(base_url=f"{taking.url}/v1", api_key="none", max_retries=0) as client:
            yield client


def test_the_sdk_edits_one_picture(client, taking, fake):
    content = picture(kind="JPEG")
    answer = client.images.edit(image=content, prompt="make it blue", size="96x64", extra_body={"seed": 7})
    (request,) = fake.submitted
    assert_kept(request.images, content)
    assert (request.mask, request.markup, request.params.seed) == ("", "", 7)
    assert Path(request.images[0]).suffix == ".jpeg", "the declared type is application/octet-stream"
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).size == (96, 64)


def test_the_sdk_edits_several_with_a_mask(client, fake):
    first, second, mask = picture(shade=1), picture((32, 32), shade=2), picture(mode="RGBA")
    answer = client.images.edit(
        image=[first, second], mask=mask, prompt="a", n=2, response_format="url", quality="auto", input_fidelity="low"
    )
    assert len(answer.data) == 2
    for request in fake.submitted:
        assert_kept([*request.images, request.mask], first, second, mask)


def test_the_sdk_streams_an_edit(client):
    with client.images.edit(
        image=picture(), prompt="a", stream=True, partial_images=2, extra_body={"num_inference_steps": 8}
    ) as stream:
        told = list(stream)
    assert {event.type for event in told[:-1]} == {"image_edit.partial_image"}
    assert (told[-1].type, type(told[-1]).__name__) == ("image_edit.completed", "ImageEditCompletedEvent")


def test_json_and_every_spelling_of_an_address(taking, fake, web):
    one, two = picture(shade=1), picture(shade=2, kind="WEBP")
    web.files = {"/two": two}
    address = f"{web.url}/two"
    bodies = [
        {"json": {"image": data_url(one), "url": address}},
        {"json": {"image": [data_url(one), address]}},
        {"json": {"images": [{"image_url": data_url(one)}, {"image_url": {"url": address}}]}},
        {"files": [("image", ("a.txt", one, "text/plain")), ("url", (None, address))]},
        {"files": [("url", (None, address)), ("image[]", ("a", one))]},
        {"files": [("image", (None, data_url(one))), ("image", (None, json.dumps({"image_url": address})))]},
        {"files": [("images[]", (None, data_url(one))), ("url[]", (None, address))]},
    ]
    for body in bodies:
        if "json" in body:
            body["json"] |= FIELDS
        else:
            body["files"] += [(name, (None, value)) for name, value in FIELDS.items()]
        answer = taking.http.post(PATH, **body)
        assert answer.status_code == 200, answer.text
    assert len(fake.submitted) == len(bodies)
    for request in fake.submitted:
        assert_kept(request.images, one, two)
    assert len(kept(taking)) == 2, "the same bytes lie there once"


def test_what_is_fetched_is_checked_like_everything_else(taking, fake, web, monkeypatch):
    web.files = {"/page": b"<html>", "/small": picture((48, 64), "RGBA"), "/opaque": picture()}
    sent = [
        ({"url": f"{web.url}/page"}, "url", "invalid_image"),
        ({"image": data_url(picture()), "mask": f"{web.url}/small"}, "mask", "invalid_image"),
        ({"image": data_url(picture()), "mask": f"{web.url}/opaque"}, "mask", "invalid_image"),
        ({"image": f"{web.url}/opaque", "markup": data_url(picture((48, 64), "RGBA"))}, "markup", "invalid_image"),
        ({"image": "http://127.0.0.1:1/"}, "image", "invalid_url"),
        ({"image": [data_url(picture(shade=n)) for n in range(4)]}, "image", "too_many_images"),
    ]
    for changes, field, code in sent:
        assert refusal(taking.http.post(PATH, json=FIELDS | changes)) == (400, field, code)
    monkeypatch.setattr(inputs, "MAX_IMAGE_BYTES", 1000)
    assert refusal(taking.http.post(PATH, json=FIELDS | {"url": f"{web.url}/opaque"})) == (400, "url", "invalid_url")
    monkeypatch.setattr(inputs, "FETCH_S", 0.1)
    assert refusal(taking.http.post(PATH, json=FIELDS | {"url": f"{web.url}/never"})) == (400, "url", "invalid_url")
    assert fake.submitted == []


def test_addresses_inside_the_network_are_not_asked(fake, start, web):
    fake.card = dataclasses.replace(fake.card, max_input_images=1)
    web.files = {"/one": picture()}
    answer = start().http.post(PATH, json=FIELDS | {"image": f"{web.url}/one"})
    assert refusal(answer) == (400, "image", "invalid_url")
    assert web.asked == []


def test_a_picture_that_is_used_again_is_as_fresh_as_its_last_use(taking):
    body = FIELDS | {"image": data_url(picture())}
    assert taking.http.post(PATH, json=body).status_code == 200
    (file,) = kept(taking)
    os.utime(file, (1, 1))
    assert taking.http.post(PATH, json=body).status_code == 200
    assert kept(taking) == [file]
    assert file.stat().st_mtime > 1


def test_a_disk_that_is_full_leaves_no_half_of_a_picture(taking, monkeypatch):
    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(inputs.os, "fsync", full)
    assert taking.http.post(PATH, json=FIELDS | {"image": data_url(picture())}).status_code == 500
    assert kept(taking) == []


def test_who_leaves_an_edit_cancels_it(taking, fake):
    fake.held = {"denoise:1"}
    with taking.http.stream("POST", PATH, json=FIELDS | {"image": data_url(picture()), "stream": True}):
        fake.wait_for("denoise:1")
    eventually(lambda: fake.cancelled == [fake.submitted[0].id])


# ---- what is no picture --------------------------------------------------------------------------------------------


def file(content: bytes):
    return ("upload", content, "image/png")


SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6
OVERLAY = file(picture(mode="RGBA"))
BAD = [
    ({}, "image", "missing_required_parameter"),
    ({"image": file(b"")}, "image", "invalid_image"),
    ({"image": file(b"text")}, "image", "invalid_image"),
    ({"image": file(picture()[:-2000])}, "image", "invalid_image"),
    ({"image": file(picture(kind="JPEG")[:400])}, "image", "invalid_image"),
    ({"image": file(picture(kind="GIF"))}, "image", "invalid_image"),
    ({"image": file(claims(20_000, 20_000))}, "image", "image_too_large"),
    ({"image": file(claims(10_000, 9_000))}, "image", "image_too_large"),
    ({"image": file(claims(8_000, 8_000))}, "image", "image_too_large"),
    ({"image": file(claims(2_000, 2_000))}, "image", "invalid_image"),
    ({"image": (None, "cat.png")}, "image", "invalid_url"),
    ({"image": (None, "data:image/png,abc")}, "image", "invalid_url"),
    ({"image": (None, "data:image/png;base64,a-b")}, "image", "invalid_url"),
    ({"image": (None, "data:image/png;base64,é")}, "image", "invalid_url"),
    ({"image": (None, "data:image/png;base64,")}, "image", "invalid_image"),
    ({"image": (None, "data:image/png;base64,AAAA")}, "image", "invalid_image"),
    ({"image": (None, "{")}, "image", "invalid_url"),
    ({"url": (None, "image_url.jpg")}, "url", "invalid_url"),
    ({"url": (None, "file:///etc/passwd")}, "url", "invalid_url"),
    ({"image[file_id]": (None, "file-1")}, "image", "unsupported_value"),
    ({"images[]": (None, '{"file_id": "file-1"}')}, "images", "unsupported_value"),
    ({"image": file(picture()), "mask": file(picture())}, "mask", "invalid_image"),
    ({"image": file(picture()), "mask": file(picture((64, 96), "RGBA"))}, "mask", "invalid_image"),
    ({"image": file(picture(kind="JPEG", exif=SIDEWAYS)), "mask": OVERLAY}, "mask", "invalid_image"),
    ({"image": file(picture()), "mask": file(b"no")}, "mask", "invalid_image"),
    ({"image": file(picture()), "mask": OVERLAY, "markup": OVERLAY}, "markup", "invalid_value"),
    ({"image": file(picture()), "input_fidelity": (None, "high")}, "input_fidelity", "unsupported_value"),
    ({"image": file(picture()), "n": (None, "0")}, "n", "invalid_value"),
    ({"image": file(picture()), "stream": (None, "true"), "n": (None, "2")}, "n", "invalid_value"),
    ({"image": file(picture()), "colour": (None, "blue")}, "colour", "unknown_parameter"),
]


def test_what_is_no_picture_is_refused_by_name_also_by_a_model_that_takes_none(start, fake):
    gateway = start(max_body_bytes=1_000_000)
    for changes, field, code in BAD:
        form = [("prompt", (None, "a")), *changes.items()]
        assert refusal(gateway.http.post(PATH, files=form)) == (400, field, code), (field, code)
    for value in (3, True, [[]], {"image_url": 3}, {"image_url": {}}, {}, [data_url(picture()), None]):
        assert refusal(gateway.http.post(PATH, json=FIELDS | {"image": value}))[:2] == (400, "image")
    many = [("prompt", (None, "a")), *[("image[]", file(picture((16, 16))))] * 17]
    assert refusal(gateway.http.post(PATH, files=many)) == (400, "image", "too_many_images")
    assert refusal(gateway.http.post(PATH, files=[*many, *many[1:]]))[0] == 400
    assert fake.submitted == kept(gateway) == []


def test_a_picture_that_is_as_large_as_it_may_not_be(start, monkeypatch):
    content = picture()
    monkeypatch.setattr(inputs, "MAX_IMAGE_BYTES", len(content))
    answer = start().http.post(PATH, files={"prompt": (None, "a"), "image": file(content)})
    assert refusal(answer) == (400, "image", "image_too_large")
    monkeypatch.setattr(inputs, "MAX_IMAGE_BYTES", len(content) + 1)
    assert examine("image", content).width == 96


def test_size_and_alpha_are_those_of_what_one_sees():
    for mode, kind, exif, expected in [
        ("RGB", "JPEG", None, (96, 64, False)),
        ("RGB", "JPEG", SIDEWAYS, (64, 96, False)),
        ("RGBA", "PNG", None, (96, 64, True)),
        ("RGBA", "WEBP", SIDEWAYS, (64, 96, True)),
        ("L", "PNG", None, (96, 64, False)),
    ]:
        facts = examine("image", picture(mode=mode, kind=kind, **({} if exif is None else {"exif": exif})))
        assert (facts.width, facts.height, facts.has_alpha) == expected


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damage_of_any_kind_is_a_refusal(kind):
    draw = random.Random(kind)
    whole = picture((24, 16), kind=kind, exif=SIDEWAYS)
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        with contextlib.suppress(InvalidInput):
            examine("image", bytes(damaged[: draw.randint(1, len(damaged))] if draw.random() < 0.3 else damaged))


# ---- models that take none -----------------------------------------------------------------------------------------


def test_a_model_without_image_input_says_so_and_asks_no_address(start, fake, web):
    gateway = start(allow_private_urls=True)
    sent = [
        ({"files": {"image": file(picture())}}, "image"),
        ({"files": {"image[]": file(picture()), "mask": OVERLAY}}, "image"),
        ({"data": {"url": f"{web.url}/one"}}, "url"),
        ({"data": {"image": data_url(picture())}}, "image"),
    ]
    for body, field in sent:
        answer = gateway.http.post(PATH, data=FIELDS | body.get("data", {}), files=body.get("files"))
        assert refusal(answer) == (400, field, "image_input_not_supported")
    assert web.asked == kept(gateway) == fake.submitted == []


def test_the_sdk_hears_it(gateway):
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=[picture((16, 16)), picture((16, 16))], prompt="a")
    assert (refused.value.code, refused.value.param) == ("image_input_not_supported", "image")


# ---- input_reference -----------------------------------------------------------------------------------------------

REFERENCES = [
    {"files": {"prompt": (None, "a"), "input_reference": file(picture())}},
    {"files": {"prompt": (None, "a"), "input_reference[image_url]": (None, data_url(picture()))}},
    {"files": {"prompt": (None, "a"), "extra_body[input_reference][image_url]": (None, data_url(picture()))}},
    {"json": {"prompt": "a", "input_reference": {"image_url": data_url(picture())}}},
    {"json": {"prompt": "a", "input_reference": data_url(picture())}},
    {"json": {"prompt": "a", "extra_body": {"input_reference": {"image_url": data_url(picture())}}}},
]


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync"])
def test_a_text_to_video_model_takes_no_reference(gateway, fake, path):
    for body in REFERENCES:
        answer = gateway.http.post(path, **body)
        assert refusal(answer) == (400, "input_reference", "image_input_not_supported")
    for value, code in [
        ({"image_url": data_url(b"no")}, "invalid_image"),
        ({"file_id": "file-1"}, "unsupported_value"),
        ([data_url(picture())], "invalid_value"),
        ("cat.png", "invalid_url"),
    ]:
        answer = gateway.http.post(path, json={"prompt": "a", "input_reference": value})
        assert refusal(answer) == (400, "input_reference", code)
    assert fake.submitted == kept(gateway) == []


def test_a_reference_reaches_the_mesh_also_after_a_restart_and_in_a_remix(taking, fake, start):
    for body in REFERENCES:
        answer = taking.http.post("/v1/videos", **body)
        assert answer.status_code == 200
        taking.wait(answer.json()["id"])
    fake.held = {"denoise:1"}
    held = taking.http.post("/v1/videos", **REFERENCES[0]).json()["id"]
    fake.wait_for("denoise:1")
    taking.close()
    fake.release()
    again = start()
    again.wait(held)
    answer = again.http.post(f"/v1/videos/{held}/remix", json={"prompt": "b"})
    again.wait(answer.json()["id"])
    assert len(fake.submitted) == len(REFERENCES) + 3
    for request in fake.submitted:
        assert_kept(request.images, picture())
