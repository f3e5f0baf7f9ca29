"""The database behind the job store: which one, its schema's version, and what to do when it is gone for a moment.

Knows no jobs. SQLAlchemy's own asyncio layer needs greenlet and runs a thread underneath; threads of ours with the
blocking engine are the same with less.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Float,
    cast,
    create_engine,
    event,
    extract,
    func,
    inspect,
    literal,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from runtime.errors import FramemeshError, StartFailed
from runtime.log import get_logger

PATIENCE_S = 10.0
"""How long a lost database may take to come back before those who wait for it are told."""
PAUSES_S = (0.05, 1.0)
"""Between two attempts to reach it: the first, and the longest."""
POSTGRES_THREADS = 4
UPGRADE_LOCK = 0x6672616D65
"""Two gateways that start at once upgrade one after the other."""
FIRST_VERSION = "0001"
"""What a database is that was made before there were versions."""
QUICK_LOSS = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""libpq's words for hearing soon that a host is gone; the URL may say otherwise."""
IDLE_S = 5.0
"""A gateway that is suspended in a transaction keeps its rows locked for so long, and others from taking them."""

T = TypeVar("T")

log = get_logger("store")


class StoreUnavailable(FramemeshError):
    """The database could not be reached for so long that the caller should not wait any more."""


class Database:
    """Transactions in threads. One SQLite file belongs to one gateway at a time; PostgreSQL is shared."""

    def __init__(self, url: str | URL) -> None:
        """`url` as SQLAlchemy reads it; PostgreSQL's in any of its spellings.

        Raises:
            StartFailed: not a database that we know, or its driver is not installed.
        """
        self.url = read_url(url)
        self._engine = _make_engine(self.url)
        threads = POSTGRES_THREADS if self.shared else 1
        self._threads = ThreadPoolExecutor(threads, "jobs")
        self._closing = threading.Event()
        self._lock: int | None = None
        self._is_open = False

    @property
    def shared(self) -> bool:
        """Whether other gateways may use it at the same time."""
        return self._engine.dialect.name == "postgresql"

    def __str__(self) -> str:
        return self.url.set(query={}).render_as_string(hide_password=True)

    def now(self) -> ColumnElement[float]:
        """Seconds since the epoch by the one clock that all gateways share."""
        if self.shared:
            return cast(extract("epoch", func.clock_timestamp()), Float)
        return literal(time.time())

    async def open(self) -> None:
        """Take the file, if it is one, and bring the schema up to date. Nothing to do if that is done.

        Raises:
            StartFailed: another gateway has the file, the database is of a newer version, or cannot be opened.
        """
        if self._is_open:
            return
        await asyncio.get_running_loop().run_in_executor(self._threads, self._take_file)
        try:
            await self.run(_upgrade)
        except (SQLAlchemyError, StoreUnavailable) as error:
            reason = str(error.orig if isinstance(error, DBAPIError) else error).strip()
            raise StartFailed(f"cannot open the job store {self}: {reason}") from error
        self._is_open = True

    async def close(self) -> None:
        self._closing.set()
        await asyncio.get_running_loop().run_in_executor(self._threads, self._let_go)
        self._threads.shutdown()

    async def run(self, work: Callable[[Connection], T], patience_s: float = PATIENCE_S) -> T:
        """`work` in a transaction of its own, again if the connection was lost on the way: it must bear repeating.

        Raises:
            StoreUnavailable: there was no connection for `patience_s` from now on.
        """
        until = time.monotonic() + patience_s
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._transact, work, until)

    def _transact(self, work: Callable[[Connection], T], until: float) -> T:
        pause, longest = PAUSES_S
        while True:
            try:
                with self._engine.begin() as connection:
                    return work(connection)
            except DBAPIError as error:
                if not self._lost_connection(error):
                    raise
                reason = str(error.orig).strip()
                if time.monotonic() + pause > until or self._closing.wait(pause):
                    raise StoreUnavailable(f"the database is not reachable: {reason}") from error
                log.warning("the database is not reachable", reason=reason)
            pause = min(2 * pause, longest)

    def _lost_connection(self, error: DBAPIError) -> bool:
        """Or not got at all: the server is down, starting, or has no room."""
        if not self.shared:
            return False
        state = getattr(error.orig, "sqlstate", None)
        no_server = type(error.orig).__name__ == "OperationalError" and state is None
        return error.connection_invalidated or no_server or (state or "").startswith(("08", "57P", "53300", "25P03"))

    def _take_file(self) -> None:
        if self.url.get_backend_name() != "sqlite" or self.url.database in {None, "", ":memory:"}:
            return
        path = Path(f"{self.url.database}.lock")
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._lock, 20, 0).decode(errors="replace").strip()
            self._let_go()
            raise StartFailed(
                f"another gateway (process {owner}) uses {self.url.database}; several gateways share jobs over "
                "PostgreSQL (--database-url), or take another --output-path"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _let_go(self) -> None:
        self._engine.dispose()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_url(url: str | URL) -> URL:
    """With the driver that we use; psycopg 3 for PostgreSQL.

    Raises:
        StartFailed: not a URL, or of a database that we do not know. The URL is not repeated: it may hold a password.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StartFailed("the database URL is none; take postgresql://user:password@host/database") from None
    if parsed.drivername in {"postgres", "postgresql", "postgresql+psycopg"}:
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "sqlite":
        return parsed
    raise StartFailed(f"no driver for {parsed.drivername} databases; take a postgresql:// URL, or none for SQLite")


def _make_engine(url: URL) -> Engine:
    if url.drivername == "sqlite":
        engine = create_engine(url, hide_parameters=True)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin)
        return engine
    patience = {name: value for name, value in QUICK_LOSS.items() if name not in url.query}
    try:
        engine = create_engine(
            url,
            pool_size=POSTGRES_THREADS,
            max_overflow=0,
            pool_pre_ping=True,
            connect_args=patience,
            hide_parameters=True,
        )
    except ModuleNotFoundError as error:
        reason = "a PostgreSQL database needs psycopg 3; install it with: pip install 'framemesh[postgres]'"
        raise StartFailed(reason) from error
    event.listen(engine, "connect", _set_up_postgres)
    return engine


def _set_up_postgres(connection: Any, _record: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = {int(IDLE_S * 1000)}")
    connection.commit()


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    """Readers do not wait for the writer, and a commit survives the death of the process."""
    # The driver begins no transaction before a change of the schema; `_begin` does.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _upgrade(connection: Connection) -> None:
    """Bring the schema to the newest version, all of it or nothing."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(UPGRADE_LOCK)))
    settings = AlembicConfig(attributes={"connection": connection})
    settings.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    settings.set_main_option("path_separator", "os")
    known = [script.revision for script in ScriptDirectory.from_config(settings).walk_revisions()]
    unknown = set(MigrationContext.configure(connection).get_current_heads()) - set(known)
    if unknown:
        raise StartFailed(
            f"the job store was made by a newer framemesh (version {min(unknown)}; this one knows up to {known[0]}); "
            "upgrade framemesh, or take another database"
        )
    tables = inspect(connection).get_table_names()
    if "jobs" in tables and "alembic_version" not in tables:
        command.stamp(settings, FIRST_VERSION)
    command.upgrade(settings, "head")
