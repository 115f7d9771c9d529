"""The audit log and the outbox."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from sqlalchemy import bindparam, delete, insert

from glora_server.coordinator.model import AuditEntry, Listing, Owed, Page
from glora_server.storage.models import AuditRow, OwedRow
from glora_server.storage.repositories.rows import (
    Order,
    Session,
    add_row,
    built,
    columns_of,
    page_of,
    values_of,
)

_NUMBERED = {"id"}
_OWE: Final = insert(OwedRow)
_PENDING: Final = columns_of(OwedRow).order_by(OwedRow.id)
_DONE: Final = delete(OwedRow).where(OwedRow.id == bindparam("done"))


class AuditRepository:
    """Who did what."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, entry: AuditEntry) -> None:
        """Append; the database numbers it."""
        add_row(self._session, AuditRow, values_of(entry, without=_NUMBERED))

    def list(self, page: Page) -> Listing[AuditEntry]:
        """Newest first."""
        order = Order((AuditRow.id,), (int,), descending=True)
        return page_of(self._session, columns_of(AuditRow), order, page, lambda row: built(AuditEntry, row))


class OutboxRepository:
    """Effects that are owed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, owed: Iterable[Owed]) -> None:
        """Store, in the same transaction as what they follow from; the database numbers them."""
        values = [values_of(item, without=_NUMBERED) for item in owed]
        if values:
            self._session.connection.execute(_OWE, values)

    def pending(self) -> tuple[Owed, ...]:
        """All that is owed, oldest first."""
        return tuple(built(Owed, row) for row in self._session.rows(_PENDING))

    def done(self, owed_id: int) -> None:
        """Performed; doing it twice is harmless."""
        self._session.connection.execute(_DONE, {"done": owed_id})
