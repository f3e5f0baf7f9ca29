"""The official SDK, unmodified, against a live mesh with the demo model: the newest 3.x and the last line before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sdk_calls import CALLS
from served import ServerProcess

TESTS = Path(__file__).parent
OLD_LINE = Path(sys.prefix) / "openai-2.8"
LINES = {"3": None, "2": OLD_LINE}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    short, before = tempfile.mkdtemp(prefix="fm"), os.environ.get("TMPDIR")
    os.environ["TMPDIR"], tempfile.tempdir = short, None
    server = ServerProcess(tmp_path_factory.mktemp("server"), "--num-gpus", "1")
    try:
        yield server.wait_ready()
    finally:
        server.kill()
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)
        tempfile.tempdir = None


@pytest.fixture(scope="module")
def results(server):
    """SDK line -> what each call said."""
    return {line: run(server.url, path) for line, path in LINES.items()}


def run(url: str, path: Path | None) -> dict:
    assert path is None or path.is_dir(), f"`make test` puts the older SDK into {path}"
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    done = subprocess.run(
        [sys.executable, "-P", str(TESTS / "sdk_calls.py"), url],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", LINES)
def test_the_line_is_the_one_that_is_meant(results, line):
    assert results[line]["version"].startswith(f"{line}.")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("line", LINES)
def test_a_call_works_unmodified(results, line, name):
    assert results[line]["results"][name] == "", results[line]["results"][name]
