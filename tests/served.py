"""Servers for tests: the HTTP edge in a thread over a fake mesh, and `framemesh serve` with all its processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import psutil
import uvicorn
from fake_mesh import FakeMesh

from gateway.__main__ import listen, store_url
from gateway.app import create_app
from gateway.catalog import Catalog, Model
from gateway.http1 import Http
from gateway.jobs.runner import JobRunner
from gateway.jobs.store import JobStore
from gateway.media.mp4 import read_frames
from gateway.mesh import Mesh
from gateway.replicas import Replicas
from launch.process import child_environment
from runtime.config import Config

ROLES = {"scheduler": "runtime", "workers": "torch.distributed.run", "gateway": "gateway", "rank": "workers"}
"""Process -> the module that it runs."""
BODY = {"prompt": "a red square moves right", "num_inference_steps": 4}


class Gateway:
    """The app in a uvicorn of its own, in a thread: `http` talks to it, `call` runs something in its loop."""

    def __init__(self, fake: FakeMesh, folder: Path, max_body_bytes: int = 100_000, **config) -> None:
        self.config = Config(output_path=str(folder), host="127.0.0.1", port=0, **config)
        self.fake = fake
        self.videos = folder / "videos"
        self._max_body_bytes = max_body_bytes
        self._listening = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._started = threading.Event()
        self._thread.start()
        assert self._started.wait(10)
        self.http = httpx2.Client(base_url=self.url, timeout=10)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        catalog = self._catalog()
        store = JobStore(store_url(self.config), lease_s=self.config.job_lease)
        self.app = create_app(self.config, catalog, store, max_body_bytes=self._max_body_bytes)
        settings = uvicorn.Config(self.app, http=Http, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(settings)
        self._loop.call_soon(self._started.set)
        await self._server.serve([self._listening])

    def _catalog(self) -> Catalog:
        replicas, aliases = Replicas([self._connect(self.fake)]), self.config.served_model_name[1:]
        model = Model(self.config.model_name, self.fake.card, replicas, aliases)
        return Catalog([model], allow_any=self.config.allow_any_model)

    def _connect(self, fake: FakeMesh) -> Mesh:
        frames = f"ipc://{fake.folder}/frames{id(self)}"
        return Mesh(fake.endpoint, frames, batching_delay_s=self.config.batching_delay_ms / 1000)

    @property
    def mesh(self) -> Mesh:
        """The only one, or the first."""
        return self.app.state.services.catalog.default.mesh.meshes[0]

    @property
    def runner(self) -> JobRunner:
        return self.app.state.services.runner

    def close(self) -> None:
        self.http.close()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def call(self, work):
        async def main():
            return work()

        return asyncio.run_coroutine_threadsafe(main(), self._loop).result(5)

    def await_(self, work):
        """What a coroutine of the gateway's comes to."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(5)

    def tasks(self) -> set[str]:
        return self.call(lambda: {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}})

    def create(self, **changes) -> str:
        answer = self.http.post("/v1/videos", json=BODY | changes)
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def video(self, video_id: str) -> dict:
        return self.http.get(f"/v1/videos/{video_id}").raise_for_status().json()

    def wait(self, video_id: str, status: str = "completed") -> dict:
        eventually(lambda: self.video(video_id)["status"] == status)
        return self.video(video_id)

    def events(self, video_id: str, last: str | None = None, **query) -> list[tuple[str, str, dict]]:
        with self.follow(video_id, last, **query) as events:
            return list(events)

    @contextlib.contextmanager
    def follow(self, video_id: str, last: str | None = None, **query):
        headers = {} if last is None else {"Last-Event-ID": last}
        with self.http.stream("GET", f"/v1/videos/{video_id}/events", params=query, headers=headers) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            yield parse_events(response.iter_lines())


def parse_events(lines):
    """(id, name, data) of each server-sent event."""
    event = {"id": ""}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
        elif "event" in event:
            yield event["id"], event["event"], json.loads(event["data"])
            event = {"id": ""}


def eventually(condition, patience_s: float = 10) -> None:
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until, f"not within {patience_s} s"
        time.sleep(0.01)


def names(events) -> list[str]:
    return [name for _, name, _ in events]


class ServerProcess:
    """`framemesh serve` with every process that it starts, and what one asks of it over HTTP."""

    def __init__(self, folder: Path, *flags: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = folder / "outputs"
        self._log = folder / "stderr.log"
        command = [sys.executable, "-P", "-m", "launch", "serve", "--port", "0", "--output-path", str(self.outputs)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *flags], env=child_environment({}), stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.everything: list[psutil.Process] = []
        self.http = httpx2.Client()

    def wait_ready(self) -> ServerProcess:
        line = self.process.stdout.readline()
        assert line.startswith("framemesh serves"), self.stderr
        self.url = line.split()[-1]
        self.http.base_url, self.http.timeout = self.url, 30
        self.remember()
        return self

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    def remember(self) -> None:
        """Processes that must be gone at the end."""
        self.everything += psutil.Process(self.process.pid).children(recursive=True)

    def find(self, role: str) -> psutil.Process | None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "-m" in command and command[command.index("-m") + 1] == ROLES[role]:
                    return process
        return None

    def find_another(self, role: str, than: psutil.Process) -> psutil.Process:
        """The process that took a dead one's place."""
        eventually(lambda: (found := self.find(role)) is not None and found != than, 40)
        self.remember()
        return self.find(role)

    def create(self, **changes) -> str:
        return self.http.post("/v1/videos", json=BODY | changes).raise_for_status().json()["id"]

    def video(self, video_id: str) -> dict:
        return self.http.get(f"/v1/videos/{video_id}").raise_for_status().json()

    @contextlib.contextmanager
    def follow(self, video_id: str):
        with self.http.stream("GET", f"/v1/videos/{video_id}/events") as response:
            assert response.status_code == 200
            yield parse_events(response.iter_lines())

    def until(self, video_id: str, name: str, **data) -> None:
        """Until an event came, or one beyond it."""
        with self.follow(video_id) as events:
            for _, seen, told in events:
                if seen == name and all(told.get(key, -1) >= value for key, value in data.items()):
                    return
                assert seen not in {"done", "error"}, told
        raise AssertionError(f"the events of {video_id} ended before {name}")

    def result(self, video_id: str, patience_s: float = 60) -> dict:
        """The video once it ended, whoever answers meanwhile."""

        def ended() -> bool:
            with contextlib.suppress(httpx2.TransportError):
                return self.video(video_id)["status"] not in {"queued", "in_progress"}
            return False

        eventually(ended, patience_s)
        return self.video(video_id)

    def frames(self, video_id: str):
        return read_frames(self.outputs / "videos" / f"{video_id}.mp4")

    def end(self, number: int = 0, patience_s: float = 30) -> int:
        """The exit code; nothing may be left behind."""
        if number:
            self.process.send_signal(number)
        code = self.process.wait(patience_s)
        _, alive = psutil.wait_procs(self.everything, timeout=5)
        assert not alive, f"left behind: {[(p.pid, p.cmdline()) for p in alive]}"
        return code

    def kill(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.communicate()
