"""Uploads and measurements: what devices reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from sqlalchemy import bindparam, func, select, update

from glora_server.coordinator.model import Measurement, Upload
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId
from glora_server.storage.models import MeasurementRow, RoundRow, UploadRow
from glora_server.storage.repositories.rows import (
    Session,
    add_unless_there,
    built,
    put_rows,
    rows_where,
    values_of,
)
from glora_wire.errors import GloraError, Reason

_JUDGED: Final = (
    update(UploadRow)
    .where(UploadRow.assignment_id == bindparam("assignment"))
    .values(update_norm=bindparam("norm"), shrunk_rank=bindparam("rank"))
)


class UploadRepository:
    """Whole updates; the primary key refuses a second one for an assignment."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, upload: Upload) -> None:
        """Store a received update; raises UPLOAD_CONFLICT when the assignment has one already."""
        if not add_unless_there(self._session, UploadRow, values_of(upload)):
            raise GloraError(
                Reason.UPLOAD_CONFLICT,
                f"Assignment {upload.assignment_id} has an update already; only the first one counts.",
                assignment=upload.assignment_id,
            )

    def find(self, assignment_id: AssignmentId) -> Upload | None:
        """The update of the assignment."""
        row = self._session.first(rows_where(UploadRow, "assignment_id"), {"assignment_id": assignment_id})
        return None if row is None else built(Upload, row)

    def of_round(self, round_id: RoundId) -> tuple[Upload, ...]:
        """Updates of the round, in order of assignment id."""
        rows = self._session.rows(rows_where(UploadRow, "round_id"), {"round_id": round_id})
        # Sorted here: what order text has in PostgreSQL depends on its locale, and folding must not.
        return tuple(sorted((built(Upload, row) for row in rows), key=lambda upload: upload.assignment_id))

    def judged(self, assignment_id: AssignmentId, update_norm: float | None, shrunk_rank: int | None = None) -> None:
        """Note the norm that validation measured, and the rank of an update that has a smaller one than granted."""
        values = {"assignment": assignment_id, "norm": update_norm, "rank": shrunk_rank}
        if self._session.connection.execute(_JUDGED, values).rowcount != 1:
            raise GloraError(
                Reason.ASSIGNMENT_UNKNOWN, f"Assignment {assignment_id} has no update.", assignment=assignment_id
            )

    def shrunk(self, run_id: RunId) -> Mapping[DeviceId, int]:
        """The smallest rank that each device shrank to in the run; devices that never did are absent."""
        statement = (
            select(UploadRow.device_id, func.min(UploadRow.shrunk_rank).label("rank"))
            .join(RoundRow, RoundRow.id == UploadRow.round_id)
            .where(RoundRow.run_id == run_id, UploadRow.shrunk_rank.is_not(None))
            .group_by(UploadRow.device_id)
        )
        return {DeviceId(row.device_id): row.rank for row in self._session.rows(statement)}

    def digests(self) -> frozenset[str]:
        """Digest.text of every blob that an upload row refers to (for clean-up)."""
        return frozenset(row.digest.text for row in self._session.rows(select(UploadRow.digest).distinct()))


class MeasurementRepository:
    """Evaluations."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, measurements: Sequence[Measurement]) -> None:
        """Store or replace by (assignment, phase, rank)."""
        put_rows(self._session, MeasurementRow, [values_of(item) for item in measurements])
