"""Rounds and assignments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from sqlalchemy import bindparam, insert, select, text

from glora_server.coordinator.model import Listing, Page
from glora_server.rounds.assignment import Assignment, AssignmentKind, AssignmentPhase
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.round import Round
from glora_server.storage.models import IS_LIVE, IS_OPEN, AssignmentRow, RoundRow
from glora_server.storage.recent_rounds import RecentRounds
from glora_server.storage.repositories.rows import (
    AnyRow,
    Order,
    Session,
    add_row,
    add_unless_there,
    columns_of,
    page_of,
    rows_where,
    save_row,
    update_row,
    values_of,
)
from glora_wire.errors import GloraError, Reason, Refusal

_OWN = {"assignments"}

# Made once: to build a statement takes longer than to execute it.
_NUMBER: Final = select(RoundRow.number).where(RoundRow.id == bindparam("round"))
_LATEST: Final = (
    columns_of(RoundRow)
    .where(RoundRow.run_id == bindparam("run"))
    .order_by(RoundRow.number.desc(), RoundRow.attempt.desc())
    .limit(1)
)
_OPEN_FOR: Final = (
    columns_of(AssignmentRow)
    .where(AssignmentRow.device_id == bindparam("device"), text(IS_OPEN))
    .order_by(AssignmentRow.offered_at, AssignmentRow.id)
)
_BUSY: Final = select(AssignmentRow.device_id).where(AssignmentRow.kind == AssignmentKind.TRAIN, text(IS_OPEN))
_DECLINED: Final = (
    select(AssignmentRow.device_id, AssignmentRow.closed_at, AssignmentRow.reason, AssignmentRow.message)
    .where(
        AssignmentRow.run_id == bindparam("run"),
        text("permanent"),
        AssignmentRow.phase.in_([AssignmentPhase.DECLINED, AssignmentPhase.FAILED]),
    )
    .order_by(AssignmentRow.closed_at, AssignmentRow.id)
)
_ADD: Final = insert(AssignmentRow)
_OF_ROUNDS: Final = (
    columns_of(AssignmentRow)
    .where(AssignmentRow.round_id.in_(bindparam("rounds", expanding=True)))
    .order_by(AssignmentRow.position, AssignmentRow.id)
)


class RoundRepository:
    """Rounds with their assignments, and assignments that belong to no round (evaluations)."""

    def __init__(self, session: Session, recent: RecentRounds) -> None:
        self._session = session
        self._recent = recent
        # What this transaction has seen of a round: `save` compares with it instead of asking again. It can not be
        # outdated: an assignment of a round changes with its round only, and `save` compares the row version first.
        self._seen: dict[RoundId, Round] = {}

    @property
    def seen(self) -> Collection[Round]:
        """Rounds that were read or saved, as they are when the transaction is committed now."""
        return self._seen.values()

    def add(self, round_: Round) -> None:
        """Store a new round and its assignments; raises STALE_STATE when another replica planned the same one."""
        if not add_unless_there(self._session, RoundRow, values_of(round_, without=_OWN)):
            raise GloraError(
                Reason.STALE_STATE,
                f"Attempt {round_.attempt} at round {round_.number} was planned by somebody else in the meantime.",
                round=round_.number,
            )
        self._add_assignments(list(enumerate(round_.assignments)))

    def get(self, round_id: RoundId) -> Round:
        """The round with all assignments; raises ROUND_UNKNOWN."""
        row = self._session.first(rows_where(RoundRow, "id"), {"id": round_id}, lock=True)
        if row is None:
            raise GloraError(Reason.ROUND_UNKNOWN, f"There is no round {round_id!r}.", round=round_id)
        return self._see(row)

    def number(self, round_id: RoundId) -> int:
        """The round's number, without its assignments; raises ROUND_UNKNOWN."""
        row = self._session.first(_NUMBER, {"round": round_id})
        if row is None:
            raise GloraError(Reason.ROUND_UNKNOWN, f"There is no round {round_id!r}.", round=round_id)
        return int(row.number)

    def save(self, round_: Round) -> Round:
        """Store the round and those assignments that changed; raises STALE_STATE."""
        saved = save_row(self._session, RoundRow, round_, what=f"Round {round_.number}", without=_OWN)
        stored = {item.id: item for item in self._stored_assignments(round_)}
        self._add_assignments([(i, item) for i, item in enumerate(round_.assignments) if item.id not in stored])
        for item in round_.assignments:
            before = stored.get(item.id)
            if before is not None and before is not item and before != item:
                self._update(item)
        self._seen[saved.id] = saved
        return saved

    def latest(self, run_id: RunId) -> Round | None:
        """The newest round (highest number, then attempt) of the run."""
        row = self._session.first(_LATEST, {"run": run_id}, lock=True)
        return None if row is None else self._see(row)

    def live(self) -> tuple[Round, ...]:
        """Every round that has not ended, of all runs, oldest first."""
        statement = columns_of(RoundRow).where(text(IS_LIVE)).order_by(RoundRow.created_at, RoundRow.id)
        return tuple(self._whole(self._session.rows(statement)))

    def list(self, run_id: RunId, page: Page) -> Listing[Round]:
        """Rounds of the run with their assignments, newest first."""
        order = Order((RoundRow.number, RoundRow.attempt), (int, int), descending=True)
        statement = columns_of(RoundRow).where(RoundRow.run_id == run_id)
        rows = page_of(self._session, statement, order, page, lambda row: row)
        return Listing(items=tuple(self._whole(rows.items)), next_token=rows.next_token)

    def assignment(self, assignment_id: AssignmentId) -> Assignment:
        """The assignment; raises ASSIGNMENT_UNKNOWN."""
        statement, wanted = rows_where(AssignmentRow, "id"), {"id": assignment_id}
        row = self._session.first(statement, wanted)
        if row is not None and row.round_id is None and self._session.locks:
            # One of a round is guarded by the round's row version; locking it before its round could deadlock.
            row = self._session.first(statement, wanted, lock=True)
        if row is None:
            raise _unknown(assignment_id)
        return assignment_of(row)

    def add_assignment(self, assignment: Assignment) -> None:
        """Store an assignment that belongs to no round."""
        add_row(self._session, AssignmentRow, values_of(assignment) | {"position": 0})

    def save_assignment(self, assignment: Assignment) -> None:
        """Store a change of an assignment that belongs to no round."""
        if assignment.round_id is not None:
            self._seen.pop(assignment.round_id, None)
        self._update(assignment)

    def open_for(self, device_id: DeviceId) -> tuple[Assignment, ...]:
        """Open assignments of the device, oldest first."""
        return tuple(assignment_of(row) for row in self._session.rows(_OPEN_FOR, {"device": device_id}))

    def busy_devices(self) -> frozenset[DeviceId]:
        """Devices with an open TRAIN assignment."""
        return frozenset(DeviceId(row.device_id) for row in self._session.rows(_BUSY))

    def declined_for(self, run_id: RunId) -> Mapping[DeviceId, tuple[float, Refusal]]:
        """Devices that declined or failed for good in this run, with when and why (the newest word counts)."""
        return {
            DeviceId(row.device_id): (
                row.closed_at or 0.0,
                Refusal(reason=row.reason or Reason.INTERNAL, message=row.message),
            )
            for row in self._session.rows(_DECLINED, {"run": run_id})
        }

    def was_evaluated(self, device_id: DeviceId, version_id: VersionId) -> bool:
        """The device has an EVALUATE assignment for the version, in whatever phase."""
        statement = (
            select(AssignmentRow.id)
            .where(
                AssignmentRow.device_id == device_id, AssignmentRow.version_id == version_id, text("kind = 'evaluate'")
            )
            .limit(1)
        )
        return self._session.first(statement) is not None

    def _add_assignments(self, items: Sequence[tuple[int, Assignment]]) -> None:
        if items:
            values = [values_of(item) | {"position": position} for position, item in items]
            self._session.connection.execute(_ADD, values)

    def _update(self, assignment: Assignment) -> None:
        if not update_row(self._session, AssignmentRow, assignment.id, values_of(assignment, without={"id"})):
            raise _unknown(assignment.id)

    def _see(self, row: AnyRow) -> Round:
        """The round of the row with its assignments, remembered."""
        known = self._seen.get(row.id) or self._recent.find(row.id, row.row_version)
        found = known if known is not None and known.row_version == row.row_version else self._whole([row])[0]
        self._seen[found.id] = found
        return found

    def _stored_assignments(self, round_: Round) -> Sequence[Assignment]:
        """The assignments of the round as the database has them."""
        seen = self._seen.get(round_.id)
        if seen is not None and seen.row_version == round_.row_version:
            return seen.assignments
        return self._whole_assignments([round_.id])[round_.id]

    def _whole(self, rows: Sequence[AnyRow]) -> Sequence[Round]:
        """The rounds of the rows, with their assignments, in one more query."""
        assignments = self._whole_assignments([row.id for row in rows])
        return [Round(**row._mapping, assignments=tuple(assignments[row.id])) for row in rows]

    def _whole_assignments(self, round_ids: Iterable[str]) -> Mapping[str, Sequence[Assignment]]:
        wanted = list(round_ids)
        found: defaultdict[str, list[Assignment]] = defaultdict(list)
        if wanted:
            for row in self._session.rows(_OF_ROUNDS, {"rounds": wanted}):
                found[row.round_id].append(assignment_of(row))
        return found


def assignment_of(row: AnyRow) -> Assignment:
    """The assignment of a row."""
    values = dict(row._mapping)
    del values["position"]
    return Assignment(**values)


def _unknown(assignment_id: str) -> GloraError:
    return GloraError(Reason.ASSIGNMENT_UNKNOWN, f"There is no assignment {assignment_id!r}.", assignment=assignment_id)
