"""Finished files over HTTP, from this host or from the bucket, whole or in ranges. Knows no jobs."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse

from gateway.jobs.bucket import Stored
from gateway.jobs.outputs import Outputs, media_type_of
from gateway.replies import error_reply

ONE_RANGE = re.compile(r"bytes=(?=\d*-\d|\d)(\d{0,18})-(\d{0,18})")
SIGNED_S = 3600.0
"""How long a signed URL is good for."""


@dataclass(frozen=True)
class Delivery:
    """How files are handed out."""

    outputs: Outputs
    redirect: bool
    """Send clients to the bucket."""

    async def send(self, found: Path | Stored, request: Request, *, may_redirect: bool = True) -> Response:
        """The answer that is a file, or the part of it that a GET asks for.

        Raises:
            StorageFailed: the bucket does not answer.
        """
        if isinstance(found, Path):
            return await _send_local(found, request)
        if self.redirect and may_redirect:
            return RedirectResponse(await self.outputs.sign(found, SIGNED_S), 302, {"cache-control": "no-store"})
        return self._pass_on(found, request)

    def _pass_on(self, found: Stored, request: Request) -> Response:
        name = found.name.rpartition("/")[2]
        headers = {
            "accept-ranges": "bytes",
            "content-disposition": f'inline; filename="{name}"',
            "last-modified": formatdate(found.modified_at, usegmt=True),
        }
        if found.etag is not None:
            headers["etag"] = found.etag
        unchanged = request.headers.get("if-range") in {None, headers.get("etag"), headers["last-modified"]}
        wanted, status = _wanted(request, found.size) if unchanged else (0, found.size), 200
        if wanted is None:
            return _no_such_range(found.size)
        first, end = wanted
        if (first, end) != (0, found.size):
            status, headers["content-range"] = 206, f"bytes {first}-{end - 1}/{found.size}"
        headers["content-length"] = str(end - first)
        return StreamingResponse(self.outputs.stream(found, first, end), status, headers, media_type_of(name))


async def _send_local(path: Path, request: Request) -> Response:
    state = await asyncio.to_thread(path.stat)
    wanted = _wanted(request, state.st_size)
    if wanted is None:
        return _no_such_range(state.st_size)
    if wanted == (0, state.st_size):
        # The response would look at what we could not read, and answer in plain text that it cannot either.
        request.scope["headers"] = [header for header in request.scope["headers"] if header[0] != b"range"]
    return FileResponse(
        path,
        media_type=media_type_of(path.name),
        filename=path.name,
        stat_result=state,
        content_disposition_type="inline",
    )


def _wanted(request: Request, size: int) -> tuple[int, int] | None:
    """The bytes that a client asks for, [first, end); None if the file has none of them.

    All of it for what is not a single range, which is a right answer to any Range header (RFC 9110 §14.2).
    """
    match = ONE_RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if request.method != "GET" or match is None:
        return 0, size
    if not match[1]:
        first, end = max(0, size - int(match[2])), size
    else:
        first, end = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
    return (first, end) if first < end else None


def _no_such_range(size: int) -> Response:
    message = f"the file has {size} bytes and none of those that are asked for"
    return error_reply(416, message, "Range", "range_not_satisfiable", {"content-range": f"bytes */{size}"})
