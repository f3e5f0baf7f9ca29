"""Ids that tell whose a thing is to who knows the owner's name, so that nothing has to be kept beside it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

STEM_CHARS, MARK_CHARS = 32, 16


def owned_id(prefix: str, account: str) -> str:
    """A new id, ordered by time and not to be guessed from another one."""
    stem = f"{time.time_ns():016x}{secrets.token_hex(8)}"
    return f"{prefix}_{stem}{_mark(stem, account)}"


def is_owned(owned: str, account: str) -> bool:
    """Whether `owned_id` made it for this account."""
    digits = owned.rpartition("_")[2]
    stem, mark = digits[:STEM_CHARS], digits[STEM_CHARS:]
    return hmac.compare_digest(mark.encode(), _mark(stem, account).encode())


def _mark(stem: str, account: str) -> str:
    return hashlib.sha256(f"{stem}\n{account}".encode()).hexdigest()[:MARK_CHARS]
