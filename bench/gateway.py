"""What the gateway itself costs: a real gateway process over a mesh without a model (`bench.standin`).

Open loop: requests leave at their Poisson times whether or not earlier ones were answered, so that a stall is not left
out. The client is a bare HTTP/1.1 one on asyncio; its own time is in every figure. Three processes share the cores.

Predicted, on two cores of 2.5 GHz: a submission is a pydantic check (0.2 ms), one tokenization in a thread (0.3 ms),
one SQLite transaction (0.3 ms) and a ZMQ message, 2 ms in all with the event loop's queueing at 100/s; a 64x64 chunk is
encoded in 3 ms, so its fragment is at a client within 10 ms; an event to 500 readers is 500 writes of 60 microseconds,
30 ms to the last.

Found: 5 ms at p50 and 26 ms at p99 for a submission: the file of a job that ends is synced, and what SQLite writes then
waits for the same disk; on a disk in memory p99 is a third lower. The readers are as predicted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.report import machine, save, spread
from bench.soak import Sample, look, slope_within_lives
from bench.standin import MODEL_FOLDER
from runtime.config import Config, save_frozen

STEPS = 4
SMALL = {
    "prompt": "a red circle moving right",
    "num_inference_steps": STEPS,
    "num_frames": 5,
    "size": "64x64",
    "seed": 1,
}
READERS = 500
WIDE = {"num_frames": 81, "size": "832x480"}
"""The frame path is measured at the size that people use."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gateway", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of submissions at each rate")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load while memory is watched")
    parser.add_argument("--rate", type=float, default=100.0, help="submissions per second")
    args = parser.parse_args()
    where = machine()
    figures: dict[str, Any] = {"wanted": {"submit_p99_ms": 10, "chunk_to_client_ms": 50}}
    for measure, *flags in (
        (submissions, "--at-once", "2"),
        (whole_jobs,),
        (many_readers, "--step-ms", "100", "--chunk-ms", "400"),
        (frame_path,),
        (soak,),
    ):
        with tempfile.TemporaryDirectory(prefix="fmgw") as folder, served(Path(folder), *flags) as under_test:
            figures |= asyncio.run(measured(measure, under_test, args))
    save("gateway", where, figures)


