"""Several gateways on one database: who runs a job, until when that holds, and whose job it is."""

from __future__ import annotations

import json

from alembic import op
from sqlalchemy import Column, Float, String, Text, bindparam, inspect, text

revision = "0002"
down_revision = "0001"

NAMES = {"uq": "uq_%(table_name)s_%(column_0_N_name)s"}
"""SQLite does not name its constraints; what is to be changed needs a name."""


def upgrade() -> None:
    new = (
        Column("asked", Text, nullable=False, server_default="{}"),
        Column("usage", Text, nullable=False, server_default="{}"),
        Column("account", Text, nullable=False, server_default=""),
        Column("fingerprint", String(64)),
        Column("expires_at", Float),
        Column("owner", String(128)),
        Column("lease_until", Float),
        Column("cancel_requested", Text),
    )
    counter = _sqlite_counter()
    # Some databases without a version have the first of these already.
    there = {column["name"] for column in inspect(op.get_bind()).get_columns("jobs")}
    with op.batch_alter_table("jobs", naming_convention=NAMES, table_kwargs={"sqlite_autoincrement": True}) as jobs:
        for column in new:
            if column.name not in there:
                jobs.add_column(column)
        jobs.drop_constraint("uq_jobs_idempotency_key", type_="unique")
        jobs.create_unique_constraint("uq_jobs_account_idempotency_key", ["account", "idempotency_key"])
    for name in ("account", "owner", "expires_at"):
        op.create_index(f"ix_jobs_{name}", "jobs", [name])
    _fill_accounts()
    _set_sqlite_counter(counter)


def _fill_accounts() -> None:
    connection = op.get_bind()
    rows = connection.execute(text("SELECT id, terms FROM jobs")).all()
    accounts = [{"job": job_id, "key": json.loads(terms).get("key", "")} for job_id, terms in rows]
    if accounts:
        change = text("UPDATE jobs SET account = :key WHERE id = :job")
        connection.execute(change.bindparams(bindparam("key"), bindparam("job")), accounts)


def _sqlite_counter() -> int | None:
    """The highest number that a row ever had: SQLite forgets it with the table, which is made anew here."""
    if op.get_bind().dialect.name != "sqlite":
        return None
    counter: int | None = op.get_bind().scalar(text("SELECT seq FROM sqlite_sequence WHERE name = 'jobs'"))
    return counter


def _set_sqlite_counter(counter: int | None) -> None:
    if counter is not None:
        op.execute("DELETE FROM sqlite_sequence WHERE name = 'jobs'")
        op.execute(f"INSERT INTO sqlite_sequence (name, seq) VALUES ('jobs', {counter})")
