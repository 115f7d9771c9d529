"""Lists for operators: parts of long tables, joined with what a page shows of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import ColumnElement, and_, case, exists, func, select, text
from sqlalchemy.orm import InstrumentedAttribute

from glora_server.coordinator.model import (
    AuditEntry,
    Device,
    DeviceState,
    Listing,
    Measurement,
    ModuleDiagnostics,
    Page,
    Version,
)
from glora_server.coordinator.views_history import AuditFilter, Outcome, RosterEntry, Work
from glora_server.rounds.assignment import Assignment, AssignmentPhase
from glora_server.rounds.ids import DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.round import Round
from glora_server.storage.history_models import OutcomeRow
from glora_server.storage.models import (
    IS_OPEN,
    AssignmentRow,
    AuditRow,
    DeviceRow,
    DiagnosticsRow,
    MeasurementRow,
    RoundRow,
    RunRow,
    VersionRow,
)
from glora_server.storage.repositories.rounds import assignment_of
from glora_server.storage.repositories.rows import AnyRow, Order, Session, among, built, columns_of, page_of
from glora_wire.errors import GloraError, Reason

_FURTHEST = (
    AssignmentPhase.RECEIVED,
    AssignmentPhase.UPLOADING,
    AssignmentPhase.DELIVERED,
    AssignmentPhase.ACCEPTED,
    AssignmentPhase.OFFERED,
)


class ListsRepository:
    """Parts of long lists; see the port for what each method promises."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def roster(self, *, revoked: bool = False) -> tuple[RosterEntry, ...]:
        """Every device that is not revoked (or that is), in order of enrolment; reads the whole table."""
        counts: defaultdict[str, dict[Outcome, int]] = defaultdict(dict)
        for row in self._session.rows(columns_of(OutcomeRow)):
            counts[row.device_id][row.outcome] = row.number
        columns = (
            DeviceRow.id,
            DeviceRow.name,
            DeviceRow.state,
            DeviceRow.granted_rank,
            DeviceRow.tags,
            DeviceRow.created_at,
            DeviceRow.last_seen_at,
            DeviceRow.certificate_expires_at,
            DeviceRow.profile,
        )
        wanted = DeviceRow.state == DeviceState.REVOKED if revoked else DeviceRow.state != DeviceState.REVOKED
        rows = self._session.rows(select(*columns).where(wanted).order_by(DeviceRow.created_at, DeviceRow.id))
        return tuple(RosterEntry(**row._mapping, outcomes=counts.get(row.id, {})) for row in rows)

    def devices(self, ids: Collection[DeviceId]) -> Mapping[DeviceId, Device]:
        """The devices of these ids."""
        statement = columns_of(DeviceRow).where(among(self._session, DeviceRow.id, ids))
        return {row.id: built(Device, row) for row in self._session.rows(statement)} if ids else {}

    def outcomes(self, device_id: DeviceId) -> Mapping[Outcome, int]:
        """How the device's parts in rounds ended."""
        rows = self._session.rows(columns_of(OutcomeRow).where(OutcomeRow.device_id == device_id))
        return {row.outcome: row.number for row in rows}

    def rounds(self, run_id: RunId, page: Page) -> Listing[Round]:
        """Rounds of the run without their assignments, newest first."""
        order = Order((RoundRow.number, RoundRow.attempt), (int, int), descending=True)
        statement = columns_of(RoundRow).where(RoundRow.run_id == run_id)
        return page_of(self._session, statement, order, page, lambda row: built(Round, row))

    def round(self, run_id: RunId, number: int, attempt: int | None = None) -> Round:
        """A round without its assignments; raises ROUND_UNKNOWN."""
        statement = columns_of(RoundRow).where(RoundRow.run_id == run_id, RoundRow.number == number)
        if attempt is not None:
            statement = statement.where(RoundRow.attempt == attempt)
        row = self._session.first(statement.order_by(RoundRow.attempt.desc()).limit(1))
        if row is None:
            which = f"round {number}" if attempt is None else f"attempt {attempt} at round {number}"
            raise GloraError(
                Reason.ROUND_UNKNOWN, f"The run has no {which}; /rounds lists the ones it has.", round=number
            )
        return built(Round, row)

    def newest_round(self, run_id: RunId) -> Round | None:
        """The newest round of the run without its assignments."""
        return next(iter(self.rounds(run_id, Page(size=1)).items), None)

    def phases(self, round_ids: Collection[RoundId]) -> Mapping[RoundId, Mapping[AssignmentPhase, int]]:
        """How many assignments of each round stand in each phase."""
        found: dict[RoundId, dict[AssignmentPhase, int]] = {round_id: {} for round_id in round_ids}
        statement = (
            select(AssignmentRow.round_id, AssignmentRow.phase, func.count().label("number"))
            .where(among(self._session, AssignmentRow.round_id, round_ids))
            .group_by(AssignmentRow.round_id, AssignmentRow.phase)
        )
        for row in self._session.rows(statement) if found else ():
            found[RoundId(row.round_id)][row.phase] = row.number
        return found

    def assignments(self, round_id: RoundId, page: Page) -> Listing[Assignment]:
        """Assignments of a round, in their order."""
        order = Order((AssignmentRow.position, AssignmentRow.id), (int, str), descending=False)
        statement = columns_of(AssignmentRow).where(AssignmentRow.round_id == round_id)
        return page_of(self._session, statement, order, page, assignment_of)

    def open_assignments(self, round_id: RoundId, limit: int) -> tuple[Assignment, ...]:
        """Open assignments of a round, the furthest phases first."""
        places = {phase: place for place, phase in enumerate(_FURTHEST)}
        statement = (
            columns_of(AssignmentRow)
            .where(AssignmentRow.round_id == round_id, text(IS_OPEN))
            .order_by(case(places, value=AssignmentRow.phase), AssignmentRow.position)
            .limit(limit)
        )
        return tuple(assignment_of(row) for row in self._session.rows(statement))

    def open_evaluations(self, run_id: RunId, limit: int) -> tuple[Assignment, ...]:
        """Open assignments of the run that belong to no round, oldest first."""
        statement = (
            columns_of(AssignmentRow)
            .where(
                AssignmentRow.run_id == run_id,
                text("kind = 'evaluate'"),
                AssignmentRow.round_id.is_(None),
                text(IS_OPEN),
            )
            .order_by(AssignmentRow.offered_at, AssignmentRow.id)
            .limit(limit)
        )
        return tuple(assignment_of(row) for row in self._session.rows(statement))

    def open_of(self, device_ids: Collection[DeviceId]) -> Mapping[DeviceId, Assignment]:
        """The oldest open assignment of each of these devices that has one."""
        statement = (
            columns_of(AssignmentRow)
            .where(among(self._session, AssignmentRow.device_id, device_ids), text(IS_OPEN))
            .order_by(AssignmentRow.offered_at.desc(), AssignmentRow.id.desc())
        )
        rows = self._session.rows(statement) if device_ids else ()
        return {DeviceId(row.device_id): assignment_of(row) for row in rows}

    def work(self, device_id: DeviceId, page: Page) -> Listing[Work]:
        """Assignments of the device, newest first."""
        order = Order((AssignmentRow.offered_at, AssignmentRow.id), (float, str), descending=True)
        statement = columns_of(AssignmentRow).where(AssignmentRow.device_id == device_id)
        found = page_of(self._session, statement, order, page, assignment_of)
        names = self.run_names({assignment.run_id for assignment in found.items})
        rounds = self._numbers({item.round_id for item in found.items if item.round_id is not None})
        items = tuple(_work(item, names, rounds) for item in found.items)
        return Listing(items=items, next_token=found.next_token)

    def audit(self, wanted: AuditFilter, page: Page) -> Listing[AuditEntry]:
        """Rows of the audit, newest first."""
        statement = columns_of(AuditRow).where(*_audit_conditions(wanted))
        order = Order((AuditRow.id,), (int,), descending=True)
        return page_of(self._session, statement, order, page, lambda row: built(AuditEntry, row))

    def measurements(self, run_id: RunId, page: Page) -> Listing[Measurement]:
        """Evaluations of the run, by version number, rank, device."""
        columns = (
            MeasurementRow.version_number,
            MeasurementRow.rank,
            MeasurementRow.device_id,
            MeasurementRow.measured_at,
            MeasurementRow.assignment_id,
            MeasurementRow.phase,
        )
        order = Order(columns, (int, int, str, float, str, str), descending=False)
        statement = columns_of(MeasurementRow).where(MeasurementRow.run_id == run_id)
        return page_of(self._session, statement, order, page, lambda row: built(Measurement, row))

    def diagnostics(self, version_id: VersionId, page: Page) -> Listing[ModuleDiagnostics]:
        """What aggregation measured for the version, by module name."""
        order = Order((DiagnosticsRow.module,), (str,), descending=False)
        statement = columns_of(DiagnosticsRow).where(DiagnosticsRow.version_id == version_id)
        return page_of(self._session, statement, order, page, lambda row: built(ModuleDiagnostics, row))

    def kept_versions(self, run_id: RunId, page: Page) -> Listing[Version]:
        """Published versions whose tensors are still there, newest first."""
        order = Order((VersionRow.number,), (int,), descending=True)
        statement = columns_of(VersionRow).where(
            VersionRow.run_id == run_id, VersionRow.published, VersionRow.pruned.is_(False)
        )
        return page_of(self._session, statement, order, page, lambda row: built(Version, row))

    def run_names(self, run_ids: Collection[RunId]) -> Mapping[RunId, str]:
        """Names of these runs."""
        statement = select(RunRow.id, RunRow.name).where(among(self._session, RunRow.id, run_ids))
        return {RunId(row.id): row.name for row in self._session.rows(statement)} if run_ids else {}

    def unseen_version(self, run_id: RunId, device_id: DeviceId) -> Version | None:
        """The oldest version with tensors that the device has no evaluation of."""
        seen = exists().where(
            AssignmentRow.run_id == run_id,
            AssignmentRow.device_id == device_id,
            AssignmentRow.version_id == VersionRow.id,
            text("kind = 'evaluate'"),
        )
        statement = (
            columns_of(VersionRow)
            .where(VersionRow.run_id == run_id, VersionRow.published, VersionRow.pruned.is_(False), ~seen)
            .order_by(VersionRow.number)
            .limit(1)
        )
        row = self._session.first(statement)
        return None if row is None else built(Version, row)

    def last_rounds(self, run_ids: Collection[RunId], limit: int) -> tuple[Round, ...]:
        """The newest `limit` rounds of each of these runs, without assignments."""
        found: list[Round] = []
        for run_id in sorted(run_ids):
            found += self.rounds(run_id, Page(size=limit)).items
        return tuple(found)

    def size_bytes(self) -> int:
        """How large the database is: its pages (SQLite), or what PostgreSQL says."""
        if self._session.connection.dialect.name == "sqlite":
            pages = self._session.connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            size = self._session.connection.exec_driver_sql("PRAGMA page_size").scalar_one()
            return int(pages) * int(size)
        return int(
            self._session.connection.execute(select(func.pg_database_size(func.current_database()))).scalar_one()
        )

    def _numbers(self, round_ids: Collection[RoundId]) -> Mapping[str, AnyRow]:
        statement = select(RoundRow.id, RoundRow.number, RoundRow.attempt).where(
            among(self._session, RoundRow.id, round_ids)
        )
        return {row.id: row for row in self._session.rows(statement)} if round_ids else {}


def _work(assignment: Assignment, names: Mapping[RunId, str], rounds: Mapping[str, AnyRow]) -> Work:
    row = rounds.get(assignment.round_id or "")
    return Work(
        assignment=assignment,
        run_name=names.get(assignment.run_id, assignment.run_id),
        round_number=None if row is None else row.number,
        attempt=None if row is None else row.attempt,
    )


def _audit_conditions(wanted: AuditFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.actor:
        conditions.append(AuditRow.actor == wanted.actor)
    if wanted.action:
        whole = not wanted.action.endswith(".")
        conditions.append(AuditRow.action == wanted.action if whole else _begins(AuditRow.action, wanted.action))
    if wanted.target:
        conditions.append(AuditRow.target == wanted.target)
    if wanted.since is not None:
        conditions.append(AuditRow.at >= wanted.since)
    if wanted.until is not None:
        conditions.append(AuditRow.at < wanted.until)
    return conditions


def _begins(column: InstrumentedAttribute[Any], prefix: str) -> ColumnElement[bool]:
    """As a range, which an index can answer in every collation that we use."""
    return and_(column >= prefix, column < prefix[:-1] + chr(ord(prefix[-1]) + 1))
