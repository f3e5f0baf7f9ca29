"""What alembic runs: the migrations, in the transaction that `gateway.jobs.database` has begun."""

from __future__ import annotations

from alembic import context

# The module that imports those of all other tables.
from gateway.jobs.deliveries import TABLE

context.configure(connection=context.config.attributes["connection"], target_metadata=TABLE.metadata)
with context.begin_transaction():
    context.run_migrations()
