"""`glora db …`: the schema of the database; the only commands besides the server that open it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from glora_cli.group import group
from glora_cli.output import JsonFlag
from glora_cli.server_command import ConfigFile, DataDir
from glora_server.config import Settings, prepare_data_dir
from glora_server.storage import migrate
from glora_server.storage.database import Database, connect
from glora_server.storage.errors import unusable
from glora_wire.errors import GloraError, Reason

app = group(
    "Look after the database. The server brings it up to date by itself when it starts.",
    "glora db current                    which revision it has",
    "glora db upgrade --data-dir DIR     bring it up to date before a server starts",
)


@app.command()
def current(*, config: ConfigFile = None, data_dir: DataDir = None, as_json: JsonFlag = False) -> None:
    """Show the revision that the database has, and the one that this version works with."""
    settings = Settings.load(config, data_dir)
    file = settings.data_dir / "glora.sqlite3"
    if not settings.database.url.get_secret_value() and not file.exists():
        sentence = (
            f"There is no database {file} yet; the server makes it when it starts, and so does `glora db upgrade`."
        )
        raise GloraError(Reason.DATA_DIR_UNUSABLE, sentence)
    with _connection(settings) as (database, connection):
        found, wanted = migrate.current(connection), migrate.head()
    if as_json:
        typer.echo(json.dumps({"database": database.url_for_log, "current": found, "head": wanted}))
        return
    state = "up to date" if found == wanted else "run `glora db upgrade`, or start the server"
    typer.echo(f"{database.url_for_log}: {found or 'empty'}; this version works with {wanted}: {state}")


@app.command()
def upgrade(*, config: ConfigFile = None, data_dir: DataDir = None) -> None:
    """Bring the database to the schema of this version; harmless when it is there already."""
    settings = Settings.load(config, data_dir)
    prepare_data_dir(settings.data_dir)
    with _connection(settings) as (database, connection):
        before = migrate.current(connection)
        migrate.upgrade(connection)
        after = migrate.current(connection)
    moved = "was up to date" if before == after else f"upgraded from {before or 'empty'}"
    typer.echo(f"{database.url_for_log}: {after}, {moved}")


@contextmanager
def _connection(settings: Settings) -> Iterator[tuple[Database, Connection]]:
    """A connection inside a transaction that is committed at the end; raises DATABASE_UNUSABLE."""
    database = connect(settings.database_url)
    try:
        with database.writer.begin() as connection:
            yield database, connection
    except SQLAlchemyError as error:
        raise unusable(error, database.url_for_log) from error
    finally:
        database.dispose()
