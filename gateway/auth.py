"""Who asks: the account behind an API key. The key itself goes no further than this."""

from __future__ import annotations

import hashlib

from starlette.requests import Request


def account(request: Request) -> str:
    """A name for the caller's API key, by which fair shares are kept."""
    secret = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    return hashlib.sha256(secret.encode()).hexdigest()[:12] if secret else ""
