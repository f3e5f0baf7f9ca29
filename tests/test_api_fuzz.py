"""The API under random requests: its own description against what it does, and bodies that no client would send.

Nothing may answer 5xx, hang, or leave a job, a task or a file behind.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import structlog
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served import BODY, eventually

SETTINGS = Path(__file__).parent / "data" / "schemathesis.toml"
SMALL = {"max_pixels": 96 * 64 * 17, "max_queue": 10_000}
"""Random sizes would keep the encoders busy for minutes."""


@pytest.fixture(autouse=True)
def quiet():
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
def schemathesis(start, tmp_path):
    """A function that has the API examined and returns what was found."""
    gateway = start(**SMALL)

    def examine(*words, **environment):
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(SETTINGS), "run"]
        place = [f"{gateway.url}/openapi.json", "--no-color", "--seed", "7", *words]
        return subprocess.run([*command, *place], capture_output=True, text=True, timeout=300, cwd=tmp_path)

    yield examine
    calm(gateway)


def calm(gateway):
    """Every job ends, and nothing is left of it but its row and its file."""
    jobs = []
    eventually(lambda: not gateway.call(lambda: [*gateway.runner.under_way()]), 60)
    eventually(lambda: not [name for name in gateway.tasks() if name.startswith(("video_", "image_"))])
    after = None
    while after is None or jobs[-1]["has_more"]:
        jobs.append(gateway.http.get("/v1/videos", params={"limit": 100} | ({"after": after} if after else {})).json())
        after = jobs[-1]["last_id"]
    known = {video["id"]: video["status"] for page in jobs for video in page["data"]}
    assert set(known.values()) <= {"completed", "failed", "cancelled"}
    kept = {path.name.partition(".")[0] for path in gateway.videos.iterdir()}
    assert kept == {video for video, status in known.items() if status == "completed"}
    assert gateway.create()


def test_the_api_does_what_its_description_says(schemathesis):
    found = schemathesis("--phases", "examples,coverage", "--max-examples", "1")
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]


@pytest.mark.slow
def test_the_api_does_what_its_description_says_at_length(schemathesis):
    found = schemathesis("--max-time", "60")
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
