"""Every job that was ever accepted, in SQL, and which gateway works on it. Knows neither files nor HTTP nor the mesh.

An unfinished job has an owner, whose lease has to be renewed; only the owner changes the job's row. Who finds a lease
that ran out may claim the job. One SQLite file belongs to one gateway, so that whatever another one owned is free.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from collections.abc import Callable, Collection, Sequence, Set
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
    UniqueConstraint,
    and_,
    delete,
    func,
    insert,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.exc import IntegrityError

from gateway.jobs.database import PATIENCE_S, Database
from gateway.media.formats import VideoFormat
from runtime.protocol import Usage
from runtime.sampling import ResolvedParams, Terms

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Order = Literal["asc", "desc"]
UNFINISHED = ("queued", "in_progress")
DENOISED = ("decode", "deliver")
"""Stages of a job in which all its steps are done."""
LEASE_S = 15.0
ABANDONED_S = 600.0
"""After which a job that no gateway serves the model of is anybody's, to be ended."""
MAX_OWNER_CHARS = 128
OF_ONE_CALL = ("request_id", "traceparent", "warnings")
"""Of what was asked: not the same when it is asked again."""

T = TypeVar("T")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants of the gateway itself; nothing of it reaches a rank's arithmetic."""

    request_id: str = ""
    """The `x-request-id` of the call that made the job."""
    traceparent: str = ""
    """W3C trace context of that call."""
    user: str | None = None
    safety_identifier: str | None = None
    remixed_from: str | None = None
    """The video whose parameters were taken over."""
    webhook_url: str | None = None
    """Who is told of the job's end."""
    images: tuple[str, ...] = ()
    """Files of the pictures that it starts from."""
    attached: bool = False
    """It belongs to the connection that asked for it, and ends with it."""
    previews: int = 0
    """Pictures of what it will look like that are wanted while it is denoised."""
    output_format: VideoFormat = "mp4"
    warnings: tuple[str, ...] = ()
    """What was asked for and is not in the result."""


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
    """Once it has ended."""
    output_file: str | None = None
    expires_at: float | None = None
    """When it is removed with its files; None: never."""
    idempotency_key: str | None = None
    fingerprint: str | None = None
    """What tells another request under the same key; see `fingerprint()`."""
    cancel_requested: str | None = None
    """The reason that another gateway than the owner was given."""
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


