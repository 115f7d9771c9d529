"""What devices ask the use cases and what they are told, as immutable records; times in Unix seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from glora_server.coordinator.model import Device, MetricPhase, Profile, Run, Version
from glora_server.coordinator.ports import ReadoutVariant, StrategyInfo
from glora_server.coordinator.run_spec import RunSpec
from glora_server.rounds.assignment import Assignment
from glora_wire.digests import Digest
from glora_wire.errors import Reason, Refusal

AdapterUseName = Literal["train", "frozen", "merge", "evaluate"]
"""What a device does with an adapter that it downloads; AdapterUse of the protos in lower case."""

UploadStateName = Literal["partial", "received", "accepted", "rejected", "discarded"]
"""What became of an update; UploadState of the protos in lower case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOffer:
    """One adapter of an assignment: `key` selects it in PullAdapter and is unique within the assignment."""

    key: str
    use: AdapterUseName
    rank: int
    variant: ReadoutVariant = "train"
    first: int = 0
    """How many leading directions of the state a "tail" leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOffer:
    """An assignment with everything that the device must know to do it."""

    assignment: Assignment
    run: Run
    spec: RunSpec
    round_number: int
    """From 1; for evaluate the number of the round that made the version (0 = the initial one)."""
    version: Version
    adapters: tuple[AdapterOffer, ...]
    strategy: StrategyInfo
    max_upload_bytes: int
    seed: int
    deadline_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NoticeRecord:
    """Why the device gets no work from one run."""

    run_name: str
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkAnswer:
    """What a device that asks for work gets; `retry_after` in seconds, counts where there is no offer."""

    offer: WorkOffer | None
    notices: tuple[NoticeRecord, ...] = ()
    retry_after: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressAnswer:
    """Whether the work is still wanted, and until when."""

    cancelled: bool
    reason: str = ""
    """Name of the Reason when cancelled, else empty."""
    deadline_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One evaluation on a device's own held-out rows; loss in nats, accuracy in 0..1, time in seconds."""

    phase: MetricPhase
    rank: int
    loss: float
    accuracy: float
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAdapter:
    """A rendered adapter that stays on the local disk until it is closed; `async with` closes it."""

    digest: Digest
    adapter_config_json: str
    path: Path
    release: Callable[[], None]
    """Gives the file back; called once, in a thread, because it may delete a large file."""

    async def close(self) -> None:
        """Give the file back; the path must not be read afterwards."""
        await asyncio.to_thread(self.release)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadHeader:
    """What a device announces before the bytes of an update."""

    digest: Digest
    offset: int
    """Of the first byte of this stream."""
    adapter_config_json: str
    training_rows: int
    completed_steps: int
    stopped_early: bool
    training_loss: float
    training_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadStatus:
    """How much of an update is stored and what became of it; `refusal` is set for "rejected" and "discarded"."""

    state: UploadStateName
    committed_bytes: int
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolRequestRecord:
    """A device that wants to join; the secret is kept out of the repr."""

    token_id: str
    token_secret: str = field(repr=False)
    certificate_request_pem: str
    name: str
    max_rank: int
    """Largest rank that the device declares; 0 = whatever the token allows."""
    profile: Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentRecord:
    """A device with its certificate."""

    device: Device
    certificate_pem: str
    authority_pem: str
    expires_at: float
    approval_pending: bool
