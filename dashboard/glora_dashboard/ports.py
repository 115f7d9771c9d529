"""What the web surface needs of the server: commands that change something, queries that answer, a health probe."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from glora_server.coordinator.feed import Batch
from glora_server.coordinator.model import (
    AuditEntry,
    Device,
    Listing,
    Measurement,
    ModuleDiagnostics,
    Page,
    Run,
    TokenRecord,
    Version,
)
from glora_server.coordinator.people import Principal
from glora_server.coordinator.ports import StrategyInfo
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views import (
    AssignmentView,
    DeviceView,
    ExportRecord,
    RoundView,
    RunView,
    SystemView,
)
from glora_server.coordinator.views_history import (
    AuditFilter,
    Contribution,
    DeviceCounts,
    DeviceDetail,
    DeviceFilter,
    DeviceLine,
    WorkView,
)
from glora_server.coordinator.views_plots import Alert, Ancestor, Exportable, RunSeries, SpectrumMap
from glora_server.rounds.ids import DeviceId
from glora_server.rounds.round import Round
from glora_wire.manifest import Manifest

Flavour = Literal["peft", "serving"]


class Commands(Protocol):
    """Everything that changes something; each method notes the actor in the audit and raises GloraError."""

    async def create_token(
        self,
        actor: Principal,
        *,
        description: str = "",
        uses: int = 1,
        ttl_seconds: float,
        max_rank: int,
        tags: Sequence[str] = (),
        approve: bool = True,
    ) -> tuple[TokenRecord, str]:
        """A new join token: its record, and the text that is shown this once."""
        ...

    async def revoke_token(self, actor: Principal, token_id: str) -> TokenRecord:
        """No device may join with it any more."""
        ...

    async def approve_device(self, actor: Principal, name: str, *, expected: int | None = None) -> Device:
        """It may work."""
        ...

    async def suspend_device(self, actor: Principal, name: str, *, expected: int | None = None) -> Device:
        """It may not work until it is approved again."""
        ...

    async def revoke_device(self, actor: Principal, name: str, *, expected: int | None = None) -> Device:
        """It is refused for good."""
        ...

    async def set_device_rank(self, actor: Principal, name: str, rank: int, *, expected: int | None = None) -> Device:
        """Grant another rank, from the next assignment on."""
        ...

    async def create_run(self, actor: Principal, spec: RunSpec, manifest: Manifest, *, start: bool) -> Run:
        """A new run."""
        ...

    async def start_run(self, actor: Principal, name: str, *, expected: int | None = None) -> Run:
        """Make the first state and open rounds."""
        ...

    async def pause_run(self, actor: Principal, name: str, *, expected: int | None = None) -> Run:
        """Open no further round."""
        ...

    async def resume_run(self, actor: Principal, name: str, *, expected: int | None = None) -> Run:
        """Open rounds again."""
        ...

    async def abort_run(self, actor: Principal, name: str, reason: str, *, expected: int | None = None) -> Run:
        """End the run and its round."""
        ...

    async def extend_round(self, actor: Principal, name: str, seconds: float, *, expected: int | None = None) -> Round:
        """Move the deadline of the run's open round."""
        ...

    async def edit_policy(
        self, actor: Principal, name: str, changes: Mapping[str, object], *, expected: int | None = None
    ) -> Run:
        """Change keys of the run's policy, from the next round on."""
        ...

    async def export(
        self, actor: Principal, run_name: str, *, rank: int, version_number: int | None, flavour: Flavour, folder: Path
    ) -> ExportRecord:
        """Write a PEFT folder."""
        ...


