"""Webhooks that are owed, in SQL: written in the transaction that ends a job, taken by whoever has time to send them.

It knows neither receivers nor what they are sent.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import (
    Column,
    Connection,
    Executable,
    Float,
    Integer,
    String,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    update,
)

from gateway.jobs.store import METADATA, JobStore


@dataclass(frozen=True)
class Delivery:
    """One event for one receiver."""

    id: str
    """evt_…, the same in every attempt."""
    job_id: str
    event: str
    """video.completed, video.failed or video.cancelled."""
    url: str
    created_at: float
    """Seconds since the epoch."""
    attempts: int = 0
    """Begun so far."""


TABLE = Table(
    "deliveries",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("job_id", String(64), nullable=False),
    Column("event", String(32), nullable=False),
    Column("url", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    # Null once it was delivered or given up. While somebody sends it: when another one may.
    Column("next_at", Float, index=True),
    Column("delivered_at", Float),
)
_columns = TABLE.c


class Deliveries:
    """The deliveries table behind async methods. Each of them may raise `StoreUnavailable`, having changed nothing."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def owing(self, delivery: Delivery) -> Executable:
        """The statement that makes a delivery due at once."""
        values = {name: getattr(delivery, name) for name in _names()}
        return insert(TABLE).values(values | {"next_at": delivery.created_at})

    async def take(self, lease_s: float, full: Collection[str]) -> Delivery | None:
        """The delivery that is due for longest, for this process alone until the lease ends.

        Args:
            full: URLs that take no more now.
        """
        return await self._store.transact(lambda connection: _take(connection, lease_s, full))

    async def next_at(self, moment: float) -> float | None:
        """When the first one was or will be due (seconds since the epoch) that was not due at a moment."""
        query = select(func.min(_columns.next_at)).where(_columns.next_at > moment)
        return await self._store.transact(lambda connection: connection.scalar(query))

    async def postpone(self, delivery: Delivery, next_at: float | None) -> None:
        """Until a moment, or for good."""
        await self._set(delivery, next_at=next_at)

    async def delivered(self, delivery: Delivery) -> None:
        await self._set(delivery, next_at=None, delivered_at=time.time())

    async def prune(self, moment: float) -> None:
        """Forget what was owed before a moment."""
        statement = delete(TABLE).where(_columns.created_at < moment)
        await self._store.transact(lambda connection: connection.execute(statement))

    async def _set(self, delivery: Delivery, **values: float | None) -> None:
        statement = update(TABLE).where(_columns.id == delivery.id).values(values)
        await self._store.transact(lambda connection: connection.execute(statement))


def _take(connection: Connection, lease_s: float, full: Collection[str]) -> Delivery | None:
    now = time.time()
    due = select(TABLE).where(_columns.next_at <= now, _columns.url.not_in(full)).order_by(_columns.next_at)
    # Two that look at the same time get different ones.
    row = connection.execute(due.limit(1).with_for_update(skip_locked=True)).mappings().first()
    if row is None:
        return None
    values = {name: row[name] for name in _names()} | {"attempts": row["attempts"] + 1}
    taking = update(TABLE).where(_columns.id == row["id"]).values(next_at=now + lease_s, attempts=values["attempts"])
    connection.execute(taking)
    return Delivery(**values)


def _names() -> list[str]:
    return list(Delivery.__dataclass_fields__)
