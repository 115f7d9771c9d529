"""A private PostgreSQL cluster for the session, and a database of its own for each test."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import pytest_asyncio
from glora_processes import free_port
from storage_records import NOW

from glora_server.storage.store import SqlStore


def _binaries() -> Path | None:
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).parent
    installed = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    newest = max(installed, key=lambda path: int(path.parent.parent.name), default=None)
    return None if newest is None else newest.parent


def _as_postgres() -> list[str]:
    """PostgreSQL refuses to run as root; there it runs as the user that Debian made for it."""
    return ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a throw-away cluster, without a database name."""
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL on this machine: neither on PATH nor in /usr/lib/postgresql (package postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="glora-pg-", dir="/tmp"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        port = free_port()
        run = _as_postgres()
        initdb = [binaries / "initdb", "-D", folder / "data", "-A", "trust", "-U", "postgres", "-N", "-E", "UTF8"]
        subprocess.run([*run, *map(str, initdb), "--locale=C.UTF-8"], check=True, capture_output=True, cwd="/tmp")
        settings = ("fsync=off", "full_page_writes=off", "deadlock_timeout=100ms", "max_connections=60")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c {' -c '.join(settings)}"
        control = [*run, str(binaries / "pg_ctl"), "-D", str(folder / "data"), "-w", "-l", str(folder / "log")]
        subprocess.run([*control, "-o", options, "start"], check=True, stdout=subprocess.DEVNULL, cwd="/tmp")
        try:
            yield f"postgresql://postgres@127.0.0.1:{port}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, cwd="/tmp")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_admin(postgres_server: str) -> Iterator[psycopg.Connection]:
    """A connection that makes databases; nothing drops them, the cluster is thrown away as a whole."""
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE glora_template")
        SqlStore.open(f"{postgres_server}/glora_template").close_now()
        yield connection


@pytest.fixture
def postgres_url(postgres_server: str, postgres_admin: psycopg.Connection) -> str:
    """URL of a fresh database with the schema in it."""
    return _database(postgres_server, postgres_admin, "glora_template")


@pytest.fixture
def empty_postgres_url(postgres_server: str, postgres_admin: psycopg.Connection) -> str:
    """URL of a fresh, empty database."""
    return _database(postgres_server, postgres_admin, "template1")


def _database(server: str, admin: psycopg.Connection, template: str) -> str:
    name = f"glora_{uuid4().hex}"
    admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
    return f"{server}/{name}"


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty store, for each kind of database in turn."""
    match request.param:
        case "memory":
            return "sqlite://"
        case "sqlite":
            return f"sqlite:///{tmp_path}/glora.db"
        case _:
            return str(request.getfixturevalue("postgres_url"))


@pytest_asyncio.fixture
async def store(database_url: str) -> AsyncIterator[SqlStore]:
    """An empty store of each kind in turn, whose clock stands at NOW."""
    opened = SqlStore.open(database_url, clock=lambda: NOW)
    yield opened
    await opened.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that several processes can open."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/glora.db"
    return str(request.getfixturevalue("postgres_url"))
