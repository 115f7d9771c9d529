"""What asking `Queries` needs besides a database, and how many rows an answer took out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glora_server.coordinator.views import SystemView
from glora_server.coordinator.views_history import DeviceCounts
from glora_server.storage.repositories.rows import Query, Session


@dataclass(slots=True)
class Reading:
    """Rows that came out of the database so far."""

    rows: int = 0


def counted(replace: Callable[[type, str, object], None]) -> Reading:
    """Counts every row that sessions read from now on; `replace` sets an attribute, as `setattr` does."""
    found = Reading()
    rows, first = Session.rows, Session.first

    def count_rows(self: Session, statement: Query, values: Mapping[str, object] | None = None) -> object:
        result = rows(self, statement, values)
        found.rows += len(result)
        return result

    def count_first(
        self: Session, statement: Query, values: Mapping[str, object] | None = None, *, lock: bool = False
    ) -> object:
        found.rows += 1
        return first(self, statement, values, lock=lock)

    replace(Session, "rows", count_rows)
    replace(Session, "first", count_first)
    return found


def system_at(now: float) -> Callable[[object, DeviceCounts], SystemView]:
    """A server that is well but for its full disk, at `now` (Unix seconds)."""

    def view(_uow: object, devices: DeviceCounts) -> SystemView:
        return SystemView(
            version="0",
            started_at=now - 3600,
            now=now,
            grpc_port=1,
            enrolment_port=2,
            http_port=3,
            database="sqlite",
            database_revision="0003",
            worker_device="cpu",
            authority_pin="",
            authority_expires_at=now + 1e8,
            renewal_overdue_seconds=15 * 86400,
            devices=devices.total,
            online_devices=devices.online,
            active_runs=1,
            free_disk_bytes=10**9,
            disk_bytes=10**12,
        )

    return view
