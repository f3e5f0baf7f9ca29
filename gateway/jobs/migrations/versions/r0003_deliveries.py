"""Webhooks that are owed."""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Float, Integer, String, Text

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "deliveries",
        Column("id", String(64), primary_key=True),
        Column("job_id", String(64), nullable=False),
        Column("event", String(32), nullable=False),
        Column("url", Text, nullable=False),
        Column("created_at", Float, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("next_at", Float),
        Column("delivered_at", Float),
    )
    op.create_index("ix_deliveries_next_at", "deliveries", ["next_at"])
