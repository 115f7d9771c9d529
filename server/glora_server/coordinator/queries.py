"""What operators ask; changes nothing, and reads no more rows than a page shows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from glora_server.coordinator import queries_plots as plots
from glora_server.coordinator import queries_rounds as rounds
from glora_server.coordinator import roster
from glora_server.coordinator.catalogue import Catalogue
from glora_server.coordinator.feed import Batch
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
from glora_server.coordinator.queries_alerts import alerts
from glora_server.coordinator.queries_rounds import Present
from glora_server.coordinator.roster import Roster
from glora_server.coordinator.views import AssignmentView, DeviceView, RoundView, RunView, SystemView
from glora_server.coordinator.views_history import (
    AuditFilter,
    Contribution,
    DeviceCounts,
    DeviceDetail,
    DeviceFilter,
    DeviceLine,
    RosterEntry,
    WorkView,
    reliability,
)
from glora_server.coordinator.views_plots import Alert, Ancestor, Exportable, RunSeries, SpectrumMap
from glora_server.rounds.ids import DeviceId

T = TypeVar("T")
SHOWN_CONTRIBUTIONS = 50
"""Rounds that a device's agreement is shown for."""
_ALL_AUDIT = AuditFilter()
_ALL_DEVICES = DeviceFilter()


@dataclass(slots=True, kw_only=True)
class Queries:
    """Every question of the command line and the browser; runs and devices by name or id."""

    store: Store
    hub: Hub
    clock: Callable[[], float]
    catalogue: Catalogue
    system_view: Callable[[UnitOfWork, DeviceCounts], SystemView]
    roster: Roster = field(init=False)

    def __post_init__(self) -> None:
        self.roster = Roster(self.store, self.hub)

    # --- devices

    async def devices(self, page: Page, wanted: DeviceFilter = _ALL_DEVICES) -> Listing[DeviceView]:
        """Devices that fit `wanted`, in its order; the revoked ones only where their state is wanted."""
        present = await self._present()
        part = await self._part_of_devices(page, wanted, present)

        def work(uow: UnitOfWork) -> tuple[DeviceView, ...]:
            stored = uow.lists.devices([entry.id for entry in part.items])
            return _device_views(uow, present, [stored[entry.id] for entry in part.items if entry.id in stored])

        return Listing(items=await self.store.read(work), next_token=part.next_token)

    async def device_lines(self, page: Page, wanted: DeviceFilter = _ALL_DEVICES) -> Listing[DeviceLine]:
        """The same devices with how reliable they are and how far they agreed with the others last."""
        present = await self._present()
        part = await self._part_of_devices(page, wanted, present)
        items = await self.store.read(lambda uow: _device_lines(uow, present, part.items))
        return Listing(items=items, next_token=part.next_token)

    async def device(self, name: str) -> DeviceView:
        """One device; raises DEVICE_UNKNOWN."""
        return await self._ask(lambda uow, present: _device_views(uow, present, [uow.devices.by_name(name)])[0])

    async def device_detail(self, name: str) -> DeviceDetail:
        """One device with how its rounds ended and how far it agreed with the others; raises DEVICE_UNKNOWN."""
        return await self._ask(partial(_device_detail, name))

    async def device_history(self, name: str, page: Page) -> Listing[WorkView]:
        """Assignments of a device, newest first."""
        return await self._ask(partial(_device_history, name, page))

    async def device_counts(self) -> DeviceCounts:
        """How many devices there are, online and by state, and the tags in use."""
        present = await self._present()
        return roster.counts(present.entries.values(), self.hub, present.now)

    async def tokens(self, page: Page) -> Listing[TokenRecord]:
        """Join tokens, newest first."""
        return await self.store.read(lambda uow: uow.tokens.list(page))

    # --- runs and rounds

    async def runs(self, page: Page) -> Listing[RunView]:
        """Runs, newest first; without the devices of their rounds."""

        def work(uow: UnitOfWork, present: Present) -> Listing[RunView]:
            found = uow.runs.list(page)
            items = tuple(rounds.run_line(uow, present, run) for run in found.items)
            return Listing(items=items, next_token=found.next_token)

        return await self._ask(work)

    async def plain_runs(self, page: Page) -> Listing[Run]:
        """Runs as they are stored, newest first: for choosing one, without what each does and waits for."""
        return await self._ask(lambda uow, _: uow.runs.list(page))

    async def run(self, name: str) -> RunView:
        """One run; raises RUN_UNKNOWN."""
        return await self._ask(lambda uow, present: rounds.run_view(uow, present, uow.runs.by_name(name)))

    async def rounds(self, run_name: str, page: Page) -> Listing[RoundView]:
        """Rounds of a run, newest first; without their devices."""

        def work(uow: UnitOfWork, present: Present) -> Listing[RoundView]:
            found = uow.lists.rounds(uow.runs.by_name(run_name).id, page)
            return Listing(items=rounds.round_views(uow, present, found.items), next_token=found.next_token)

        return await self._ask(work)

    async def round(self, run_name: str, number: int, attempt: int | None = None) -> RoundView:
        """One round (no attempt: the last one) with the first of its devices; raises ROUND_UNKNOWN."""

        def work(uow: UnitOfWork, present: Present) -> RoundView:
            found = uow.lists.round(uow.runs.by_name(run_name).id, number, attempt)
            return rounds.round_view(uow, present, found)

        return await self._ask(work)

    async def assignments(
        self, run_name: str, number: int, page: Page, attempt: int | None = None
    ) -> Listing[AssignmentView]:
        """Assignments of a round, in their order."""

        def work(uow: UnitOfWork, present: Present) -> Listing[AssignmentView]:
            found = uow.lists.round(uow.runs.by_name(run_name).id, number, attempt)
            return rounds.assignments(uow, present, found.id, page)

        return await self._ask(work)

    async def series(self, run_name: str) -> RunSeries:
        """What is plotted over the rounds of a run."""
        return await self._of_run(run_name, plots.series)

    async def spectrum(self, run_name: str) -> SpectrumMap:
        """The consensus spectrum of a run by module and round."""
        return await self._of_run(run_name, plots.spectrum)

    async def lineage(self, run_name: str, page: Page) -> Listing[Ancestor]:
        """Versions of a run, newest first, with the devices that made them."""
        return await self._of_run(run_name, lambda uow, run: plots.lineage(uow, run, page))

    async def contributions(self, run_name: str, version_number: int, page: Page) -> Listing[Contribution]:
        """The devices that made a version, the largest share first."""

        def work(uow: UnitOfWork, run: Run) -> Listing[Contribution]:
            return uow.history.contributions(uow.versions.by_number(run.id, version_number).id, page)

        return await self._of_run(run_name, work)

    async def device_names(self, ids: frozenset[DeviceId]) -> dict[DeviceId, str]:
        """Names of these devices."""
        return await self._ask(lambda uow, present: dict(present.names(uow, ids)))

    async def exports(self, run_name: str, page: Page) -> Listing[Exportable]:
        """Versions of a run that can be exported, newest first, with how good they are at each rank."""
        return await self._of_run(run_name, lambda uow, run: plots.exports(uow, run, page))

    async def versions(self, run_name: str, page: Page) -> Listing[Version]:
        """Published versions of a run, newest first."""
        return await self._of_run(run_name, lambda uow, run: uow.versions.list(run.id, page))

    async def measurements(self, run_name: str, page: Page) -> Listing[Measurement]:
        """Evaluations of a run, by version, rank and device."""
        return await self._of_run(run_name, lambda uow, run: uow.lists.measurements(run.id, page))

    async def diagnostics(self, run_name: str, version_number: int, page: Page) -> Listing[ModuleDiagnostics]:
        """What aggregation measured for a version, by module."""

        def work(uow: UnitOfWork, run: Run) -> Listing[ModuleDiagnostics]:
            return uow.lists.diagnostics(uow.versions.by_number(run.id, version_number).id, page)

        return await self._of_run(run_name, work)

    # --- the server

    async def audit(self, page: Page, wanted: AuditFilter = _ALL_AUDIT) -> Listing[AuditEntry]:
        """Who did what, newest first."""
        return await self.store.read(lambda uow: uow.lists.audit(wanted, page))

    async def strategies(self) -> tuple[StrategyInfo, ...]:
        """What a run can choose."""
        return await self.catalogue.all()

    async def system(self) -> SystemView:
        """The server itself."""
        return await self._ask(self._system)

    async def alerts(self) -> tuple[Alert, ...]:
        """What somebody should look at, the worst first."""
        return await self._ask(lambda uow, present: alerts(uow, present, self._system(uow, present)))

    def _system(self, uow: UnitOfWork, present: Present) -> SystemView:
        counted = roster.counts(present.entries.values(), self.hub, present.now)
        return replace(self.system_view(uow, counted), database_bytes=uow.lists.size_bytes())

    # --- what changes

    async def changed(self, run_name: str, revision: int, timeout: float) -> int:  # noqa: ASYNC109 - a long poll has one
        """The revision of the run as soon as it differs from `revision`, or after `timeout` seconds."""
        run = await self.store.read(lambda uow: uow.runs.by_name(run_name))
        return await self.hub.signals.wait(("run", run.id), revision, timeout)

    def events(self, after: str = "", *, heartbeat: float = 15.0) -> AsyncIterator[Batch]:
        """Batches of changes after that place (empty: from now on) for ever; an empty one every `heartbeat` s."""
        return self.hub.feed.follow(after, heartbeat=heartbeat)

    async def _ask(self, work: Callable[[UnitOfWork, Present], T]) -> T:
        present = await self._present()
        return await self.store.read(lambda uow: work(uow, present))

    async def _of_run(self, name: str, work: Callable[[UnitOfWork, Run], T]) -> T:
        return await self.store.read(lambda uow: work(uow, uow.runs.by_name(name)))

    async def _part_of_devices(self, page: Page, wanted: DeviceFilter, present: Present) -> Listing[RosterEntry]:
        entries: Iterable[RosterEntry] = present.entries.values()
        if wanted.state is DeviceState.REVOKED:
            entries = await self.store.read(lambda uow: uow.lists.roster(revoked=True))
        return roster.part(roster.chosen(entries, wanted, self.hub, present.now), page)

    async def _present(self) -> Present:
        return Present(hub=self.hub, now=self.clock(), entries=await self.roster.entries())


