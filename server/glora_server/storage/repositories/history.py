"""What is remembered of rounds and versions that are over, and answers that can be given again."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Double, case, cast, delete, func, literal_column, select, text
from sqlalchemy.orm import InstrumentedAttribute

from glora_server.coordinator.model import Listing, Measurement, MetricPhase, Page
from glora_server.coordinator.ports.history import KeptAnswer
from glora_server.coordinator.scores import version_scores
from glora_server.coordinator.views_history import (
    Contribution,
    Outcome,
    RoundFigures,
    VersionFigures,
    VersionScore,
)
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.ids import DeviceId, RoundId, RunId, VersionId
from glora_server.storage.history_codec import (
    modules_from,
    modules_text,
    round_figures_from,
    round_figures_text,
    spreads_from,
    spreads_text,
)
from glora_server.storage.history_models import (
    AnswerRow,
    ContributionRow,
    OutcomeRow,
    RoundFiguresRow,
    ScoreRow,
    VersionFiguresRow,
)
from glora_server.storage.models import AssignmentRow, MeasurementRow, UploadRow, VersionRow
from glora_server.storage.repositories.rows import (
    AnyRow,
    Order,
    Session,
    among,
    built,
    columns_of,
    insert_into,
    page_of,
    put_rows,
    values_of,
)


@cache
def _count(dialect: str) -> Any:
    """INSERT of an outcome, or one more of it."""
    statement = insert_into(dialect, OutcomeRow)
    return statement.on_conflict_do_update(
        index_elements=["device_id", "outcome"], set_={"number": OutcomeRow.number + statement.excluded.number}
    )


class HistoryRepository:
    """What was remembered; see the port for what each method promises."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def count_outcomes(self, ended: Iterable[tuple[DeviceId, Outcome]]) -> None:
        """Count how devices' parts in a round ended."""
        counted = Counter(ended)
        if not counted:
            return
        # Always in the same order, so that two replicas can not block each other.
        values = [
            {"device_id": device_id, "outcome": outcome, "number": number}
            for (device_id, outcome), number in sorted(counted.items())
        ]
        self._session.connection.execute(_count(self._session.connection.dialect.name), values)

    def put_round(self, figures: RoundFigures) -> None:
        """Store what a round came to."""
        values = {name: getattr(figures, name) for name in ("round_id", "run_id", "number", "attempt")}
        put_rows(self._session, RoundFiguresRow, [values | {"figures_json": round_figures_text(figures)}])

    def put_version(self, figures: VersionFigures) -> None:
        """Store what a version looks like."""
        values = {name: getattr(figures, name) for name in ("version_id", "run_id", "number")}
        put_rows(self._session, VersionFiguresRow, [values | {"modules_json": modules_text(figures.modules)}])

    def put_contributions(self, contributions: Sequence[Contribution]) -> None:
        """Store who made a version."""
        put_rows(self._session, ContributionRow, [values_of(item) for item in contributions])

    def rescore(self, run_id: RunId, version_number: int) -> None:
        """Store anew what devices measured of the version."""
        statement = columns_of(MeasurementRow).where(
            MeasurementRow.run_id == run_id, MeasurementRow.version_number == version_number
        )
        measured = [built(Measurement, row) for row in self._session.rows(statement)]
        rows = [
            values_of(score, without={"accuracies", "losses"}) | {"spreads_json": spreads_text(score)}
            for score in version_scores(run_id, measured)
        ]
        put_rows(self._session, ScoreRow, rows)

    def norms(self, round_id: RoundId) -> tuple[float, ...]:
        """Norms of the round's accepted updates."""
        statement = (
            select(UploadRow.update_norm)
            .join(AssignmentRow, AssignmentRow.id == UploadRow.assignment_id)
            .where(
                UploadRow.round_id == round_id,
                UploadRow.update_norm.is_not(None),
                AssignmentRow.phase == AssignmentPhase.ACCEPTED_UPDATE,
            )
        )
        return tuple(row.update_norm for row in self._session.rows(statement))

    def rounds_of(self, run_id: RunId, numbers: Collection[int]) -> tuple[RoundFigures, ...]:
        """What the last attempt at each of these rounds came to, by number."""
        statement = (
            columns_of(RoundFiguresRow)
            .where(RoundFiguresRow.run_id == run_id, RoundFiguresRow.number.in_(numbers))
            .order_by(RoundFiguresRow.number, RoundFiguresRow.attempt)
        )
        last = {row.number: row for row in self._session.rows(statement)} if numbers else {}
        return tuple(_round_figures(row) for row in last.values())

    def figures_of(self, round_ids: Collection[RoundId]) -> Mapping[RoundId, RoundFigures]:
        """What these rounds came to."""
        statement = columns_of(RoundFiguresRow).where(among(self._session, RoundFiguresRow.round_id, round_ids))
        rows = self._session.rows(statement) if round_ids else ()
        return {RoundId(row.round_id): _round_figures(row) for row in rows}

    def versions_of(self, run_id: RunId, numbers: Collection[int]) -> tuple[VersionFigures, ...]:
        """What these versions look like, by number."""
        statement = (
            columns_of(VersionFiguresRow)
            .where(VersionFiguresRow.run_id == run_id, VersionFiguresRow.number.in_(numbers))
            .order_by(VersionFiguresRow.number)
        )
        return tuple(
            VersionFigures(
                version_id=row.version_id, run_id=row.run_id, number=row.number, modules=modules_from(row.modules_json)
            )
            for row in (self._session.rows(statement) if numbers else ())
        )

    def summaries(self, run_id: RunId, numbers: Collection[int]) -> Mapping[int, Mapping[str, float]]:
        """Version.summary_json of these published versions, by number."""
        statement = (
            select(VersionRow.number, VersionRow.summary_json)
            .where(VersionRow.run_id == run_id, VersionRow.published, VersionRow.number.in_(numbers))
            .order_by(VersionRow.number)
        )
        rows = self._session.rows(statement) if numbers else ()
        return {row.number: json.loads(row.summary_json) for row in rows}

    def last_number(self, run_id: RunId) -> int | None:
        """The number of the newest published version."""
        statement = select(func.max(VersionRow.number).label("number")).where(
            VersionRow.run_id == run_id, VersionRow.published
        )
        row = self._session.first(statement)
        return None if row is None else row.number

    def scores(self, run_id: RunId, numbers: Collection[int]) -> tuple[VersionScore, ...]:
        """What was measured of these versions, by number, phase, rank."""
        statement = (
            columns_of(ScoreRow)
            .where(ScoreRow.run_id == run_id, ScoreRow.version_number.in_(numbers))
            .order_by(ScoreRow.version_number, ScoreRow.phase, ScoreRow.rank)
        )
        return tuple(_score(row) for row in (self._session.rows(statement) if numbers else ()))

    def fresh_scores(self, run_id: RunId, version_number: int) -> tuple[VersionScore, ...]:
        """Means from the measurements themselves, without spreads."""
        mine = MeasurementRow.run_id == run_id
        statement = (
            select(
                MeasurementRow.phase,
                MeasurementRow.rank,
                func.count(MeasurementRow.device_id.distinct()).label("devices"),
                func.sum(MeasurementRow.rows).label("rows"),
                _weighted(MeasurementRow.accuracy).label("accuracy"),
                _weighted(MeasurementRow.loss).label("loss"),
            )
            .where(mine, MeasurementRow.version_number == version_number)
            .group_by(MeasurementRow.phase, MeasurementRow.rank)
            .order_by(MeasurementRow.phase, MeasurementRow.rank)
        )
        return tuple(
            VersionScore(
                run_id=run_id,
                version_number=version_number,
                phase=MetricPhase(row.phase),
                rank=row.rank,
                devices=row.devices,
                rows=int(row.rows),
                accuracy=math.nan if row.accuracy is None else float(row.accuracy),
                loss=math.nan if row.loss is None else float(row.loss),
                accuracies=None,
                losses=None,
            )
            for row in self._session.rows(statement)
        )

    def contributions(self, version_id: VersionId, page: Page) -> Listing[Contribution]:
        """Who made the version, the largest share first."""
        order = Order((ContributionRow.share, ContributionRow.device_id), (float, str), descending=True)
        statement = columns_of(ContributionRow).where(ContributionRow.version_id == version_id)
        return page_of(self._session, statement, order, page, lambda row: built(Contribution, row))

    def contributors(self, version_ids: Collection[VersionId]) -> Mapping[VersionId, int]:
        """How many devices made each of these versions."""
        statement = (
            select(ContributionRow.version_id, func.count().label("devices"))
            .where(among(self._session, ContributionRow.version_id, version_ids))
            .group_by(ContributionRow.version_id)
        )
        return {row.version_id: row.devices for row in self._session.rows(statement)} if version_ids else {}

    def contributions_of(self, device_id: DeviceId, limit: int) -> tuple[Contribution, ...]:
        """The device's newest contributions, newest first."""
        statement = (
            columns_of(ContributionRow)
            .where(ContributionRow.device_id == device_id)
            .order_by(ContributionRow.at.desc(), ContributionRow.version_id)
            .limit(limit)
        )
        return tuple(built(Contribution, row) for row in self._session.rows(statement))

    def rejections(self, since: float, limit: int) -> Mapping[DeviceId, int]:
        """How many updates of each device were rejected since then; the `limit` most rejected."""
        number = func.count().label("number")
        # Not the bare column: SQLite would walk its index over all assignments to have the groups in order.
        who = func.coalesce(AssignmentRow.device_id, literal_column("''"))
        statement = (
            select(who.label("device_id"), number)
            .where(text("phase = 'rejected'"), AssignmentRow.closed_at >= since)  # as the index says it
            .group_by(who)
            .order_by(number.desc(), who)
            .limit(limit)
        )
        return {DeviceId(row.device_id): row.number for row in self._session.rows(statement)}


