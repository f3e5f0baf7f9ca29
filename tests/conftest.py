"""Shared by all tests: one real 2-rank mesh per session (a start costs eight seconds), and gateways over a fake one."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import structlog

# Ranks and test processes share two cores: more threads than cores make everything slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts its background jobs with SIGINT ignored, and so would everything be that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_logging():
    """A process of ours that was played in-process logs to a stream which pytest closes behind it."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def mesh(tmp_path_factory):
    """A Generator over two ranks that share the demo model's tokens, which writes down its items."""
    from framemesh import Generator

    folder = tmp_path_factory.mktemp("mesh")
    # Holds for no machine, but as long as the ranks have not told their memory for every one.
    rules = folder / "rules.yaml"
    rules.write_text("- {max_batch_size: 1, device_memory_gb_min: 1000000}")
    written = {"trace_path": str(folder / "trace.jsonl"), "batching_config": str(rules)}
    with Generator.from_pretrained("demo", num_gpus=2, ulysses_degree=2, **written) as generator:
        yield generator


@pytest.fixture
def sockets():
    """Paths of Unix sockets are short; pytest's folders are not."""
    folder = Path(tempfile.mkdtemp(prefix="fm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def fake(sockets):
    from fake_mesh import FakeMesh

    fake = FakeMesh(sockets)
    yield fake
    fake.close()


@pytest.fixture
def start(fake, tmp_path):
    """A function that starts a gateway over the fake mesh; all of one test share the output folder."""
    from served import Gateway

    running = []

    def start(**changes):
        running.append(Gateway(fake, tmp_path, **changes))
        return running[-1]

    yield start
    for gateway in running:
        gateway.close()


@pytest.fixture
def gateway(start):
    return start()


@pytest.fixture
def short_tmp(monkeypatch):
    """A temporary folder of our own with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fm"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def serve(tmp_path, short_tmp):
    """A function that starts `framemesh serve`; all of one test share the output folder. Leaves no run folder."""
    from served import ServerProcess

    started = []

    def serve(*flags):
        started.append(ServerProcess(tmp_path / "server", *flags))
        return started[-1]

    yield serve
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def postgres():
    """A real PostgreSQL server."""
    from postgres import Postgres

    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """Of an empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite3"
    return request.getfixturevalue("postgres").database()