def _device_views(uow: UnitOfWork, present: Present, devices: list[Device]) -> tuple[DeviceView, ...]:
    open_ = uow.lists.open_of([device.id for device in devices])
    views = {view.assignment.device_id: view for view in present.assignment_views(uow, open_.values())}
    measuring = {device.id: run for device in devices if (run := present.hub.measures_for(device.id, present.now))}
    run_names = uow.lists.run_names({assignment.run_id for assignment in open_.values()} | set(measuring.values()))
    return tuple(
        DeviceView(
            device=_freshly_seen(present.hub, device),
            online=present.hub.is_online(device.id, present.now),
            current=views.get(device.id),
            current_run=run_names[open_[device.id].run_id] if device.id in open_ else "",
            measuring=run_names.get(measuring[device.id], "") if device.id in measuring else "",
        )
        for device in devices
    )


def _device_lines(uow: UnitOfWork, present: Present, entries: Sequence[RosterEntry]) -> tuple[DeviceLine, ...]:
    stored = uow.lists.devices([entry.id for entry in entries])
    views = _device_views(uow, present, [stored[entry.id] for entry in entries if entry.id in stored])
    outcomes = {entry.id: entry.outcomes for entry in entries}
    return tuple(
        DeviceLine(
            device=view,
            reliability=reliability(outcomes[view.device.id]),
            agreement=next(iter(uow.history.contributions_of(view.device.id, 1)), None),
        )
        for view in views
    )


def _device_detail(name: str, uow: UnitOfWork, present: Present) -> DeviceDetail:
    device = uow.devices.by_name(name)
    outcomes = uow.lists.outcomes(device.id)
    made = uow.history.contributions_of(device.id, SHOWN_CONTRIBUTIONS)
    return DeviceDetail(
        device=_device_views(uow, present, [device])[0],
        outcomes=outcomes,
        reliability=reliability(outcomes),
        agreement=made,
        run_names=uow.lists.run_names({item.run_id for item in made}),
    )


def _device_history(name: str, page: Page, uow: UnitOfWork, present: Present) -> Listing[WorkView]:
    found = uow.lists.work(uow.devices.by_name(name).id, page)
    views = present.assignment_views(uow, (item.assignment for item in found.items))
    items = tuple(
        WorkView(view=view, run_name=item.run_name, round_number=item.round_number, attempt=item.attempt)
        for item, view in zip(found.items, views, strict=True)
    )
    return Listing(items=items, next_token=found.next_token)


def _freshly_seen(hub: Hub, device: Device) -> Device:
    seen = hub.last_seen(device.id)
    return device if seen is None else replace(device, last_seen_at=seen)
