"""The migrations make exactly the tables that the models describe, on both databases."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, Enum, inspect

from glora_server.storage import migrate
from glora_server.storage.database import connect
from glora_server.storage.models import Base
from glora_server.storage.store import SqlStore
from glora_wire.errors import GloraError, Reason


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    url = (
        f"sqlite:///{tmp_path}/glora.db" if request.param == "sqlite" else request.getfixturevalue("empty_postgres_url")
    )
    database = connect(url)
    yield url, database.writer
    database.dispose()


def _in_transaction(engine: Engine, work: Callable[..., Any], *arguments: Any) -> Any:
    with engine.begin() as connection:
        return work(connection, *arguments)


def _differences(engine: Engine) -> list[Any]:
    with engine.begin() as connection:
        return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))


def test_empty_to_head_equals_the_models(empty: tuple[str, Engine]) -> None:
    _, engine = empty
    assert _differences(engine)
    _in_transaction(engine, migrate.upgrade)
    assert _differences(engine) == []


def test_the_database_knows_every_value_of_every_enumeration(empty: tuple[str, Engine]) -> None:
    _, engine = empty
    _in_transaction(engine, migrate.upgrade)
    inspector = inspect(engine)
    listed = 0
    for table in Base.metadata.sorted_tables:
        checks = {str(check["name"]): check["sqltext"] for check in inspector.get_check_constraints(table.name)}
        for column in table.columns:
            if isinstance(column.type, Enum):
                listed += 1
                text = checks[f"ck_{table.name}_{column.name}"]
                assert set(re.findall(r"'([a-z_]+)'", text)) == set(column.type.enums)
    assert listed == 12


def test_upgrade_downgrade_upgrade(empty: tuple[str, Engine]) -> None:
    _, engine = empty
    _in_transaction(engine, migrate.upgrade)
    _in_transaction(engine, migrate.downgrade, "base")
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    assert _in_transaction(engine, migrate.current) is None
    _in_transaction(engine, migrate.upgrade)
    assert _in_transaction(engine, migrate.current) == migrate.head()
    assert _differences(engine) == []


def test_a_migration_that_fails_leaves_nothing(empty: tuple[str, Engine]) -> None:
    _, engine = empty

    def dies(connection: Connection) -> None:
        migrate.upgrade(connection)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        _in_transaction(engine, dies)
    assert inspect(engine).get_table_names() == []


def test_a_database_of_a_newer_program_is_refused(empty: tuple[str, Engine]) -> None:
    url, engine = empty
    _in_transaction(engine, migrate.upgrade)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    for wanted in (True, False):
        with pytest.raises(GloraError, match="newer glora") as raised:
            SqlStore.open(url, migrate=wanted)
        assert raised.value.reason is Reason.DATABASE_UNUSABLE


def test_without_migrate_an_empty_database_is_refused(empty: tuple[str, Engine]) -> None:
    url, engine = empty
    with pytest.raises(GloraError, match="glora db upgrade"):
        SqlStore.open(url, migrate=False)
    assert inspect(engine).get_table_names() == []
    SqlStore.open(url).close_now()
    SqlStore.open(url, migrate=False).close_now()


def test_postgresql_does_not_try_to_compress_tensors(postgres_url: str) -> None:
    engine = connect(postgres_url).writer
    with engine.begin() as connection:
        storage = connection.exec_driver_sql(
            "SELECT attstorage FROM pg_attribute WHERE attrelid = 'version_tensors'::regclass AND attname = 'data'"
        ).scalar_one()
    engine.dispose()
    assert storage in {"e", b"e"}
