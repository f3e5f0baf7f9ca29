"""The table as it was before there were versions; a database that has it is taken for this one."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, Integer, String, Text

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        Column("seq", Integer, primary_key=True, autoincrement=True),
        Column("id", String(64), nullable=False, unique=True),
        Column("status", String(16), nullable=False, index=True),
        Column("progress", Integer, nullable=False),
        Column("params", Text, nullable=False),
        Column("terms", Text, nullable=False),
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
        Column("output_file", Text),
        Column("idempotency_key", String(255), unique=True),
        sqlite_autoincrement=True,
    )
