"""Answers of the REST API about what devices did; times in Unix seconds."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from glora_dashboard.models import Answer, AssignmentAnswer
from glora_server.coordinator.views_history import Contribution, DeviceCounts, DeviceDetail, WorkView


class WorkAnswer(AssignmentAnswer):
    """An assignment in the history of its device."""

    run: str
    round_number: int | None = Field(description="Null: an evaluation that belongs to no round.")
    attempt: int | None

    @classmethod
    def of_work(cls, work: WorkView) -> Self:
        """The answer for a view."""
        return cls(
            **AssignmentAnswer.of(work.view).model_dump(),
            run=work.run_name,
            round_number=work.round_number,
            attempt=work.attempt,
        )


class ContributionAnswer(Answer):
    """One device's part in one version, and how far it agreed with the others."""

    run: str
    number: int = Field(description="Of the version.")
    device_id: str
    device: str
    at: float
    share: float = Field(description="Its weight in the mean, 0 to 1.")
    rows: int
    update_norm: float | None
    capture: float | None = Field(
        description="Part of its update that lies in the consensus, 0 to 1: a mean over modules, weighted with its "
        "squared norms."
    )
    cosine: float | None = Field(description="Between its update and the mean; weighted alike.")
    deviation: float | None = Field(description="How far it lies below the round's median, in robust deviations.")
    outlier: bool = Field(description="deviation is at least 3.5, and the distance to the median at least 0.05.")

    @classmethod
    def of(cls, item: Contribution, *, run: str, device: str) -> Self:
        """The answer for a record."""
        return cls(
            run=run,
            number=item.number,
            device_id=item.device_id,
            device=device,
            at=item.at,
            share=item.share,
            rows=item.rows,
            update_norm=item.update_norm,
            capture=item.capture,
            cosine=item.cosine,
            deviation=item.deviation,
            outlier=item.outlier,
        )


class AgreementAnswer(Answer):
    """How a device's rounds ended, and how far it agreed with the others."""

    outcomes: dict[str, int] = Field(description="Rounds by how the device's part in them ended.")
    reliability: float | None = Field(description="Accepted updates as a share of the rounds that waited for it.")
    agreement: list[ContributionAnswer] = Field(description="Its newest 50 contributions, newest first.")

    @classmethod
    def of(cls, detail: DeviceDetail) -> Self:
        """The answer for a view."""
        name = detail.device.device.name
        return cls(
            outcomes={outcome.value: number for outcome, number in detail.outcomes.items()},
            reliability=detail.reliability,
            agreement=[
                ContributionAnswer.of(item, run=detail.run_names.get(item.run_id, item.run_id), device=name)
                for item in detail.agreement
            ],
        )


class DeviceCountsAnswer(Answer):
    """How many devices there are."""

    total: int = Field(description="Without the revoked ones.")
    online: int
    by_state: dict[str, int]
    tags: list[str] = Field(description="All tags in use; 200 at most.")

    @classmethod
    def of(cls, counts: DeviceCounts) -> Self:
        """The answer for a record."""
        return cls(
            total=counts.total,
            online=counts.online,
            by_state={state.value: number for state, number in counts.by_state.items()},
            tags=list(counts.tags),
        )
