"""Run by Alembic: migrates over the connection that glora_server.storage.migrate hands in."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from glora_server.storage.models import Base


def run(connection: Connection) -> None:
    """Migrate inside the transaction of `connection`: all of it or nothing."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transactional_ddl=True,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["connection"])