METADATA = MetaData(naming_convention={"ix": "ix_%(column_0_label)s", "uq": "uq_%(table_name)s_%(column_0_N_name)s"})
_table = Table(
    "jobs",
    METADATA,
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
    Column("idempotency_key", String(255)),
    Column("account", Text, nullable=False, index=True),
    Column("fingerprint", String(64)),
    Column("expires_at", Float, index=True),
    Column("owner", String(MAX_OWNER_CHARS), index=True),
    Column("lease_until", Float),
    Column("cancel_requested", Text),
    UniqueConstraint("account", "idempotency_key"),
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
    """The jobs table behind async methods. Every method may raise `StoreUnavailable`, having changed nothing."""

    def __init__(self, url: str | URL, *, lease_s: float = LEASE_S) -> None:
        """`url` as SQLAlchemy reads it, e.g. ``sqlite:///outputs/jobs.sqlite3``.

        Raises:
            StartFailed: not a database that we know, or its driver is not installed.
        """
        self._database = Database(url)
        self.lease_s = lease_s
        self.owner = f"{socket.gethostname()[:80]}-{os.getpid()}-{secrets.token_hex(4)}"
        """Of the jobs that this gateway works on."""

    @property
    def shared(self) -> bool:
        """Whether other gateways may work on jobs of the same store."""
        return self._database.shared

    @property
    def url(self) -> URL:
        """As text it has no password."""
        return self._database.url

    async def open(self) -> None:
        """Make the table, or bring it up to date.

        Raises:
            StartFailed: another gateway has the SQLite file, the database is of a newer version, or cannot be opened.
        """
        await self._database.open()

    async def close(self) -> None:
        await self._database.close()

    # ---- jobs ------------------------------------------------------------------------------------------------

    async def insert(self, job: Job) -> Job:
        """Store a new job as ours; returns it, or the earlier one with its account's same idempotency key."""
        values = _to_row(job) | {"owner": self.owner, "lease_until": self._lease()}
        try:
            await self._changes(insert(_table).values(values))
        except IntegrityError:
            # With its own id: it was stored already when the connection was lost, and this was the second attempt.
            same = _columns.id == job.id
            if job.idempotency_key is not None:
                same |= (_columns.account == job.terms.key) & (_columns.idempotency_key == job.idempotency_key)
            earlier = await self._select(select(_table).where(same))
            if not earlier:
                raise
            return earlier[0]
        return job

    async def with_key(self, account: str, idempotency_key: str) -> Job | None:
        """The job that an account made under a key."""
        same = (_columns.account == account) & (_columns.idempotency_key == idempotency_key)
        found = await self._select(select(_table).where(same))
        return found[0] if found else None

    async def get(self, job_id: str, account: str | None = None) -> Job | None:
        """None also for a job of another account than the one that is asked for."""
        query = select(_table).where(_columns.id == job_id, _of(account))
        found = await self._select(query)
        return found[0] if found else None

    async def update(self, job_id: str, *, also: Sequence[Executable] = (), **columns: Any) -> bool:
        """Change an unfinished job of ours; False, and nothing is changed, if it is finished, not ours or unknown.

        Args:
            also: executed in the same transaction if the job is changed.
        """
        statement = update(_table).where(_columns.id == job_id, self._ours()).values(_encode(columns))
        return await self._changes(statement, also)

    async def list(
        self, after: str | None = None, limit: int = 20, order: Order = "desc", account: str | None = None
    ) -> Page:
        """The jobs that follow `after` by the order in which they were accepted; of all accounts, or of one."""
        newest_first = order == "desc"
        query = select(_table).order_by(_columns.seq.desc() if newest_first else _columns.seq).limit(limit + 1)
        query = query.where(_of(account))
        if after is not None:
            query = query.where(await self._beyond(after, newest_first))
        jobs = await self._select(query)
        return Page(jobs[:limit], len(jobs) > limit)

    async def delete(self, job_id: str) -> bool:
        """False if there is no such job."""
        return await self._changes(delete(_table).where(_columns.id == job_id))

    async def expired(self, moment: float, limit: int) -> Sequence[str]:
        """Ids of jobs that were to be kept until then at most."""
        query = select(_columns.id).where(_columns.expires_at <= moment).order_by(_columns.expires_at).limit(limit)
        return await self.transact(lambda connection: connection.scalars(query).all())

    async def known(self, job_ids: Collection[str]) -> Set[str]:
        """Those of some ids that are jobs."""
        query = select(_columns.id).where(_columns.id.in_(job_ids))
        return await self.transact(lambda connection: set(connection.scalars(query)))

    async def transact(self, work: Callable[[Connection], T]) -> T:
        """Do something in one transaction, with the tables of others too; it must bear repeating."""
        return await self._database.run(work)

    # ---- who works on them -----------------------------------------------------------------------------------

    async def claim(self, models: Collection[str], but: Collection[str] = ()) -> Sequence[Job]:
        """Make jobs that nobody works on ours, in the order in which they were accepted; no two gateways get the same.

        Args:
            models: what this gateway serves. Jobs of other models come only if no other gateway wanted them.
            but: models whose jobs have to wait.
        """
        unwanted = _lease_end() < self._database.now() - ABANDONED_S if self.shared else true()
        wanted = or_(_columns.model.in_(models), unwanted) & _columns.model.not_in(but)
        free = select(_columns.id).where(_unfinished(), self._free(), wanted).order_by(_columns.seq)
        taken = (
            update(_table)
            .where(_columns.id.in_(free.with_for_update(skip_locked=True)))
            .values(owner=self.owner, lease_until=self._lease())
            .returning(_table)
        )
        return await self._select(taken)

    async def renew(self, patience_s: float = PATIENCE_S) -> dict[str, str | None]:
        """Hold on to what is ours for another `lease_s`: id -> why somebody wants it cancelled, or None."""
        renewed = update(_table).where(self._ours()).values(lease_until=self._lease())
        query = renewed.returning(_columns.id, _columns.cancel_requested)
        rows = await self._database.run(lambda connection: connection.execute(query).all(), patience_s)
        return {row.id: row.cancel_requested for row in rows}

    async def cancels(self, patience_s: float = PATIENCE_S) -> dict[str, str]:
        """Our jobs that somebody wants cancelled: id -> the reason."""
        query = select(_columns.id, _columns.cancel_requested).where(
            self._ours(), _columns.cancel_requested.is_not(None)
        )
        rows = await self._database.run(lambda connection: connection.execute(query).all(), patience_s)
        return {row.id: row.cancel_requested for row in rows}

    async def mine(self, job_id: str) -> Job | None:
        """An unfinished job of ours."""
        found = await self._select(select(_table).where(_columns.id == job_id, self._ours()))
        return found[0] if found else None

    async def release(self, job_id: str | None = None) -> None:
        """Give back one job, or all that are ours, so that the next gateway need not wait for the lease to run out."""
        given_back = update(_table).where(self._ours()).values(owner=None, lease_until=self._database.now())
        await self._changes(given_back if job_id is None else given_back.where(_columns.id == job_id))

    async def request_cancel(self, job_id: str, reason: str) -> None:
        """Leave word for the gateway that works on it."""
        where = and_(_columns.id == job_id, _unfinished())
        await self._changes(update(_table).where(where).values(cancel_requested=reason))

    async def end_unowned(self, job_id: str, *, also: Sequence[Executable] = (), **columns: Any) -> bool:
        """Change an unfinished job that nobody works on; False if somebody does, or it is finished or unknown.

        Args:
            also: as for `update`.
        """
        where = and_(_columns.id == job_id, _unfinished(), self._free())
        return await self._changes(update(_table).where(where).values(_encode(columns)), also)

    def _lease(self) -> ColumnElement[float]:
        return self._database.now() + self.lease_s

    def _ours(self) -> ColumnElement[bool]:
        return and_(_columns.owner == self.owner, _unfinished())

    def _free(self) -> ColumnElement[bool]:
        others = or_(_columns.owner.is_(None), _columns.owner != self.owner)
        return others & (_lease_end() < self._database.now()) if self.shared else others

    async def _beyond(self, after: str, newest_first: bool) -> ColumnElement[bool]:
        """A caller that deletes what it has listed goes on from a job that is gone; ids are ordered by time too."""
        query = select(_columns.seq).where(_columns.id == after)
        seq = await self._database.run(lambda connection: connection.scalar(query))
        column: Any = _columns.id if seq is None else _columns.seq
        mark = after if seq is None else seq
        beyond: ColumnElement[bool] = column < mark if newest_first else column > mark
        return beyond

    async def _select(self, query: Executable) -> Sequence[Job]:
        """In the query's order; what a change returns has none, and comes in the order of arrival."""
        rows = await self._database.run(lambda connection: connection.execute(query).mappings().all())
        if query.is_update:
            rows = sorted(rows, key=lambda row: row["seq"])
        return [_from_row(row) for row in rows]

    async def _changes(self, statement: Executable, also: Sequence[Executable] = ()) -> bool:
        def change(connection: Connection) -> bool:
            changed = connection.execute(statement).rowcount > 0
            for more in also if changed else ():
                connection.execute(more)
            return changed

        return await self._database.run(change)


def fingerprint(job: Job, drawn_seed: bool) -> str:
    """A hash of what was asked for: equal for a repeated request, whose seed is a new one if none was given.

    Values at their defaults are left out, so that a new field does not make old requests different.
    """
    params = _told(job.params)
    if drawn_seed:
        del params["seed"]
    asked = {name: value for name, value in _told(job.asked).items() if name not in OF_ONE_CALL}
    terms = {name: value for name, value in _told(job.terms).items() if name != "key"}
    words = msgspec.json.encode([job.model, params, asked, terms], order="deterministic")
    return hashlib.sha256(words).hexdigest()


def _told(struct: msgspec.Struct) -> dict[str, Any]:
    fields = ((field.name, field.default) for field in msgspec.structs.fields(struct))
    return {name: value for name, default in fields if (value := getattr(struct, name)) != default}


def _unfinished() -> ColumnElement[bool]:
    return _columns.status.in_(UNFINISHED)


def _of(account: str | None) -> ColumnElement[bool]:
    return true() if account is None else _columns.account == account


def _lease_end() -> ColumnElement[float]:
    return func.coalesce(_columns.lease_until, 0.0)


def _to_row(job: Job) -> dict[str, Any]:
    row = {name: getattr(job, name) for name in job.__struct_fields__ if name in _columns}
    return _encode(row | {"account": job.terms.key})


def _encode(values: dict[str, Any]) -> dict[str, Any]:
    return values | {name: msgspec.json.encode(values[name]).decode() for name in _JSON.keys() & values.keys()}


def _from_row(row: RowMapping) -> Job:
    values = {name: row[name] for name in Job.__struct_fields__ if name in row}
    decoded: dict[str, Any] = {name: msgspec.json.decode(values[name], type=kind) for name, kind in _JSON.items()}
    return Job(**(values | decoded))
