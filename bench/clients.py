"""Clients of a server that may die under them: POST with an Idempotency-Key until it is answered, follow or poll to the
end, note every event with its time. Knows no processes."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

from bench.server import Stuck

RETRY_S = 0.1
POLL_S = 0.5
"""As a client would: a poll ten times a second by every waiting job is a load of its own."""
SILENCE_S = 10.0
"""A stream or an answer that takes longer is asked for again."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What one job asks for."""

    prompt: str
    steps: int
    frames: int = 17
    size: str = "64x64"
    guidance: float = 3.0
    seed: int = 1
    key: str = "a"
    """The API key that it comes with."""
    follow: bool = True
    """Through server-sent events; otherwise it is polled."""

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "num_inference_steps": self.steps,
            "num_frames": self.frames,
            "size": self.size,
            "guidance_scale": self.guidance,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Happening:
    """One server-sent event, or the end as polling sees it."""

    at: float
    job: Job
    name: str
    data: dict[str, Any]


@dataclass(eq=False)
class Job:
    """One accepted job as its client sees it."""

    spec: Spec
    idempotency_key: str = field(default_factory=lambda: secrets.token_hex(8))
    id: str = ""
    posts: int = 0
    """How often it was sent until it was answered."""
    video: dict[str, Any] | None = None
    """The Video object at its end."""
    content: bytes = b""
    problem: str = ""
    """What no server may do: forget a job, refuse it without a reason, tell frames twice."""


class Clients:
    """A thread per job; what happens to any of them can be waited for."""

    def __init__(self, url: str, patience_s: float) -> None:
        """`patience_s` is how long all of them together may take."""
        self.jobs: list[Job] = []
        self.happenings: list[Happening] = []
        self._changed = threading.Condition()
        self._give_up = time.monotonic() + patience_s
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.Client(base_url=url, timeout=SILENCE_S, limits=limits)
        self._threads: list[threading.Thread] = []

    def start(self, *specs: Spec) -> Clients:
        """Begin to ask for these."""
        for spec in specs:
            self.jobs.append(Job(spec))
            self._threads.append(threading.Thread(target=self._live, args=(self.jobs[-1],), daemon=True))
            self._threads[-1].start()
        return self

    def wait_for(self, name: str, fits: Callable[[dict[str, Any]], bool], patience_s: float) -> Happening:
        """The first event of that name that fits.

        Raises:
            Stuck: none came in time.
        """

        def first() -> Happening | None:
            return next((h for h in self.happenings if h.name == name and fits(h.data)), None)

        with self._changed:
            self._changed.wait_for(lambda: first() is not None, patience_s)
            found = first()
        if found is None:
            raise Stuck(f"no {name} event within {patience_s:.0f} s")
        return found

    @property
    def ended(self) -> int:
        """Jobs that wait for nothing any more."""
        return sum(not thread.is_alive() for thread in self._threads)

    def join(self) -> list[Job]:
        """Wait for every end; the jobs that have none."""
        for thread in self._threads:
            thread.join()
        self._http.close()
        return [job for job in self.jobs if job.video is None]

    def _live(self, job: Job) -> None:
        try:
            self._post(job)
            follow = self._follow if job.spec.follow else self._poll
            follow(job)
            job.video = self._ask("GET", f"/v1/videos/{job.id}").json()
            if job.video is not None and job.video["status"] == "completed":
                job.content = self._ask("GET", f"/v1/videos/{job.id}/content").content
        except (Stuck, httpx.HTTPStatusError) as error:
            job.problem = job.problem or str(error)

    def _post(self, job: Job) -> None:
        headers = {"Idempotency-Key": job.idempotency_key}
        job.id = self._ask("POST", "/v1/videos", job, json=job.spec.body, headers=headers).json()["id"]
        self._note(job, "accepted", {})

    def _ask(self, method: str, path: str, job: Job | None = None, **arguments: Any) -> httpx.Response:
        """The answer of whoever lives to give it; refusals that are worth a retry are tried again."""
        headers = {"Authorization": f"Bearer {job.spec.key}" if job is not None else "", **arguments.pop("headers", {})}
        while time.monotonic() < self._give_up:
            if job is not None:
                job.posts += 1
            try:
                answer = self._http.request(method, path, headers=headers, **arguments)
                if answer.status_code != 503:
                    return answer.raise_for_status()
            except httpx.TransportError:
                pass
            time.sleep(RETRY_S)
        raise Stuck(f"{method} {path} was not answered")

    def _poll(self, job: Job) -> None:
        while time.monotonic() < self._give_up:
            video = self._ask("GET", f"/v1/videos/{job.id}").json()
            if video["status"] not in {"queued", "in_progress"}:
                self._note(job, "done" if video["status"] == "completed" else "error", video)
                return
            time.sleep(POLL_S)
        raise Stuck(f"{job.id} did not end")

    def _follow(self, job: Job) -> None:
        """The events of a job over as many connections as it takes."""
        last, heard = "", _Order()
        while time.monotonic() < self._give_up:
            try:
                for event_id, name, data in self._events(job, last):
                    last = event_id or last
                    job.problem = job.problem or heard.check(event_id, name, data)
                    self._note(job, name, data)
                    if name in {"done", "error"}:
                        return
            except httpx.TransportError:
                time.sleep(RETRY_S)
        raise Stuck(f"{job.id} did not end")

    def _events(self, job: Job, last: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        headers = {"Last-Event-ID": last} if last else {}
        with self._http.stream("GET", f"/v1/videos/{job.id}/events", headers=headers) as answer:
            if answer.status_code == 200:
                yield from parse_events(answer.iter_lines())
            elif answer.status_code != 503:
                answer.raise_for_status()

    def _note(self, job: Job, name: str, data: dict[str, Any]) -> None:
        with self._changed:
            self.happenings.append(Happening(time.monotonic(), job, name, data))
            self._changed.notify_all()


class _Order:
    """Frames are told once and in order by each life of the gateway."""

    def __init__(self) -> None:
        self._life, self._next = "", 0

    def check(self, event_id: str, name: str, data: dict[str, Any]) -> str:
        if name != "frames" or not event_id:
            return ""
        life = event_id.partition("-")[0]
        if life != self._life:
            self._life, self._next = life, 0
        wanted, self._next = self._next, data["first"] + data["count"]
        return "" if data["first"] == wanted else f"frames from {data['first']} were told where {wanted} was next"


def parse_events(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, name, data) of each server-sent event."""
    event = {"id": ""}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
        elif "event" in event:
            yield event["id"], event["event"], json.loads(event["data"])
            event = {"id": ""}
