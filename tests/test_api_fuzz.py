"""The API under random requests: its own description against what it does, and bodies that no client would send.

Nothing may answer 5xx, hang, or leave a job, a task or a file behind.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served import eventually

from runtime.apikeys import line_for

SETTINGS = Path(__file__).parent / "data" / "schemathesis.toml"
SECRET = "fm-of-the-fuzzer"
SECONDS = os.environ.get("FUZZ_SECONDS", "12")
"""Of the examination at length; `FUZZ_SECONDS=600 make test ARGS=tests/test_api_fuzz.py` takes its time."""
SMALL = {"max_pixels": 96 * 64 * 17, "max_queue": 10_000}
"""Random sizes would keep the encoders busy for minutes."""


@pytest.fixture(autouse=True)
def quiet():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
def schemathesis(start, tmp_path, request):
    """A function that has the API examined and returns what was found."""
    gateway = start(**SMALL, **getattr(request, "param", {}))

    def examine(*words, **environment):
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(SETTINGS), "run"]
        place = [f"{gateway.url}/openapi.json", "--no-color", "--seed", "7", *words]
        return subprocess.run(
            [*command, *place], check=False, capture_output=True, text=True, timeout=int(SECONDS) + 240, cwd=tmp_path
        )

    yield examine
    gateway.http.headers["authorization"] = f"Bearer {SECRET}"
    calm(gateway)


def calm(gateway):
    """Every job ends, and nothing is left of it but its row and its file."""
    jobs = []
    eventually(lambda: not gateway.call(lambda: [*gateway.runner.under_way()]), 60)
    eventually(lambda: not [name for name in gateway.tasks() if name.startswith(("video_", "image_"))])
    page: dict = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {"after": page["last_id"]} if page["last_id"] else {}
        page = gateway.http.get("/v1/videos", params={"limit": 100, **after}).json()
        jobs.extend(page["data"])
    known = {video["id"]: video["status"] for video in jobs}
    assert set(known.values()) <= {"completed", "failed", "cancelled"}
    kept = {path.name.partition(".")[0] for path in gateway.videos.iterdir()}
    assert kept == {video for video, status in known.items() if status == "completed"}
    assert gateway.create()


def test_the_api_does_what_its_description_says(schemathesis):
    found = schemathesis("--max-time", "8")
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(int(SECONDS) + 300)
@pytest.mark.parametrize("schemathesis", [{}, {"api_keys": (line_for("me", SECRET),)}], indirect=True)
def test_the_api_does_what_its_description_says_at_length(schemathesis):
    found = schemathesis("--max-time", SECONDS, "--header", f"Authorization: Bearer {SECRET}")
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


# ---- forms -------------------------------------------------------------------------------------------------------

NAMES = [
    *("prompt", "seed", "size", "n", "model", "num_frames", "seconds", "user", "quality", "image", "mask"),
    *("image[]", "input_reference", "input_reference[image_url]", "extra_body[seed]", "extra_body", "extra_params"),
    *(
        "",
        "[]",
        "[",
        "]",
        "a[b][c][d]",
        "a[][b]",
        "a[[b]]",
        "prompt[",
        "prompt[]",
        "prompt[x]",
        "__proto__",
        "a" * 5000,
    ),
    *("se\x00ed", "s\udceed", "\u202e", "%00", '"', "a\nb"),
]
VALUES = [
    *(b"", b"a cat", b"1", b"-1", b"true", b"null", b"nan", b"96x64", b"1e999", b"9" * 400, b"\x00", b"\xff\xfe"),
    *(b'{"seed": 1}', b"{", b"[" * 3000, b'"\\ud800"', b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"),
    *(b"data:image/png;base64,!", b"http://127.0.0.1/", b"file:///etc/passwd", b"\r\n--x--\r\n", b"x" * 30_000),
]
HEADERS = [
    *(b"", b"; filename=a.png", b'; filename="../../a"', b"; filename*=utf-8''%ff", b'; filename=""'),
    b'; name="seed"',
]
KINDS = [
    *(b"", b"content-type: image/png\r\n", b"content-type: text/plain; charset=utf-16\r\n"),
    b"content-type: \xff\r\n",
]
ENDS = [b"--x--\r\n", b"", b"--x", b"--y--\r\n", b"--x--", b"--x--\r\n" * 3]
BOUNDARIES = ["x", "x", "x", "x", "y", "", "x" * 300, '"x"', "x; boundary=y", "\xe4"]

part = st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES), st.sampled_from(HEADERS), st.sampled_from(KINDS))
broken = st.tuples(st.integers(0, 400), st.integers(0, 60), st.binary(max_size=20))


def form(parts, end, damage):
    sent = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="' + name.encode("utf-8", "surrogateescape") + b'"' + more
        + b"\r\n" + kind + b"\r\n" + value + b"\r\n"
        for name, value, more, kind in parts
    ) + end  # fmt: skip
    if damage is not None:
        place, length, instead = damage
        sent = sent[:place] + instead + sent[place + length :]
    return sent


def form_routes(gateway):
    """Every route that takes a form, with a real id in its path."""
    paths = gateway.http.get("/openapi.json").json()["paths"]
    video = gateway.create()
    return [
        path.replace("{video_id}", video)
        for path, operations in paths.items()
        if "multipart/form-data" in operations.get("post", {}).get("requestBody", {}).get("content", {})
    ]


@pytest.mark.parametrize("examples", [60, pytest.param(500, marks=pytest.mark.slow)], ids=["short", "long"])
def test_no_form_is_too_broken(start, examples):
    gateway = start(**SMALL)
    routes = form_routes(gateway)
    assert "/v1/videos" in routes
    seen = set()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        route=st.sampled_from(routes),
        good=st.booleans(),
        parts=st.lists(part, max_size=6),
        end=st.sampled_from(ENDS),
        boundary=st.sampled_from(BOUNDARIES),
        damage=st.none() | broken,
    )
    def send(route, good, parts, end, boundary, damage):
        start = [("prompt", b"a cat", b"", b""), ("num_inference_steps", b"2", b"", b"")] if good else []
        kind = f"multipart/form-data; boundary={boundary}".encode("latin-1")
        answer = gateway.http.post(route, content=form([*start, *parts], end, damage), headers={"content-type": kind})
        seen.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        assert answer.headers["x-request-id"]
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    send()
    assert seen >= {200, 400}, "a fuzzer that is always refused shows nothing"
    calm(gateway)


def test_a_form_that_never_ends_leaves_nothing(start, quiet):
    gateway = start(**SMALL)
    port = int(gateway.url.rpartition(":")[2])
    head = "host: x\r\ncontent-type: multipart/form-data; boundary=x\r\ncontent-length: 5000\r\n\r\n"
    part = '--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    for route in form_routes(gateway):
        for sent in ("", part, part + "a" * 1000):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(f"POST {route} HTTP/1.1\r\n{head}{sent}".encode())
    calm(gateway)
    sent = 3 * len(form_routes(gateway))
    eventually(lambda: sum(entry["event"].startswith("a client left") for entry in quiet) == sent)
    assert not [entry for entry in quiet if entry["log_level"] == "error"]


def test_hundreds_of_parts_are_refused_and_not_kept(start):
    gateway = start(**SMALL)
    many = [("file", (f"{number}.png", b"x" * 100)) for number in range(300)]
    for route in form_routes(gateway):
        assert 400 <= gateway.http.post(route, files=many).status_code < 500
        fields = {f"field{number}": "x" for number in range(500)}
        assert 400 <= gateway.http.post(route, data=fields).status_code < 500
    calm(gateway)
