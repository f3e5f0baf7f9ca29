"""A bucket of an S3-compatible store: whole files in and out by name. Knows names and bytes, no jobs and no HTTP.

Credentials, region and endpoint are what the AWS_* variables say when the process starts.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import StartFailed
from runtime.log import get_logger

if TYPE_CHECKING:
    from obstore.store import S3Store

SCHEME = "s3://"
PATIENCE_S = 60.0
"""How long an upload is tried again before the job behind it fails."""
PAUSE_S = (0.2, 5.0)
"""The first and the longest pause between two tries."""
PART_BYTES = 8 << 20
"""Larger files go up in parts of this size."""
PIECE_BYTES = 2 << 20
"""A download asks for so much at a time: no connection is held open for a client that reads slowly."""

log = get_logger("bucket")


@dataclass(frozen=True)
class Stored:
    """One file in the bucket."""

    name: str
    size: int
    """Bytes."""
    modified_at: float
    """Seconds since the epoch."""
    etag: str | None


class StorageFailed(Exception):
    """The bucket did not do what it was asked, for as long as one can wait."""


class Bucket:
    """The files under one prefix.

    Args:
        url: ``s3://bucket`` or ``s3://bucket/prefix``, checked by `runtime.config`.

    Raises:
        StartFailed: the library is not installed, or what the environment says makes no sense to it.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._store = _connect(url)

    async def check(self) -> None:
        """See that files can be written and deleted.

        Raises:
            StartFailed: they cannot; says why.
        """
        import obstore

        probe = f".probe-{secrets.token_hex(8)}"
        try:
            await obstore.put_async(self._store, probe, b"framemesh")
            await obstore.delete_async(self._store, probe)
        except FileNotFoundError as error:
            raise StartFailed(f"output_store: there is no bucket for {self._url}; make it first") from error
        except _errors() as error:
            raise StartFailed(f"output_store: {self._url} cannot be written: {_reason(error)}") from error

    async def put(self, name: str, content: Path | bytes, media_type: str) -> None:
        """Store a file under a name; it appears whole or not at all.

        Raises:
            StorageFailed: not within `PATIENCE_S`.
        """
        import obstore

        attributes = {"Content-Type": media_type}
        give_up_at, pause = time.monotonic() + PATIENCE_S, PAUSE_S[0]
        while True:
            try:
                await obstore.put_async(self._store, name, content, attributes=attributes, chunk_size=PART_BYTES)
            except _errors() as error:
                log.warning("an upload failed", name=name, reason=_reason(error))
                if time.monotonic() + pause > give_up_at:
                    raise StorageFailed(f"the object store took no file for {PATIENCE_S:g} s") from error
            else:
                return
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, PAUSE_S[1])

    async def head(self, name: str) -> Stored | None:
        """What there is under a name.

        Raises:
            StorageFailed: nobody answers.
        """
        import obstore

        try:
            found = await obstore.head_async(self._store, name)
        except FileNotFoundError:
            return None
        except _errors() as error:
            raise StorageFailed(_reason(error)) from error
        return Stored(name, found["size"], found["last_modified"].timestamp(), found["e_tag"])

    async def read(self, name: str, first: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from number `first` up to and without `end`, piece by piece.

        Raises:
            StorageFailed: the file is gone, or nobody answers.
        """
        import obstore

        for start in range(first, end, PIECE_BYTES):
            stop = min(start + PIECE_BYTES, end)
            try:
                piece = await obstore.get_range_async(self._store, name, start=start, end=stop)
            except _errors() as error:
                raise StorageFailed(_reason(error)) from error
            yield bytes(piece)

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to a path of this host, where it appears whole; blocks.

        Raises:
            FileNotFoundError: there is none.
            StorageFailed: nobody answers.
        """
        import obstore

        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            found = obstore.get(self._store, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                for piece in found.stream(PIECE_BYTES):
                    file.write(piece)
            part.replace(path)
        except obstore.exceptions.BaseError as error:
            raise StorageFailed(_reason(error)) from error
        finally:
            part.unlink(missing_ok=True)

    async def sign(self, name: str, seconds: float) -> str:
        """A URL under which anybody can read the file for some time."""
        import obstore

        return await obstore.sign_async(self._store, "GET", name, timedelta(seconds=seconds))

    async def delete(self, names: Sequence[str]) -> None:
        """Those that are not there are fine.

        Raises:
            StorageFailed: nobody answers.
        """
        import obstore

        try:
            await obstore.delete_async(self._store, list(names))
        except FileNotFoundError:
            return
        except _errors() as error:
            raise StorageFailed(_reason(error)) from error

    async def list(self, folder: str, page_size: int) -> AsyncIterator[Sequence[Stored]]:
        """Every file in a folder, page by page.

        Raises:
            StorageFailed: nobody answers.
        """
        import obstore

        try:
            async for page in obstore.list(self._store, folder, chunk_size=page_size):
                yield [Stored(o["path"], o["size"], o["last_modified"].timestamp(), o["e_tag"]) for o in page]
        except _errors() as error:
            raise StorageFailed(_reason(error)) from error


def _connect(url: str) -> S3Store:
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise StartFailed(f"output_store: {url} needs the extra s3: pip install 'framemesh[s3]'") from error
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    try:
        return S3Store(
            bucket,
            prefix=prefix.strip("/") or None,
            # Whoever writes http:// into the endpoint means it.
            client_options={
                "allow_http": True,
                "connect_timeout": timedelta(seconds=5),
                "timeout": timedelta(seconds=60),
            },
            # Short: those who wait for an upload are told by us that it is tried again.
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=10)},
        )
    except _errors() as error:
        raise StartFailed(f"output_store: {url}: {_reason(error)}") from error


def _errors() -> tuple[type[Exception], ...]:
    """What the library raises, beside errors of our own making."""
    from obstore.exceptions import BaseError

    return (BaseError, OSError, ValueError)


def _reason(error: Exception) -> str:
    """One line; the library's messages are trees."""
    return " ".join(str(error).partition("Debug source")[0].split())[:300]
