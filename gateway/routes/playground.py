"""/playground: the hand-written page, its script and its style. It uses the public API like any other client."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastapi import APIRouter
from starlette.responses import FileResponse, RedirectResponse

FOLDER = Path(__file__).parent.parent / "playground"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""Nothing from elsewhere, nothing inline; forms are answered by the script alone."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def root() -> RedirectResponse:
    """Relative, so that it holds behind a proxy that adds a prefix."""
    return RedirectResponse("playground")


@router.get("/playground", response_class=FileResponse)
async def page() -> FileResponse:
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


@router.get("/playground/{name}", response_class=FileResponse)
async def part(name: Literal["app.js", "style.css"]) -> FileResponse:
    return FileResponse(FOLDER / name, headers=HEADERS)
