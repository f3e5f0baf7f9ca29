"""The SDK's HTTP client: a running framemesh server as a Python object. Needs no torch and starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2 as httpx
import msgspec

from runtime.errors import FramemeshError, InvalidInput
from runtime.sampling import SamplingParams


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
        """(name, data) of queued, stage, step, frames … until done or error."""
        query = {"frames": "jpeg"} if jpeg else {}
        with self._http.stream("GET", f"/v1/videos/{video_id}/events", params=query) as response:
            if response.is_error:
                response.read()
                raise _error(response)
            name = ""
            for line in response.iter_lines():
                if line.startswith("event:"):
                    name = line.removeprefix("event:").strip()
                elif line.startswith("data:"):
                    yield name, msgspec.json.decode(line.removeprefix("data:"))

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
