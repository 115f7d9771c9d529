"""The schema: bring a database to the one that this program works with, or say why that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from glora_wire.errors import GloraError, Reason

_ADVISORY_LOCK: Final = 0x676C6F7261  # "glora"


def config(connection: Connection | None = None) -> Config:
    """Alembic's settings for our migrations, over `connection`, which must be inside a transaction."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    settings.set_main_option("path_separator", "os")
    settings.attributes["connection"] = connection
    return settings


def head() -> str:
    """The revision that this program works with."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    if revision is None:
        raise RuntimeError("the package carries no migrations")
    return revision


def current(connection: Connection) -> str | None:
    """The revision of the database; None when it is empty."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: Connection) -> None:
    """Bring the database to `head()`; raises DATABASE_UNUSABLE when it is newer than this program."""
    _lock(connection)
    _require_known(current(connection))
    command.upgrade(config(connection), "head")


def downgrade(connection: Connection, revision: str) -> None:
    """Take the database back to `revision` ("base": empty)."""
    _lock(connection)
    command.downgrade(config(connection), revision)


def require_head(connection: Connection) -> None:
    """Raise DATABASE_UNUSABLE unless the database has exactly the schema of this program."""
    found = current(connection)
    _require_known(found)
    if found != head():
        raise GloraError(
            Reason.DATABASE_UNUSABLE,
            f"The database has schema {found or 'none'}, this program needs {head()}; run `glora db upgrade`.",
        )


def _require_known(revision: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}
    if revision is not None and revision not in known:
        raise GloraError(
            Reason.DATABASE_UNUSABLE,
            f"The database was written by a newer glora (schema {revision}, newest known here: {head()}); "
            "install that version again, or restore the backup from before the upgrade.",
        )


def _lock(connection: Connection) -> None:
    """Let one process migrate at a time, and none wait for ever (SQLite: BEGIN IMMEDIATE has done that)."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL lock_timeout = '30s'")
        connection.exec_driver_sql("SET LOCAL statement_timeout = '10min'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")