async def measured(measure: Measure, server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """One of the measurements on a gateway that is warm."""
    for _ in range(3):
        await finished_video(server)
    return await measure(server, args)


async def submissions(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Jobs come much faster than the mesh makes them, and wait in line."""
    health = await open_loop(server, args.rate, args.seconds / 3, ("GET", "/health/live", None))
    submit = await open_loop(server, args.rate, args.seconds, ("POST", "/v1/videos", SMALL))
    most = await closed_loop(server, 16, args.seconds / 3, ("POST", "/v1/videos", SMALL))
    return {"health_ms": health, "submit_ms": submit, "submit_per_s": most}


async def whole_jobs(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """As many jobs as the gateway can encode and store; then how fast a chunk of a lone one is at its client."""
    most = await closed_loop(server, 16, args.seconds / 3, ("POST", "/v1/videos", SMALL))
    await drained(server)
    return {"jobs_per_s": most, "chunk_to_client_ms": await chunk_to_client(server, 40)}


# ---- the processes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    host: str
    port: int
    gateway: psutil.Process
    sent: Path
    """Where the stand-in notes when each chunk left."""

    def sent_at(self) -> dict[tuple[str, int], float]:
        lines = (line.split() for line in self.sent.read_text().splitlines())
        return {(request, int(first)): float(at) for request, first, at in lines}


@contextlib.contextmanager
def served(folder: Path, *flags: str) -> Iterator[Server]:
    """A stand-in with such flags and a gateway over it."""
    sent, scheduler = folder / "sent", f"ipc://{folder}/scheduler"
    config = Config(port=0, output_path=str(folder / "outputs"), log_level="warning", max_queue=0)
    save_frozen(config, folder / "config.json")
    places = ("--bind", scheduler, "--sent", str(sent))
    standin = subprocess.Popen([sys.executable, "-m", "bench.standin", *places, *flags])
    words = ("--config", str(folder / "config.json"), "--model-folder", str(MODEL_FOLDER), "--scheduler", scheduler)
    gateway = subprocess.Popen(
        [sys.executable, "-m", "gateway", *words, "--frames", f"ipc://{folder}/frames"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert gateway.stdout is not None
        url = json.loads(gateway.stdout.readline())["url"]
        host, _, port = url.removeprefix("http://").rpartition(":")
        yield Server(host, int(port), psutil.Process(gateway.pid), sent)
    finally:
        for process in (gateway, standin):
            process.kill()
            process.wait()


# ---- a client ----------------------------------------------------------------------------------------------------


class Connection:
    """One kept-alive HTTP/1.1 connection; one call at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, server: Server) -> Connection:
        return cls(*await asyncio.open_connection(server.host, server.port, limit=1 << 22))

    def close(self) -> None:
        self._writer.close()

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of the answer, which must be a success."""
        status, length = await self.begin(method, path, body)
        answer = await self._reader.readexactly(length)
        assert status == 200, answer
        return json.loads(answer)

    async def begin(self, method: str, path: str, body: object = None) -> tuple[int, int]:
        """(status, length of the body or 0 if it is chunked); the body is still to be read."""
        payload = b"" if body is None else json.dumps(body).encode()
        headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + payload)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        lengths = [line.partition(":")[2] for line in lines if line.startswith("content-length:")]
        return int(lines[0].split()[1]), int(lengths[0]) if lengths else 0

    async def chunks(self) -> AsyncIterator[bytes]:
        """A chunked body, piece by piece as the server wrote it."""
        while size := int(await self._reader.readline(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """Server-sent events of a chunked body."""
        rest = b""
        async for piece in self.chunks():
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in whole:
                fields = dict(line.split(": ", 1) for line in event.decode().splitlines() if ": " in line)
                if "event" in fields:
                    yield fields["event"], json.loads(fields["data"])


FRESH_S = 3.0
"""The server closes a connection that was idle for 5 s."""


class Connections:
    """Idle connections, and new ones when there is none."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._idle: list[tuple[float, Connection]] = []
        """With the time at which each was used last, the latest at the end."""

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        if self._idle and self._idle[-1][0] < time.monotonic() - FRESH_S:
            self.close()
        connection = self._idle.pop()[1] if self._idle else await Connection.open(self._server)
        answer = await connection.ask(method, path, body)
        self._idle.append((time.monotonic(), connection))
        return answer

    def close(self) -> None:
        for _, connection in self._idle:
            connection.close()
        self._idle.clear()


# ---- what is measured --------------------------------------------------------------------------------------------

Call = tuple[str, str, object]
Measure = Callable[["Server", argparse.Namespace], Awaitable[dict[str, Any]]]


async def open_loop(server: Server, rate: float, seconds: float, call: Call) -> dict[str, float]:
    """Milliseconds from the moment at which a call was due to its whole answer."""
    client, taken, random_ = Connections(server), list[float](), random.Random(0)

    async def one(due: float) -> None:
        await client.ask(*call)
        taken.append(1000 * (time.monotonic() - due))

    began = due = time.monotonic()
    async with asyncio.TaskGroup() as group:
        while due < began + seconds:
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            group.create_task(one(due))
            due += random_.expovariate(rate)
    client.close()
    return with_p99(taken) | {"per_s": len(taken) / seconds}


async def closed_loop(server: Server, connections: int, seconds: float, call: Call) -> float:
    """Calls per second of so many clients that ask again at once."""
    until, count = time.monotonic() + seconds, 0

    async def one() -> None:
        nonlocal count
        connection = await Connection.open(server)
        while time.monotonic() < until:
            await connection.ask(*call)
            count += 1
        connection.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return count / seconds


async def finished_video(server: Server, **changes: object) -> str:
    connection = await Connection.open(server)
    video_id: str = (await connection.ask("POST", "/v1/videos", SMALL | changes))["id"]
    await connection.begin("GET", f"/v1/videos/{video_id}/events")
    async for name, data in connection.events():
        assert name != "error", data
    connection.close()
    return video_id


async def drained(server: Server) -> None:
    """Until nothing that was submitted runs any more."""
    client = Connections(server)
    while (await client.ask("GET", "/v1/videos?limit=1"))["data"][0]["status"] != "completed":  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    client.close()


async def chunk_to_client(server: Server, count: int) -> dict[str, Any]:
    """Milliseconds from the moment at which a chunk left the worker to its fragment, or its event, at the client."""
    fragments, events = list[float](), list[float]()
    for _ in range(count):
        connection = await Connection.open(server)
        video_id = (await connection.ask("POST", "/v1/videos", SMALL | {"num_frames": 17}))["id"]
        arrived, told = await asyncio.gather(_fragments(server, video_id), _frames_events(server, video_id))
        connection.close()
        left = server.sent_at()
        firsts = sorted(first for request, first in left if request == video_id)
        assert len(arrived) == len(firsts), f"{len(arrived)} fragments of {len(firsts)} chunks"
        fragments += [1000 * (at - left[video_id, first]) for at, first in zip(arrived, firsts, strict=True)]
        events += [1000 * (at - left[video_id, first]) for first, at in told]
    return {"stream_mp4": with_p99(fragments), "event": with_p99(events)}


async def _fragments(server: Server, video_id: str) -> list[float]:
    """When each fragment of /stream.mp4 was there in full."""
    connection, data, times = await Connection.open(server), b"", list[float]()
    await connection.begin("GET", f"/v1/videos/{video_id}/stream.mp4")
    async for piece in connection.chunks():
        data += piece
        times += [time.monotonic()] * (_whole_fragments(data) - len(times))
    connection.close()
    return times


def _whole_fragments(data: bytes) -> int:
    """moof boxes whose mdat is complete."""
    start = count = 0
    while start + 8 <= len(data):
        end = start + int.from_bytes(data[start : start + 4], "big")
        count += data[start + 4 : start + 8] == b"mdat" and end <= len(data)
        start = end
    return count


async def _frames_events(server: Server, video_id: str) -> list[tuple[int, float]]:
    connection = await Connection.open(server)
    await connection.begin("GET", f"/v1/videos/{video_id}/events")
    told = [(data["first"], time.monotonic()) async for name, data in connection.events() if name == "frames"]
    connection.close()
    return told


async def many_readers(server: Server, _args: argparse.Namespace) -> dict[str, Any]:
    """READERS connections follow one job: from a chunk's departure to its event at each of them."""
    connection = await Connection.open(server)
    slow = SMALL | {"num_frames": 81, "num_inference_steps": 100}
    video_id = (await connection.ask("POST", "/v1/videos", slow))["id"]
    cpu = sum(server.gateway.cpu_times()[:2])
    began = time.monotonic()
    told = await asyncio.gather(*(_frames_events(server, video_id) for _ in range(READERS)))
    seconds = time.monotonic() - began
    left = server.sent_at()
    assert all(len(events) == len(told[0]) for events in told)
    lags = [1000 * (at - left[video_id, first]) for events in told for first, at in events]
    core = (sum(server.gateway.cpu_times()[:2]) - cpu) / seconds
    connection.close()
    figures = {"readers": READERS, "frames_events": len(told[0]), "lag_ms": with_p99(lags), "gateway_cores": core}
    return {"many_readers": figures}


async def frame_path(server: Server, _args: argparse.Namespace) -> dict[str, Any]:
    """Raw pixels per second from the worker's socket into a finished file, at 832x480, encoding included."""
    rates, pixels = [], 81 * 832 * 480 * 3
    for _ in range(3):
        video_id = await finished_video(server, **WIDE)
        left = [at for (request, _), at in server.sent_at().items() if request == video_id]
        rates.append(pixels / 1e6 / (time.monotonic() - min(left)))
    frames = [rate * 1e6 / (832 * 480 * 3) for rate in rates]
    return {"frame_path": {"mb_per_s": spread(rates), "frames_per_s": spread(frames)}}


async def soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Memory and open files of the gateway under a constant load of whole jobs."""
    seconds, rate = args.minutes * 60, args.rate / 4
    samples, stop = list[Sample](), asyncio.Event()

    async def watch() -> None:
        began = time.monotonic()
        while not stop.is_set():
            samples.append(look(time.monotonic() - began, "gateway", server.gateway))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 5.0)

    watching = asyncio.create_task(watch())
    latency = await open_loop(server, rate, seconds, ("POST", "/v1/videos", SMALL))
    stop.set()
    await watching
    await drained(server)
    slope = slope_within_lives(samples)
    figures = {
        "minutes": args.minutes,
        "jobs_per_s": rate,
        "submit_ms": latency,
        "rss_mib": spread([s.rss_mib for s in samples]),
        "rss_mib_per_hour": None if slope is None else slope[0],
        "rss_mib_per_hour_95": None if slope is None else slope[1],
        "files": spread([s.files for s in samples]),
    }
    return {"soak": figures}


def with_p99(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return spread(ordered) | {"p99": ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)]}


if __name__ == "__main__":
    main()
