"""Opening a store: what can be wrong is said in a sentence with what to do; the file is private."""

from __future__ import annotations

import errno
import os
import socket
import sqlite3
import stat
import sys
from pathlib import Path

import pytest
from storage_records import NOW, bound, token

from glora_server.coordinator.model import Page
from glora_server.coordinator.ports import UnitOfWork
from glora_server.storage.database import url_for_log
from glora_server.storage.store import SqlStore
from glora_server.storage.unit_of_work import SqlUnitOfWork
from glora_wire.errors import GloraError, Reason


def _refused(url: str, words: str) -> str:
    with pytest.raises(GloraError, match=words) as raised:
        SqlStore.open(url)
    assert raised.value.reason is Reason.DATABASE_UNUSABLE
    assert "\n" not in raised.value.message
    assert "secret" not in raised.value.message
    return raised.value.message


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "not a database URL"),
        ("glora.db", "use sqlite:///FILE"),
        ("mysql://root:secret@host/x", "names mysql, which is not supported"),
        ("nonsense://user:secret@host/x", "names nonsense, which is not supported"),
        ("sqlite:///file:x.db?mode=ro&uri=true", "leave out file: and uri=true"),
        ("postgresql://user:secret@host:port/x", "not a database URL"),
    ],
)
def test_a_url_that_cannot_be_used_is_explained(url: str, words: str) -> None:
    _refused(url, words)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    _refused(f"sqlite:///{tmp_path}/not/there.db", f"{tmp_path}/not of the database does not exist")


def test_a_folder_is_not_a_database(tmp_path: Path) -> None:
    _refused(f"sqlite:///{tmp_path}", "cannot be written .Is a directory.")


def test_a_file_of_another_kind_is_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "glora.db"
    path.write_text("These are notes, not a database. " * 100)
    _refused(f"sqlite:///{path}", "file is not a database. Name another file")
    assert path.read_text().startswith("These are notes")


def test_a_read_only_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    _refused(f"sqlite:///{tmp_path}/glora.db", "glora.db cannot be written .Permission denied.")


async def test_a_database_that_became_read_only_is_named(tmp_path: Path) -> None:
    store = SqlStore.open(f"sqlite:///{tmp_path}/glora.db")

    def freeze(uow: UnitOfWork) -> None:
        assert isinstance(uow, SqlUnitOfWork)
        uow.connection.exec_driver_sql("PRAGMA query_only = ON")

    await store.write(freeze)
    with pytest.raises(GloraError, match="write access to the file and its folder") as raised:
        await store.write(lambda uow: uow.tokens.add(token()))
    assert raised.value.reason is Reason.DATABASE_UNUSABLE
    await store.close()


def test_an_unreachable_postgresql_is_named_without_its_password() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        message = _refused(f"postgresql://ada:secret@127.0.0.1:{port}/glora", "Check the host and the port")
    assert f"ada:***@127.0.0.1:{port}/glora" in message


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    _refused("postgresql://ada:secret@127.0.0.1/glora", "pip install 'glora.postgres.'")


def test_passwords_stay_out_of_what_is_logged() -> None:
    assert url_for_log("postgresql://ada:secret@host/glora") == "postgresql://ada:***@host/glora"
    assert url_for_log("not a url secret") == "?"


async def test_the_file_and_its_journal_are_private(tmp_path: Path) -> None:
    path = tmp_path / "glora.db"
    path.touch(mode=0o644)
    store = SqlStore.open(f"sqlite:///{path}")
    await store.write(lambda uow: uow.tokens.add(token()))
    assert _modes(tmp_path) == {"glora.db": 0o600, "glora.db-wal": 0o600, "glora.db-shm": 0o600}
    await store.close()
    assert store.url_for_log == f"sqlite:///{path}"


def _modes(folder: Path) -> dict[str, int]:
    return {item.name: stat.S_IMODE(item.stat().st_mode) for item in folder.iterdir()}


async def test_what_was_written_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/glora.db"
    for number in range(3):
        store = SqlStore.open(url, clock=lambda: NOW)
        assert len((await store.read(lambda uow: uow.tokens.list(Page()))).items) == number
        await store.write(bound(lambda uow, name: uow.tokens.add(token(name)), f"t{number}"))
        await store.close()


async def test_commits_of_sqlite_reach_the_disk(tmp_path: Path) -> None:
    """WAL with synchronous=FULL: a commit is synced before anybody hears of it; foreign keys are checked."""
    store = SqlStore.open(f"sqlite:///{tmp_path}/glora.db")
    with store._database.writer.begin() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "query_only")
        }
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "query_only": 0}
    await store.close()


@pytest.mark.parametrize("there", [False, True])
async def test_a_new_database_has_large_pages_and_an_old_one_keeps_its_own(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "glora.db"
    if there:
        old = sqlite3.connect(path)
        old.execute("PRAGMA page_size = 4096")
        old.execute("CREATE TABLE other (id INTEGER)")
        old.close()
    store = SqlStore.open(f"sqlite:///{path}")
    with store._database.writer.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA page_size").scalar_one() == (4096 if there else 16384)
        assert connection.exec_driver_sql("PRAGMA secure_delete").scalar_one() == 2, "FAST: no zeros are written"
    await store.close()
