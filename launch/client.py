"""The SDK's HTTP client: a running framemesh server as a Python object. Needs no torch and starts nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2 as httpx
import msgspec

from runtime.errors import FramemeshError, InvalidInput
from runtime.sampling import SamplingParams

RECONNECT_S = 30.0
"""How long a server that was lost while it told events may take to come back."""
RETRY_S = 0.25
ENDINGS = ("done", "error")


class Client:
    """Videos over HTTP: `create`, `events`, `retrieve`, `download`, `cancel`; pictures: `create_image`."""

    def __init__(self, base_url: str = "http://127.0.0.1:30000", api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, timeout=httpx.Timeout(60.0, read=None))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def create(
        self, params: SamplingParams, *, priority: int | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """Queue one video; the answer is the Video object. After `timeout` seconds it is no longer wanted.

        Raises:
            InvalidInput: the server refused a field.
        """
        words = asdict(params) | {"priority": priority, "timeout": timeout}
        body = {name: value for name, value in words.items() if value is not None}
        return self._json("POST", "/v1/videos", json=body)

    def create_image(
        self,
        params: SamplingParams,
        *,
        output_format: str = "png",
        priority: int | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Make one picture and wait for it: `b64_json`, `seed`, `timings`.

        Raises:
            InvalidInput: the server refused a field.
        """
        words = asdict(params) | {"priority": priority, "timeout": timeout, "output_format": output_format}
        # A picture has neither; 1 is what they are once everything is resolved.
        body = {
            name: value
            for name, value in words.items()
            if value is not None and not (name in {"num_frames", "fps"} and value == 1)
        }
        made: dict[str, Any] = self._json("POST", "/v1/images/generations", json=body)["data"][0]
        return made

    def task_type(self) -> str:
        """What the served model makes of what: T2V, T2I …"""
        kind: str = self._json("GET", "/models")["task_type"]
        return kind

    def retrieve(self, video_id: str) -> dict[str, Any]:
        return self._json("GET", f"/v1/videos/{video_id}")

    def cancel(self, video_id: str) -> dict[str, Any]:
        return self._json("POST", f"/v1/videos/{video_id}/cancel")

    def events(self, video_id: str, *, jpeg: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, data) of queued, stage, step, frames … until done or error.

        A lost connection is made again, and goes on where it broke off; a server that was itself started again tells
        the job's second life from its beginning.
        """
        last, lost = "", 0.0
        while True:
            try:
                for event_id, name, data in self._listen(video_id, jpeg, last):
                    last, lost = event_id, 0.0
                    yield name, data
                    if name in ENDINGS:
                        return
            except httpx.TransportError:
                lost = lost or time.monotonic()
                if self._http.is_closed or time.monotonic() - lost > RECONNECT_S:
                    raise
            time.sleep(RETRY_S)

    def _listen(self, video_id: str, jpeg: bool, last: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(id, name, data) of what follows the event with the id `last`, until the connection ends."""
        query = {"frames": "jpeg"} if jpeg else {}
        headers = {"Last-Event-ID": last} if last else {}
        with self._http.stream("GET", f"/v1/videos/{video_id}/events", params=query, headers=headers) as response:
            if response.is_error:
                response.read()
                raise _error(response)
            event = {"id": last}
            for line in response.iter_lines():
                field, _, value = line.partition(": ")
                if field:
                    event[field] = value
                elif "data" in event:
                    # An empty line ends an event; half of one was cut off with the connection.
                    yield event["id"], event["event"], msgspec.json.decode(event["data"])
                    event = {"id": event["id"]}

    def download(self, video_id: str, target: Path) -> None:
        """Write the finished MP4."""
        with self._http.stream("GET", f"/v1/videos/{video_id}/content") as response:
            if response.is_error:
                response.read()
                raise _error(response)
            with target.open("wb") as file:
                for block in response.iter_bytes():
                    file.write(block)

    def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        response = self._http.request(method, path, **arguments)
        if response.is_error:
            raise _error(response)
        body: dict[str, Any] = msgspec.json.decode(response.content)
        return body


def _error(response: httpx.Response) -> FramemeshError:
    """The server's error object as one of our exceptions."""
    try:
        error = msgspec.json.decode(response.content)["error"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return FramemeshError(f"HTTP {response.status_code}: {response.text[:200]}")
    if response.status_code == 400 and error.get("param"):
        return InvalidInput(error["param"], error["message"].removeprefix(f"{error['param']}: "))
    return FramemeshError(f"HTTP {response.status_code}: {error.get('message')}")
