"""What operators ask; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from glora_server.coordinator.catalogue import Catalogue
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import (
    AuditEntry,
    Device,
    DeviceState,
    Listing,
    Measurement,
    ModuleDiagnostics,
    Page,
    Run,
    TokenRecord,
    Version,
)
from glora_server.coordinator.ports import Store, StrategyInfo, UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.scores import rank_scores
from glora_server.coordinator.staffing import candidate, requirements, standing_refusal
from glora_server.coordinator.views import AssignmentView, DeviceView, RoundView, RunView, SystemView
from glora_server.coordinator.waiting import why_it_waits
from glora_server.rounds.assignment import Assignment
from glora_server.rounds.ids import DeviceId
from glora_server.rounds.plan import training_refusal
from glora_server.rounds.round import Round
from glora_wire.errors import Refusal


@dataclass(slots=True, kw_only=True)
class Queries:
    """Every question of the command line and the browser; runs and devices by name or id."""

    store: Store
    hub: Hub
    clock: Callable[[], float]
    catalogue: Catalogue
    system_view: Callable[[UnitOfWork], SystemView]

    async def devices(self, page: Page) -> Listing[DeviceView]:
        """Devices in order of enrolment."""

        def work(uow: UnitOfWork) -> Listing[DeviceView]:
            found = uow.devices.list(page)
            return Listing(items=tuple(self._device(uow, d) for d in found.items), next_token=found.next_token)

        return await self.store.read(work)

    async def device(self, name: str) -> DeviceView:
        """One device; raises DEVICE_UNKNOWN."""
        return await self.store.read(lambda uow: self._device(uow, uow.devices.by_name(name)))

    async def tokens(self, page: Page) -> Listing[TokenRecord]:
        """Join tokens, newest first."""
        return await self.store.read(lambda uow: uow.tokens.list(page))

    async def runs(self, page: Page) -> Listing[RunView]:
        """Runs, newest first."""

        def work(uow: UnitOfWork) -> Listing[RunView]:
            found = uow.runs.list(page)
            return Listing(items=tuple(self._run(uow, run) for run in found.items), next_token=found.next_token)

        return await self.store.read(work)

    async def run(self, name: str) -> RunView:
        """One run; raises RUN_UNKNOWN."""
        return await self.store.read(lambda uow: self._run(uow, uow.runs.by_name(name)))

    async def rounds(self, run_name: str, page: Page) -> Listing[RoundView]:
        """Rounds of a run, newest first."""

        def work(uow: UnitOfWork) -> Listing[RoundView]:
            found = uow.rounds.list(uow.runs.by_name(run_name).id, page)
            names = _names(uow)
            items = tuple(self._round(round_, names) for round_ in found.items)
            return Listing(items=items, next_token=found.next_token)

        return await self.store.read(work)

    async def versions(self, run_name: str, page: Page) -> Listing[Version]:
        """Published versions of a run, newest first."""
        return await self.store.read(lambda uow: uow.versions.list(uow.runs.by_name(run_name).id, page))

    async def measurements(self, run_name: str) -> tuple[Measurement, ...]:
        """Every evaluation of a run, by version, rank and device."""
        return await self.store.read(lambda uow: uow.measurements.of_run(uow.runs.by_name(run_name).id))

    async def diagnostics(self, run_name: str, version_number: int) -> tuple[ModuleDiagnostics, ...]:
        """What aggregation measured for a version, by module."""

        def work(uow: UnitOfWork) -> tuple[ModuleDiagnostics, ...]:
            run = uow.runs.by_name(run_name)
            return uow.versions.diagnostics(uow.versions.by_number(run.id, version_number).id)

        return await self.store.read(work)

    async def audit(self, page: Page) -> Listing[AuditEntry]:
        """Who did what, newest first."""
        return await self.store.read(lambda uow: uow.audit.list(page))

    async def strategies(self) -> tuple[StrategyInfo, ...]:
        """What a run can choose."""
        return await self.catalogue.all()

    async def system(self) -> SystemView:
        """The server itself."""
        return await self.store.read(self.system_view)

    async def changed(self, run_name: str, revision: int, timeout: float) -> int:  # noqa: ASYNC109 - a long poll has one
        """The revision of the run as soon as it differs from `revision`, or after `timeout` seconds."""
        run = await self.store.read(lambda uow: uow.runs.by_name(run_name))
        return await self.hub.signals.wait(("run", run.id), revision, timeout)

    def _run(self, uow: UnitOfWork, run: Run) -> RunView:
        revision = self.hub.signals.revision(("run", run.id))
        spec = RunSpec.from_json(run.spec_json)
        names = _names(uow)
        latest = uow.rounds.latest(run.id)
        round_view = self._round(latest, names) if latest is not None else None
        eligible, online = self._eligible(uow, run, spec)
        return RunView(
            run=run,
            spec=spec,
            round=round_view,
            waiting=why_it_waits(run, spec, round_view, self.hub.waiting.get(run.id, ""), now=self.clock()),
            version_number=uow.versions.get(run.version_id).number if run.version_id else None,
            eligible_devices=eligible,
            online_devices=online,
            evaluations=tuple(self._assignment(a, names) for a in self._open_evaluations(uow, run)),
            scores=rank_scores(uow.measurements.of_run(run.id)),
            revision=revision,
        )

    def _open_evaluations(self, uow: UnitOfWork, run: Run) -> Iterable[Assignment]:
        for device in uow.devices.all():
            if device.profile.evaluates:
                yield from (a for a in uow.rounds.open_for(device.id) if a.run_id == run.id and a.round_id is None)

    def _eligible(self, uow: UnitOfWork, run: Run, spec: RunSpec) -> tuple[int, int]:
        needs, declined = requirements(run, spec), uow.rounds.declined_for(run.id)
        eligible = [
            device
            for device in uow.devices.all()
            if device.state is DeviceState.APPROVED
            and training_refusal(candidate(device, device.profile, self._refusal(declined, device)), needs) is None
        ]
        return len(eligible), sum(self.hub.is_online(device.id, self.clock()) for device in eligible)

    def _refusal(self, declined: Mapping[DeviceId, tuple[float, Refusal]], device: Device) -> Refusal | None:
        return standing_refusal(declined, device.id, self.hub.since(device.id))

    def _round(self, round_: Round, names: Mapping[DeviceId, str]) -> RoundView:
        seconds = None
        if round_.opened_at is not None:
            seconds = (round_.closed_at or self.clock()) - round_.opened_at
        views = tuple(self._assignment(a, names) for a in round_.assignments)
        return RoundView(round=round_, assignments=views, seconds=seconds)

    def _assignment(self, assignment: Assignment, names: Mapping[DeviceId, str]) -> AssignmentView:
        traffic = self.hub.traffic_of(assignment.id)
        return AssignmentView(
            assignment=assignment,
            device_name=names.get(assignment.device_id, assignment.device_id),
            progress=self.hub.progress.get(assignment.id) if assignment.is_open else None,
            bytes_down=max(traffic.down, assignment.bytes_down),
            bytes_up=max(traffic.up, assignment.bytes_up),
        )

    def _device(self, uow: UnitOfWork, device: Device) -> DeviceView:
        open_ = uow.rounds.open_for(device.id)
        current = self._assignment(open_[0], {device.id: device.name}) if open_ else None
        return DeviceView(
            device=_freshly_seen(self.hub, device),
            online=self.hub.is_online(device.id, self.clock()),
            current=current,
            current_run=uow.runs.get(open_[0].run_id).name if open_ else "",
        )


def _freshly_seen(hub: Hub, device: Device) -> Device:
    seen = hub.last_seen(device.id)
    return device if seen is None else replace(device, last_seen_at=seen)


def _names(uow: UnitOfWork) -> dict[DeviceId, str]:
    return {device.id: device.name for device in uow.devices.all()}
