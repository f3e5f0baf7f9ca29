"""What alembic runs: the migrations, in the transaction that `gateway.jobs.database` has begun."""

from __future__ import annotations

from alembic import context

from gateway.jobs.store import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
