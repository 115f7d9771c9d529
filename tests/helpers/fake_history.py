"""The history of a fake server: one round that goes on, one version, nothing measured; enough for routes to answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from glora_server.coordinator.feed import Batch, Feed
from glora_server.coordinator.model import DeviceState, Listing, Page, Run
from glora_server.coordinator.views import AssignmentView, DeviceView, RoundView
from glora_server.coordinator.views_history import (
    Contribution,
    DeviceCounts,
    DeviceDetail,
    DeviceFilter,
    DeviceLine,
    Outcome,
    WorkView,
    reliability,
)
from glora_server.coordinator.views_plots import Alert, Ancestor, Exportable, RunSeries, Severity, SpectrumMap
from glora_server.rounds.ids import DeviceId
from glora_wire.errors import GloraError, Reason


class FakeHistory:
    """The queries of `FakeServer` that ask for what was."""

    device_records: Any
    feed: Feed

    async def device(self, name: str) -> DeviceView:
        raise NotImplementedError

    async def devices(self, page: Page, wanted: DeviceFilter | None = None) -> Listing[DeviceView]:
        raise NotImplementedError

    def _find(self, name: str) -> Any:
        raise NotImplementedError

    def _round(self, run: Run) -> RoundView:
        raise NotImplementedError

    async def device_detail(self, name: str) -> DeviceDetail:
        outcomes = {Outcome.ACCEPTED: 3, Outcome.FAILED: 1}
        view = await self.device(name)
        return DeviceDetail(
            device=view, outcomes=outcomes, reliability=reliability(outcomes), agreement=(), run_names={}
        )

    async def device_lines(self, page: Page, wanted: DeviceFilter | None = None) -> Listing[DeviceLine]:
        found = await self.devices(page, wanted)
        items = tuple(DeviceLine(device=view, reliability=0.75, agreement=None) for view in found.items)
        return Listing(items=items, next_token=found.next_token)

    async def device_history(self, name: str, page: Page) -> Listing[WorkView]:
        view = await self.device(name)
        assert view.current is not None
        work = WorkView(view=view.current, run_name="demo", round_number=2, attempt=1)
        return Listing(items=(work,)[: page.size])

    async def device_counts(self) -> DeviceCounts:
        return DeviceCounts(total=len(self.device_records), online=2, by_state={DeviceState.APPROVED: 2}, tags=("lab",))

    async def device_names(self, ids: frozenset[DeviceId]) -> Mapping[DeviceId, str]:
        return {found.id: found.name for found in self.device_records.values() if found.id in ids}

    async def round(self, run_name: str, number: int, attempt: int | None = None) -> RoundView:
        found = self._round(self._find(run_name)[0])
        if number != found.round.number or attempt not in {None, found.round.attempt}:
            raise GloraError(Reason.ROUND_UNKNOWN, f"The run has no round {number}.", round=number)
        return found

    async def assignments(
        self, run_name: str, number: int, page: Page, attempt: int | None = None
    ) -> Listing[AssignmentView]:
        return Listing(items=(await self.round(run_name, number, attempt)).assignments[: page.size])

    async def series(self, run_name: str) -> RunSeries:
        self._find(run_name)
        return RunSeries(step=1, quality=(), versions=(), rounds=())

    async def spectrum(self, run_name: str) -> SpectrumMap:
        self._find(run_name)
        return SpectrumMap(modules=(), numbers=(), cells=(), modules_left_out=0)

    async def lineage(self, run_name: str, page: Page) -> Listing[Ancestor]:  # noqa: ARG002
        self._find(run_name)
        return Listing(items=())

    async def contributions(
        self,
        run_name: str,
        version_number: int,  # noqa: ARG002
        page: Page,  # noqa: ARG002
    ) -> Listing[Contribution]:
        self._find(run_name)
        return Listing(items=())

    async def exports(self, run_name: str, page: Page) -> Listing[Exportable]:  # noqa: ARG002
        self._find(run_name)
        return Listing(items=())

    async def alerts(self) -> tuple[Alert, ...]:
        return (Alert(severity=Severity.INFO, code="devices_pending", message="pi-3 waits for approval."),)

    async def events(self, after: str = "", *, heartbeat: float = 15.0) -> AsyncIterator[Batch]:
        """One batch, and then the end that a real server's events do not have."""
        async for batch in self.feed.follow(after, heartbeat=min(heartbeat, 0.01)):
            yield batch
            return