class Queries(Protocol):
    """Everything that is asked; changes nothing. Names may be ids; what is not there raises GloraError.

    What is not a page is bounded: a run carries the newest versions' scores and the first devices of its round.
    """

    async def devices(self, page: Page, wanted: DeviceFilter = ...) -> Listing[DeviceView]:
        """Devices that fit `wanted`, in its order."""
        ...

    async def device_lines(self, page: Page, wanted: DeviceFilter = ...) -> Listing[DeviceLine]:
        """The same devices with how reliable they are and how far they agreed with the others last."""
        ...

    async def device(self, name: str) -> DeviceView:
        """One device."""
        ...

    async def device_detail(self, name: str) -> DeviceDetail:
        """One device with how its rounds ended and how far it agreed with the others."""
        ...

    async def device_history(self, name: str, page: Page) -> Listing[WorkView]:
        """Assignments of a device, newest first."""
        ...

    async def device_counts(self) -> DeviceCounts:
        """How many devices there are, online and by state, and the tags in use."""
        ...

    async def device_names(self, ids: frozenset[DeviceId]) -> Mapping[DeviceId, str]:
        """Names of these devices."""
        ...

    async def tokens(self, page: Page) -> Listing[TokenRecord]:
        """Join tokens, newest first."""
        ...

    async def runs(self, page: Page) -> Listing[RunView]:
        """Runs, newest first; without the devices of their rounds, but for those that the wait is for."""
        ...

    async def plain_runs(self, page: Page) -> Listing[Run]:
        """Runs as they are stored, newest first: for choosing one, without what each does and waits for."""
        ...

    async def run(self, name: str) -> RunView:
        """One run."""
        ...

    async def rounds(self, run_name: str, page: Page) -> Listing[RoundView]:
        """Rounds of a run, newest first; without their devices."""
        ...

    async def round(self, run_name: str, number: int, attempt: int | None = None) -> RoundView:
        """One round (no attempt: the last one) with the first of its devices."""
        ...

    async def assignments(
        self, run_name: str, number: int, page: Page, attempt: int | None = None
    ) -> Listing[AssignmentView]:
        """Assignments of a round, in their order."""
        ...

    async def series(self, run_name: str) -> RunSeries:
        """What is plotted over the rounds of a run; at most 500 versions."""
        ...

    async def spectrum(self, run_name: str) -> SpectrumMap:
        """The consensus spectrum of a run by module and round; at most 100 by 60."""
        ...

    async def lineage(self, run_name: str, page: Page) -> Listing[Ancestor]:
        """Versions of a run, newest first, with the devices that made them."""
        ...

    async def contributions(self, run_name: str, version_number: int, page: Page) -> Listing[Contribution]:
        """The devices that made a version, the largest share first."""
        ...

    async def exports(self, run_name: str, page: Page) -> Listing[Exportable]:
        """Versions of a run that can be exported, newest first, with how good they are at each rank."""
        ...

    async def versions(self, run_name: str, page: Page) -> Listing[Version]:
        """Published versions of a run, newest first."""
        ...

    async def measurements(self, run_name: str, page: Page) -> Listing[Measurement]:
        """Evaluations of a run, by version, rank and device."""
        ...

    async def diagnostics(self, run_name: str, version_number: int, page: Page) -> Listing[ModuleDiagnostics]:
        """What aggregation measured for a version, by module."""
        ...

    async def audit(self, page: Page, wanted: AuditFilter = ...) -> Listing[AuditEntry]:
        """Who did what, newest first."""
        ...

    async def strategies(self) -> tuple[StrategyInfo, ...]:
        """What a run can choose."""
        ...

    async def system(self) -> SystemView:
        """The server itself."""
        ...

    async def alerts(self) -> tuple[Alert, ...]:
        """What somebody should look at, the worst first."""
        ...

    async def changed(self, run_name: str, revision: int, timeout: float) -> int:  # noqa: ASYNC109 - a long poll has one
        """The revision of the run as soon as it differs from `revision`, or after `timeout` seconds."""
        ...

    def events(self, after: str = "", *, heartbeat: float = 15.0) -> AsyncIterator[Batch]:
        """Batches of changes after that place (empty: from now on) for ever; an empty one every `heartbeat` s."""
        ...


class Answers(Protocol):
    """Answers to requests that may be repeated, sealed by whoever keeps them."""

    async def find(self, who: str, key_sha256: str) -> tuple[str, bytes] | None:
        """The digest of the request and its sealed answer; None when there is none of the last day."""
        ...

    async def keep(self, who: str, key_sha256: str, request_sha256: str, sealed: bytes) -> None:
        """Keep an answer for a day."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    """Whether one part works; `message` is shown to anybody, so it names no secret."""

    name: str
    ok: bool
    message: str = ""


class HealthProbe(Protocol):
    """Asks the parts of the server how they are."""

    async def check(self) -> tuple[HealthCheck, ...]:
        """One answer per part: database, worker, ports. Takes a second at most."""
        ...
