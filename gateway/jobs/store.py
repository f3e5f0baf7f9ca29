"""Every job that was ever accepted, in SQL. Knows neither files nor HTTP nor the mesh."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
from sqlalchemy import (
    URL,
    Column,
    ColumnElement,
    Connection,
    Executable,
    Float,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from runtime.protocol import Usage
from runtime.sampling import ResolvedParams, Terms

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Order = Literal["asc", "desc"]
UNFINISHED = ("queued", "in_progress")

T = TypeVar("T")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants of the gateway itself; nothing of it reaches a rank's arithmetic."""

    request_id: str = ""
    """The `x-request-id` of the call that made the job."""
    user: str | None = None
    safety_identifier: str | None = None
    remixed_from: str | None = None
    """The video whose parameters were taken over."""
    previews: int = 0
    """Pictures of what it will look like that are wanted while it is denoised."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One generation from acceptance to its end. Times are seconds since the epoch."""

    id: str
    params: ResolvedParams
    model: str
    created_at: float
    terms: Terms = Terms()
    asked: Asked = Asked()
    status: Status = "queued"
    progress: int = 0
    """Percent."""
    started_at: float | None = None
    completed_at: float | None = None
    stage: str = "queued"
    step: int = 0
    total_steps: int = 0
    frames_done: int = 0
    error_code: str | None = None
    error_message: str | None = None
    timings: dict[str, float] = {}
    """Seconds per stage, once it is completed."""
    usage: Usage = Usage()
    """Likewise."""
    output_file: str | None = None
    idempotency_key: str | None = None
    eta_s: float | None = None
    """Predicted seconds to the last frame; lives in memory only."""
    queue_position: int | None = None
    """1 is the next one; lives in memory only."""

    @property
    def finished(self) -> bool:
        return self.status not in UNFINISHED


@dataclass(frozen=True)
class Page:
    jobs: Sequence[Job]
    has_more: bool


_table = Table(
    "jobs",
    MetaData(),
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("status", String(16), nullable=False, index=True),
    Column("progress", Integer, nullable=False),
    Column("params", Text, nullable=False),
    Column("terms", Text, nullable=False),
    Column("asked", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("completed_at", Float),
    Column("stage", String(16), nullable=False),
    Column("step", Integer, nullable=False),
    Column("total_steps", Integer, nullable=False),
    Column("frames_done", Integer, nullable=False),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("timings", Text, nullable=False),
    Column("usage", Text, nullable=False),
    Column("output_file", Text),
    Column("idempotency_key", String(255), unique=True),
    # A number that came back after a deletion would put a new job on an old page.
    sqlite_autoincrement=True,
)
_columns = _table.c
_JSON = {
    "params": ResolvedParams,
    "terms": Terms,
    "asked": Asked,
    "timings": dict[str, float],
    "usage": Usage,
}


class JobStore:
    """The jobs table behind async methods.

    SQLAlchemy's own asyncio layer needs greenlet and runs aiosqlite's thread underneath; one thread of ours with the
    blocking engine is the same with two dependencies less.
    """

    def __init__(self, url: str | URL) -> None:
        """`url` as SQLAlchemy reads it, e.g. ``sqlite:///outputs/jobs.sqlite3``."""
        self._engine = create_engine(url)
        self._thread = ThreadPoolExecutor(1, "jobs")
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _set_pragmas)

    async def open(self) -> None:
        """Make the table if it is not there."""
        await self._run(_table.metadata.create_all)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown()

    async def insert(self, job: Job) -> Job:
        """Store a new job; returns it, or the earlier one with the same idempotency key.

        Raises:
            IntegrityError: the id is taken.
        """
        try:
            await self._run(lambda connection: connection.execute(insert(_table).values(_to_row(job))))
        except IntegrityError:
            earlier = await self._with_key(job.idempotency_key)
            if earlier is None:
                raise
            return earlier
        return job

    async def get(self, job_id: str) -> Job | None:
        found = await self._select(select(_table).where(_columns.id == job_id))
        return found[0] if found else None

    async def update(self, job_id: str, **columns: Any) -> bool:
        """Change an unfinished job; False, and nothing is changed, if it is finished or unknown."""
        unfinished = (_columns.id == job_id) & _columns.status.in_(UNFINISHED)
        return await self._changes(update(_table).where(unfinished).values(_encode(columns)))

    async def list(self, after: str | None = None, limit: int = 20, order: Order = "desc") -> Page:
        """The jobs that follow `after` by the order in which they were accepted."""
        newest_first = order == "desc"
        query = select(_table).order_by(_columns.seq.desc() if newest_first else _columns.seq).limit(limit + 1)
        if after is not None:
            query = query.where(await self._beyond(after, newest_first))
        jobs = await self._select(query)
        return Page(jobs[:limit], len(jobs) > limit)

    async def unfinished(self) -> Sequence[Job]:
        """In the order in which they were accepted."""
        return await self._select(select(_table).where(_columns.status.in_(UNFINISHED)).order_by(_columns.seq))

    async def delete(self, job_id: str) -> bool:
        """False if there is no such job."""
        return await self._changes(delete(_table).where(_columns.id == job_id))

    async def _with_key(self, key: str | None) -> Job | None:
        if key is None:
            return None
        found = await self._select(select(_table).where(_columns.idempotency_key == key))
        return found[0] if found else None

    async def _beyond(self, after: str, newest_first: bool) -> ColumnElement[bool]:
        """A caller that deletes what it has listed goes on from a job that is gone; ids are ordered by time too."""
        seq = await self._run(lambda connection: connection.scalar(select(_columns.seq).where(_columns.id == after)))
        column: Any = _columns.id if seq is None else _columns.seq
        mark = after if seq is None else seq
        beyond: ColumnElement[bool] = column < mark if newest_first else column > mark
        return beyond

    async def _select(self, query: Executable) -> Sequence[Job]:
        rows = await self._run(lambda connection: connection.execute(query).mappings().all())
        return [_from_row(row) for row in rows]

    async def _changes(self, statement: Executable) -> bool:
        count = await self._run(lambda connection: connection.execute(statement).rowcount)
        return count > 0

    async def _run(self, work: Callable[[Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transact, work)

    def _transact(self, work: Callable[[Connection], T]) -> T:
        with self._engine.begin() as connection:
            return work(connection)


def _set_pragmas(connection: Any, _record: Any) -> None:
    """Readers do not wait for the writer, and a commit survives the death of the process."""
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _to_row(job: Job) -> dict[str, Any]:
    return _encode({name: getattr(job, name) for name in job.__struct_fields__ if name in _columns})


def _encode(values: dict[str, Any]) -> dict[str, Any]:
    return values | {name: msgspec.json.encode(values[name]).decode() for name in _JSON.keys() & values.keys()}


def _from_row(row: RowMapping) -> Job:
    values = {name: row[name] for name in row if name != "seq"}
    decoded: dict[str, Any] = {name: msgspec.json.decode(values[name], type=kind) for name, kind in _JSON.items()}
    return Job(**(values | decoded))
