"""Answers of the REST API about runs and rounds; times in Unix seconds."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from glora_dashboard.models import Answer, AssignmentAnswer
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views import ExportRecord, RoundView, RunView
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.round import Round


class RoundRecordAnswer(Answer):
    """One attempt at one round."""

    id: str
    number: int
    attempt: int
    phase: str
    created_at: float
    opened_at: float | None
    deadline_at: float | None
    closed_at: float | None
    target: int = Field(description="Updates that close the round early.")
    quorum: int
    accepted: int = Field(description="Updates that were accepted so far.")
    reason: str | None
    message: str

    @classmethod
    def of_round(cls, round_: Round) -> Self:
        """The answer for a record."""
        return cls(
            id=round_.id,
            number=round_.number,
            attempt=round_.attempt,
            phase=round_.phase.value,
            created_at=round_.created_at,
            opened_at=round_.opened_at,
            deadline_at=round_.deadline_at,
            closed_at=round_.closed_at,
            target=round_.target,
            quorum=round_.policy.quorum,
            accepted=round_.count(AssignmentPhase.ACCEPTED_UPDATE),
            reason=round_.reason and round_.reason.value,
            message=round_.message,
        )


class RoundAnswer(RoundRecordAnswer):
    """One attempt at one round, with its devices."""

    seconds: float | None = Field(description="From opening to the end, or until now.")
    devices: int = Field(default=0, description="How many devices are in the round.")
    counts: dict[str, int] = Field(default_factory=dict, description="How many assignments stand in each phase.")
    assignments: list[AssignmentAnswer] = Field(
        description="Of one round the first 200, open ones first; in lists none. /rounds/NUMBER/assignments has all."
    )

    @classmethod
    def of(cls, view: RoundView) -> Self:
        """The answer for a view."""
        record = RoundRecordAnswer.of_round(view.round).model_copy(update={"accepted": view.accepted})
        return cls(
            **record.model_dump(),
            seconds=view.seconds,
            devices=view.devices,
            counts={phase.value: number for phase, number in view.counts.items()},
            assignments=[AssignmentAnswer.of(assignment) for assignment in view.assignments],
        )


class ScoreAnswer(Answer):
    """How good a version is at one rank: means over devices, weighted by their rows."""

    version_number: int
    rank: int
    phase: str
    accuracy: float | None
    loss: float | None
    rows: int
    devices: int


class RunAnswer(Answer):
    """A run, where it stands and why it waits."""

    id: str
    name: str
    phase: str
    reason: str | None
    message: str
    waiting: str = Field(description="Why nothing moves; empty when it does.")
    rounds: int = Field(description="Rounds until the run is complete.")
    rounds_done: int
    version_number: int | None
    created_at: float
    started_at: float | None
    ended_at: float | None
    eligible_devices: int
    online_devices: int
    strategy: str
    max_rank: int
    base_model: str
    spec: RunSpec
    round: RoundAnswer | None
    evaluations: list[AssignmentAnswer]
    scores: list[ScoreAnswer] = Field(description="Of the newest 50 versions; /series has all of them.")
    row_version: int = Field(description="Grows with every change of the run itself; If-Match takes it.")
    revision: int = Field(description="Grows with every change; ?wait=REVISION answers when it is another one.")

    @classmethod
    def of(cls, view: RunView) -> Self:
        """The answer for a view."""
        run, spec = view.run, view.spec
        return cls(
            id=run.id,
            name=run.name,
            phase=run.phase.value,
            reason=run.reason and run.reason.value,
            message=run.message,
            waiting=view.waiting,
            rounds=spec.policy.rounds,
            rounds_done=run.rounds_done,
            version_number=view.version_number,
            created_at=run.created_at,
            started_at=run.started_at,
            ended_at=run.ended_at,
            eligible_devices=view.eligible_devices,
            online_devices=view.online_devices,
            strategy=spec.strategy.name,
            max_rank=spec.lora.max_rank,
            base_model=run.manifest.base_model_name,
            spec=spec,
            round=None if view.round is None else RoundAnswer.of(view.round),
            evaluations=[AssignmentAnswer.of(assignment) for assignment in view.evaluations],
            scores=[ScoreAnswer.model_validate(score) for score in view.scores],
            row_version=run.row_version,
            revision=view.revision,
        )


class ExportAnswer(Answer):
    """What lies in an exported archive; sent in the header X-Glora-Export."""

    version_number: int
    rank: int
    flavour: str
    files: list[str]
    modules: int

    @classmethod
    def of(cls, record: ExportRecord) -> Self:
        """The answer for a record."""
        return cls.model_validate(record)