class AnswerRepository:
    """Answers that can be given again."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def find(self, principal: str, key_sha256: str, since: float) -> KeptAnswer | None:
        """The answer that was kept since then."""
        statement = select(AnswerRow.request_sha256, AnswerRow.sealed, AnswerRow.created_at).where(
            AnswerRow.principal == principal, AnswerRow.key_sha256 == key_sha256, AnswerRow.created_at >= since
        )
        row = self._session.first(statement)
        return None if row is None else built(KeptAnswer, row)

    def keep(self, principal: str, key_sha256: str, answer: KeptAnswer, *, forget_before: float) -> None:
        """Keep an answer, and forget those that are older than `forget_before`."""
        self._session.connection.execute(delete(AnswerRow).where(AnswerRow.created_at < forget_before))
        put_rows(self._session, AnswerRow, [{"principal": principal, "key_sha256": key_sha256} | values_of(answer)])


def _weighted(column: InstrumentedAttribute[float | None]) -> ColumnElement[Any]:
    """The mean of the column weighted with rows; rows without a number do not count, NULL when none has one."""
    counted = case((column.is_not(None), MeasurementRow.rows))
    return func.sum(cast(column, Double) * MeasurementRow.rows) / func.nullif(func.sum(counted), 0)


def _round_figures(row: AnyRow) -> RoundFigures:
    return round_figures_from(
        row.figures_json, round_id=row.round_id, run_id=row.run_id, number=row.number, attempt=row.attempt
    )


def _score(row: AnyRow) -> VersionScore:
    values = dict(row._mapping)
    accuracies, losses = spreads_from(values.pop("spreads_json"))
    return VersionScore(**values, accuracies=accuracies, losses=losses)
