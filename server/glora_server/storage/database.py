"""Connections: one engine that writes and one that reads, for SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from glora_wire.errors import GloraError, Reason

READERS: Final = 3
"""Threads, and connections, that read at the same time."""
_BUSY_SECONDS: Final = 10.0
_WAL_LIMIT: Final = 64 * 1024 * 1024
_PAGE_BYTES: Final = 16 * 1024
"""Of a new database; one that exists keeps its own (4 KiB by default). States are what it mostly holds."""
_PRIVATE: Final = 0o600


@dataclass(frozen=True, slots=True)
class Database:
    """The two engines of a database, and its URL without the password."""

    writer: Engine
    reader: Engine | None
    """None: everything goes through the writer (SQLite in memory has one connection)."""
    url_for_log: str

    def dispose(self) -> None:
        """Close all connections."""
        if self.reader is not None:
            self.reader.dispose()
        self.writer.dispose()


def connect(url: str) -> Database:
    """Engines for `url`, which are not connected yet; raises DATABASE_UNUSABLE for a URL that cannot be used."""
    parsed = _parsed(url)
    try:
        match parsed.get_backend_name():
            case "sqlite":
                return _sqlite(parsed)
            case _:
                return _postgresql(parsed)
    except ModuleNotFoundError as error:
        raise GloraError(
            Reason.DATABASE_UNUSABLE,
            f"PostgreSQL needs the driver {error.name}, which is not installed: pip install 'glora[postgres]'.",
        ) from error


def url_for_log(url: str) -> str:
    """The URL with its password masked; "?" when it is not a URL."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "?"


def _parsed(url: str) -> URL:
    advice = "use sqlite:///FILE (four slashes for an absolute path) or postgresql://USER:PASSWORD@HOST/NAME"
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise GloraError(Reason.DATABASE_UNUSABLE, f"database.url is not a database URL; {advice}.") from error
    if backend == "postgres":
        parsed, backend = parsed.set(drivername="postgresql"), "postgresql"
    if backend not in {"sqlite", "postgresql"}:
        raise GloraError(Reason.DATABASE_UNUSABLE, f"database.url names {backend}, which is not supported; {advice}.")
    return parsed.set(drivername="sqlite" if backend == "sqlite" else "postgresql+psycopg")


def _sqlite(url: URL) -> Database:
    if url.database in {None, "", ":memory:"}:
        memory = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        _prepare_sqlite(memory, begin="BEGIN IMMEDIATE", read_only=False)
        return Database(memory, None, "sqlite://")
    if "uri" in url.query:
        raise GloraError(
            Reason.DATABASE_UNUSABLE, "database.url names the SQLite file by its path; leave out file: and uri=true."
        )
    _make_private(Path(str(url.database)))
    options = {"check_same_thread": False, "timeout": _BUSY_SECONDS}
    writer = create_engine(url, connect_args=options, pool_size=1, max_overflow=0)
    reader = create_engine(url, connect_args=options, pool_size=READERS, max_overflow=0)
    _prepare_sqlite(writer, begin="BEGIN IMMEDIATE", read_only=False)
    _prepare_sqlite(reader, begin="BEGIN", read_only=True)
    return Database(writer, reader, url.render_as_string())


def _make_private(path: Path) -> None:
    """Create the file readable by its owner only; SQLite gives its -wal and -shm files the same mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE))
    except FileNotFoundError as error:
        raise GloraError(
            Reason.DATABASE_UNUSABLE,
            f"The folder {path.absolute().parent} of the database does not exist; create it or correct database.url.",
        ) from error
    except OSError as error:
        raise GloraError(
            Reason.DATABASE_UNUSABLE,
            f"The database file {path} cannot be written ({error.strerror}); "
            "give this user write access to the file and its folder.",
        ) from error
    with contextlib.suppress(PermissionError):  # somebody else's file that we may write: its mode is their choice
        path.chmod(_PRIVATE)


def _prepare_sqlite(engine: Engine, *, begin: str, read_only: bool) -> None:
    """Make transactions begin with `begin`: sqlite3 by itself begins late, deferred, and not before a SAVEPOINT."""

    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        pragmas = [
            f"page_size={_PAGE_BYTES}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"busy_timeout={int(_BUSY_SECONDS * 1000)}",
            f"journal_size_limit={_WAL_LIMIT}",
            # Some builds write zeros over whatever is deleted, which is a whole state in every round.
            "secure_delete=FAST",
            f"query_only={'ON' if read_only else 'OFF'}",
        ]
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


def _postgresql(url: URL) -> Database:
    options: dict[str, Any] = {}
    if "connect_timeout" not in url.query:
        options["connect_timeout"] = 10
    if "application_name" not in url.query:
        options["application_name"] = "glora"
    writer = create_engine(url, connect_args=options, pool_size=1, max_overflow=0, isolation_level="READ COMMITTED")
    reader = create_engine(
        url,
        connect_args=options,
        pool_size=READERS,
        max_overflow=0,
        isolation_level="REPEATABLE READ",
        execution_options={"postgresql_readonly": True},
    )

    @event.listens_for(writer, "begin")
    def _begun(connection: Connection) -> None:
        # A row that another replica holds must not stop every writer here for ever.
        connection.exec_driver_sql("SET LOCAL lock_timeout = '10s'")

    return Database(writer, reader, url.render_as_string(hide_password=True))
