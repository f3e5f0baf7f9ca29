"""Finished files over HTTP, from this host or from the bucket, whole or in ranges. Knows no jobs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response, StreamingResponse

from gateway.jobs.bucket import Stored
from gateway.jobs.outputs import Outputs, media_type_of

ONE_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
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
            media_type = media_type_of(found.name)
            return FileResponse(found, media_type=media_type, filename=found.name, content_disposition_type="inline")
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
        wanted, status = _wanted(request, found, headers), 200
        if wanted is None:
            return Response(None, 416, {"content-range": f"bytes */{found.size}"})
        first, end = wanted
        if (first, end) != (0, found.size):
            status, headers["content-range"] = 206, f"bytes {first}-{end - 1}/{found.size}"
        headers["content-length"] = str(end - first)
        return StreamingResponse(self.outputs.stream(found, first, end), status, headers, media_type_of(name))


def _wanted(request: Request, found: Stored, headers: dict[str, str]) -> tuple[int, int] | None:
    """The bytes that a client asks for, [first, end); None if there are none such.

    RFC 9110 §14.2: several ranges, or a range of a file that is another by now, may be answered with all of it.
    """
    match = ONE_RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    unless = request.headers.get("if-range")
    if request.method != "GET" or match is None or match[0] == "bytes=-":
        return 0, found.size
    if unless not in {None, headers.get("etag"), headers["last-modified"]}:
        return 0, found.size
    if not match[1]:
        first, end = max(0, found.size - int(match[2])), found.size
    else:
        first, end = int(match[1]), min(int(match[2]) + 1 if match[2] else found.size, found.size)
    return (first, end) if first < end else None
