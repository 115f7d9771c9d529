"""/api/v1/runs/NAME/…: rounds, versions and what plots are drawn from."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query

from glora_dashboard.bodies import Name, PageQuery
from glora_dashboard.device_models import ContributionAnswer
from glora_dashboard.models import (
    AssignmentAnswer,
    DiagnosticsAnswer,
    MeasurementAnswer,
    PageAnswer,
    VersionAnswer,
)
from glora_dashboard.permission import least
from glora_dashboard.plot_models import AncestorAnswer, ExportableAnswer, SeriesAnswer, SpectrumAnswer
from glora_dashboard.ports import Queries
from glora_dashboard.run_models import RoundAnswer
from glora_server.coordinator.people import Role

LARGEST: int = 2**31 - 1
Number = Annotated[int, Path(ge=0, le=LARGEST, description="Number of the round or version.")]
Attempt = Annotated[int | None, Query(ge=1, le=LARGEST, description="Left out: the last attempt.")]


def history_routes(queries: Queries) -> APIRouter:
    """Routes that show what a run did."""
    routes = APIRouter(prefix="/runs/{name}", tags=["history"], dependencies=[least(Role.VIEWER)])
    _add_rounds(routes, queries)
    _add_versions(routes, queries)
    _add_plots(routes, queries)
    return routes


def _add_rounds(routes: APIRouter, queries: Queries) -> None:
    @routes.get("/rounds")
    async def list_rounds(name: Name, page: PageQuery) -> PageAnswer[RoundAnswer]:
        """Rounds without their devices, newest first."""
        listing = await queries.rounds(name, page)
        return PageAnswer(items=[RoundAnswer.of(view) for view in listing.items], next_page_token=listing.next_token)

    @routes.get("/rounds/{number}")
    async def show_round(name: Name, number: Number, attempt: Attempt = None) -> RoundAnswer:
        """One round with the first 200 of its devices, those that are still at it first."""
        return RoundAnswer.of(await queries.round(name, number, attempt))

    @routes.get("/rounds/{number}/assignments")
    async def list_assignments(
        name: Name, number: Number, page: PageQuery, attempt: Attempt = None
    ) -> PageAnswer[AssignmentAnswer]:
        """All devices of a round, in the order in which they were chosen."""
        listing = await queries.assignments(name, number, page, attempt)
        items = [AssignmentAnswer.of(view) for view in listing.items]
        return PageAnswer(items=items, next_page_token=listing.next_token)


def _add_versions(routes: APIRouter, queries: Queries) -> None:
    @routes.get("/versions")
    async def list_versions(name: Name, page: PageQuery) -> PageAnswer[VersionAnswer]:
        """Published versions, newest first."""
        listing = await queries.versions(name, page)
        items = [VersionAnswer.of(version) for version in listing.items]
        return PageAnswer(items=items, next_page_token=listing.next_token)

    @routes.get("/versions/{number}/diagnostics")
    async def list_diagnostics(name: Name, number: Number, page: PageQuery) -> PageAnswer[DiagnosticsAnswer]:
        """What aggregation measured for a version, by module."""
        listing = await queries.diagnostics(name, number, page)
        items = [DiagnosticsAnswer.of(found) for found in listing.items]
        return PageAnswer(items=items, next_page_token=listing.next_token)

    @routes.get("/versions/{number}/contributions")
    async def list_contributions(name: Name, number: Number, page: PageQuery) -> PageAnswer[ContributionAnswer]:
        """The devices that made a version, the largest share first."""
        listing = await queries.contributions(name, number, page)
        names = await queries.device_names(frozenset(item.device_id for item in listing.items))
        items = [
            ContributionAnswer.of(item, run=name, device=names.get(item.device_id, item.device_id))
            for item in listing.items
        ]
        return PageAnswer(items=items, next_page_token=listing.next_token)

    @routes.get("/lineage")
    async def list_lineage(name: Name, page: PageQuery) -> PageAnswer[AncestorAnswer]:
        """Versions, newest first, with the devices that made them."""
        listing = await queries.lineage(name, page)
        ids = frozenset(part.device_id for item in listing.items for part in item.largest)
        names = dict(await queries.device_names(ids))
        items = [AncestorAnswer.of(item, run=name, names=names) for item in listing.items]
        return PageAnswer(items=items, next_page_token=listing.next_token)

    @routes.get("/exports")
    async def list_exports(name: Name, page: PageQuery) -> PageAnswer[ExportableAnswer]:
        """Versions that can be exported, newest first, with how good they are at each rank."""
        listing = await queries.exports(name, page)
        items = [ExportableAnswer.of(item) for item in listing.items]
        return PageAnswer(items=items, next_page_token=listing.next_token)


def _add_plots(routes: APIRouter, queries: Queries) -> None:
    @routes.get("/measurements")
    async def list_measurements(name: Name, page: PageQuery) -> PageAnswer[MeasurementAnswer]:
        """Every evaluation, by version, rank and device."""
        listing = await queries.measurements(name, page)
        items = [MeasurementAnswer.of(found) for found in listing.items]
        return PageAnswer(items=items, next_page_token=listing.next_token)

    @routes.get("/series")
    async def show_series(name: Name) -> SeriesAnswer:
        """What is plotted over the rounds: quality, energy, norms, bytes, seconds."""
        return SeriesAnswer.of(await queries.series(name))

    @routes.get("/spectrum")
    async def show_spectrum(name: Name) -> SpectrumAnswer:
        """The consensus spectrum by module and round."""
        return SpectrumAnswer.of(await queries.spectrum(name))
