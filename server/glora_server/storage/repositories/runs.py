"""Runs."""

from __future__ import annotations

from typing import Final

from sqlalchemy import and_, bindparam, or_, select

from glora_server.coordinator.model import Listing, Page, Run
from glora_server.rounds.ids import RunId
from glora_server.rounds.run import RunPhase
from glora_server.storage.models import RunRow
from glora_server.storage.repositories.rows import (
    Order,
    Session,
    add_unless_there,
    built,
    columns_of,
    page_of,
    rows_where,
    save_row,
    values_of,
)
from glora_wire.errors import GloraError, Reason

_ENDED = (RunPhase.COMPLETED, RunPhase.FAILED, RunPhase.ABORTED)
_LINGER_SECONDS: Final = 86400.0
"""How long a completed run still counts as active: devices that evaluate report its last version."""
_NAMES_SHOWN: Final = 5
_ACTIVE: Final = (
    columns_of(RunRow)
    .where(
        or_(
            RunRow.phase.in_([RunPhase.ACTIVE, RunPhase.PAUSED]),
            and_(RunRow.phase.in_(_ENDED), RunRow.ended_at >= bindparam("since")),
        )
    )
    .order_by(RunRow.created_at, RunRow.id)
)


class RunRepository:
    """Runs."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, run: Run) -> None:
        """Store a new run; raises NAME_TAKEN."""
        if not add_unless_there(self._session, RunRow, values_of(run)):
            raise GloraError(
                Reason.NAME_TAKEN, f"There is a run named {run.name!r} already; choose another name.", name=run.name
            )

    def get(self, run_id: RunId) -> Run:
        """The run; raises RUN_UNKNOWN."""
        row = self._session.first(rows_where(RunRow, "id"), {"id": run_id}, lock=True)
        if row is None:
            raise self._unknown(run_id)
        return built(Run, row)

    def by_name(self, name: str) -> Run:
        """The run of that name or id (the name first); raises RUN_UNKNOWN naming some that exist."""
        statement = (
            columns_of(RunRow).where(or_(RunRow.name == name, RunRow.id == name)).order_by(RunRow.name != name).limit(1)
        )
        row = self._session.first(statement, lock=True)
        if row is None:
            raise self._unknown(name)
        return built(Run, row)

    def save(self, run: Run) -> Run:
        """Store a change; raises STALE_STATE."""
        return save_row(self._session, RunRow, run, what=f"The run {run.name!r}")

    def list(self, page: Page) -> Listing[Run]:
        """Runs, newest first."""
        order = Order((RunRow.created_at, RunRow.id), (float, str), descending=True)
        return page_of(self._session, columns_of(RunRow), order, page, lambda row: built(Run, row))

    def active(self) -> tuple[Run, ...]:
        """Runs that are active or paused, or ended within the last day, oldest first."""
        since = self._session.now() - _LINGER_SECONDS
        return tuple(built(Run, row) for row in self._session.rows(_ACTIVE, {"since": since}))

    def _unknown(self, name: str) -> GloraError:
        recent = select(RunRow.name).order_by(RunRow.created_at.desc(), RunRow.id).limit(_NAMES_SHOWN)
        names = [row.name for row in self._session.rows(recent)]
        there = f"the newest are {', '.join(names)}" if names else "there is none yet: `glora run create`"
        return GloraError(Reason.RUN_UNKNOWN, f"There is no run {name!r}; {there}.", run=name)
