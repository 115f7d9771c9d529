"""What the repositories share: records as rows, saves that compare row versions, lists in pages."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Final, TypeVar

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Row,
    Select,
    Text,
    bindparam,
    cast,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import InstrumentedAttribute

from glora_server.coordinator.model import Device, Listing, Page, Run, TokenRecord
from glora_server.coordinator.people import ApiToken, User
from glora_server.rounds.round import Round
from glora_server.storage.models import Base
from glora_wire.errors import GloraError, Reason

R = TypeVar("R")
V = TypeVar("V", Device, TokenRecord, Run, Round, User, ApiToken)

Query = Select[*tuple[Any, ...]]
AnyRow = Row[*tuple[Any, ...]]

_LARGEST_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class Session:
    """A connection inside a transaction, and whether rows that are loaded to be changed must be locked."""

    connection: Connection
    locks: bool
    now: Callable[[], float]

    def rows(self, statement: Query, values: Mapping[str, Any] | None = None) -> Sequence[AnyRow]:
        """All rows of the statement; `values` of its parameters."""
        return self.connection.execute(statement, values).all()

    def first(self, statement: Query, values: Mapping[str, Any] | None = None, *, lock: bool = False) -> AnyRow | None:
        """The first row; with `lock`, kept from other writers until the transaction ends.

        SQLite ignores the clause: there BEGIN IMMEDIATE keeps all other writers out. NO KEY: rows that refer to the
        locked one may still be added.
        """
        if lock and self.locks:
            statement = statement.with_for_update(key_share=True)
        return self.connection.execute(statement, values).first()


def columns_of(row: type[Base]) -> Query:
    """SELECT of all columns of the table."""
    return select(row)


@cache
def rows_where(row: type[Base], *names: str) -> Query:
    """SELECT of all columns WHERE each of the named ones equals the parameter of its name.

    Made once for each table and names: to build a statement takes five times as long as SQLite needs to answer it.
    """
    columns = row.__table__.c
    return select(row).where(*(columns[name] == bindparam(name) for name in names))


def among(session: Session, column: InstrumentedAttribute[Any], values: Collection[str]) -> ColumnElement[bool]:
    """The column has one of the values, however many: they go in as one JSON text, not as a parameter each."""
    words = json.dumps(list(values))
    if session.connection.dialect.name == "sqlite":
        return column.in_(select(func.json_each(words).table_valued("value").c.value))
    return column.in_(select(func.json_array_elements_text(cast(literal(words, Text), JSON)).column_valued("word")))


def values_of(record: Any, *, without: Collection[str] = ()) -> dict[str, Any]:
    """The fields of the record by name, as column values."""
    return {field.name: getattr(record, field.name) for field in fields(record) if field.name not in without}


def built(record: type[R], row: AnyRow) -> R:
    """The record that the row's columns make."""
    return record(**row._mapping)


def add_row(session: Session, row: type[Base], values: dict[str, Any]) -> None:
    """INSERT."""
    session.connection.execute(_insert(row), values)


def add_unless_there(session: Session, row: type[Base], values: dict[str, Any]) -> bool:
    """INSERT unless a unique key is taken; whether it was inserted. Nothing breaks the transaction."""
    statement = _insert_unless_there(row, session.connection.dialect.name)
    return session.connection.execute(statement, values).first() is not None


def put_rows(session: Session, row: type[Base], values: Sequence[dict[str, Any]]) -> None:
    """INSERT, or replace what has the same primary key."""
    if not values:
        return
    statement = _upsert(row, session.connection.dialect.name, tuple(values[0]))
    session.connection.execute(statement, list(values))


def insert_into(dialect: str, row: type[Base]) -> Any:
    """INSERT of the dialect, which knows ON CONFLICT."""
    return sqlite.insert(row) if dialect == "sqlite" else postgresql.insert(row)


def save_row(session: Session, row: type[Base], record: V, *, what: str, without: Collection[str] = ()) -> V:
    """UPDATE if the row version is still that of the record; the record with the next one; raises STALE_STATE."""
    values = values_of(record, without={"id", *without}) | {"row_version": record.row_version + 1}
    known = {"known_id": record.id, "known_row_version": record.row_version}
    if session.connection.execute(_update(row, "id", "row_version"), values | known).rowcount != 1:
        raise GloraError(
            Reason.STALE_STATE,
            f"{what} was changed by somebody else in the meantime; look at it again and repeat the change.",
            id=record.id,
        )
    return replace(record, row_version=record.row_version + 1)


def update_row(session: Session, row: type[Base], row_id: str, values: dict[str, Any]) -> bool:
    """UPDATE of the row of that id; whether there is one."""
    return session.connection.execute(_update(row, "id"), values | {"known_id": row_id}).rowcount == 1


# Statements that depend on the table alone are made once, see `rows_where`; what they store are parameters.


@cache
def _insert(row: type[Base]) -> Any:
    return insert(row)


@cache
def _insert_unless_there(row: type[Base], dialect: str) -> Any:
    first = next(iter(row.__table__.primary_key))
    return insert_into(dialect, row).on_conflict_do_nothing().returning(first)


@cache
def _upsert(row: type[Base], dialect: str, names: tuple[str, ...]) -> Any:
    keys = [column.name for column in row.__table__.primary_key]
    statement = insert_into(dialect, row)
    changed = {name: statement.excluded[name] for name in names if name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=changed)


@cache
def _update(row: type[Base], *known: str) -> Any:
    columns = row.__table__.c
    return update(row).where(*(columns[name] == bindparam(f"known_{name}") for name in known))


@dataclass(frozen=True, slots=True)
class Order:
    """How a list is ordered: columns that together are unique, and the types of their values."""

    columns: tuple[InstrumentedAttribute[Any], ...]
    types: tuple[type[float | str], ...]
    descending: bool


def page_of(session: Session, statement: Query, order: Order, page: Page, build: Callable[[AnyRow], R]) -> Listing[R]:
    """The part of the statement's rows that `page` asks for; raises SPEC_INVALID for a token that we did not make."""
    if page.size < 1:
        raise GloraError(Reason.REQUEST_INVALID, f"A page has at least one item, not {page.size}.", page_size=page.size)
    size = min(page.size, _LARGEST_PAGE)
    key = tuple_(*order.columns)
    if page.token:
        last = tuple_(*(literal(v, c.type) for c, v in zip(order.columns, _decoded(page.token, order), strict=True)))
        statement = statement.where(key < last if order.descending else key > last)
    ordered = [column.desc() if order.descending else column.asc() for column in order.columns]
    rows = session.rows(statement.order_by(*ordered).limit(size + 1))
    items = tuple(build(row) for row in rows[:size])
    if len(rows) <= size:
        return Listing(items=items)
    return Listing(items=items, next_token=_encoded(rows[size - 1], order))


def _encoded(row: AnyRow, order: Order) -> str:
    values = [row._mapping[column.key] for column in order.columns]
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


def _decoded(token: str, order: Order) -> list[float | str]:
    try:
        padded = token + "=" * (-len(token) % 4)
        values = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError) as error:
        raise _not_ours(token) from error
    if not isinstance(values, list) or [type(value) for value in values] != list(order.types):
        raise _not_ours(token)
    return values


def _not_ours(token: str) -> GloraError:
    return GloraError(
        Reason.REQUEST_INVALID,
        "The page token is not one that this list gave out; leave it out to start from the beginning.",
        page_token=token[:80],
    )
