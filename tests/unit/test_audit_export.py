"""The audit as one JSON file, however long it is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from access_cases import memory_access
from storage_records import NOW

from glora_dashboard.audit_routes import written_audit
from glora_server.coordinator.model import AuditEntry, Listing, Page
from glora_server.coordinator.ports import Store, UnitOfWork
from glora_server.coordinator.views_history import AuditFilter

ENTRY = AuditEntry(
    at=NOW, actor="ada", origin="192.0.2.7", action="run.edit", target="demo", after_json='{"quorum": 2}'
)
ALL = AuditFilter()


class Asked:
    """The audit of a store; remembers how much was asked at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.sizes: list[int] = []

    async def audit(self, page: Page, wanted: AuditFilter = ALL) -> Listing[AuditEntry]:
        self.sizes.append(page.size)
        return await self._store.read(lambda uow: uow.lists.audit(wanted, page))


@pytest.mark.parametrize("rows", [0, 1, 1203])
async def test_every_row_that_fits_is_written_once_and_few_are_held(rows: int) -> None:
    with memory_access("none") as access:

        def fill(uow: UnitOfWork) -> None:
            for number in range(rows):
                uow.audit.add(replace(ENTRY, at=NOW + number))
            uow.audit.add(replace(ENTRY, actor="bob"))

        await access.store.write(fill)
        asked = Asked(access.store)
        parts = [part async for part in written_audit(asked, AuditFilter(actor="ada"))]
    told = json.loads(b"".join(parts))
    assert [row["at"] for row in told] == [NOW + number for number in reversed(range(rows))]
    assert all(row["after"] == {"quorum": 2} for row in told)
    assert max(asked.sizes) <= 500
    assert len(asked.sizes) == max(1, -(-rows // 500))
