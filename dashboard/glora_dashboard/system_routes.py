"""/api/v1/system, /strategies and /audit; and what needs no /api: health, readiness, metrics."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from glora_dashboard.bodies import AuditQuery, PageQuery
from glora_dashboard.device_models import DeviceCountsAnswer
from glora_dashboard.event_routes import event_routes
from glora_dashboard.models import AuditAnswer, HealthAnswer, PageAnswer, StrategyAnswer, SystemAnswer
from glora_dashboard.permission import ANYBODY, least
from glora_dashboard.plot_models import AlertAnswer
from glora_dashboard.ports import HealthProbe, Queries
from glora_server.coordinator.people import Role


def system_routes(queries: Queries) -> APIRouter:
    """Routes about the server itself, and what changes on it."""
    routes = APIRouter(tags=["system"])
    routes.include_router(event_routes(queries))

    @routes.get("/system", dependencies=[least(Role.VIEWER)])
    async def show_system() -> SystemAnswer:
        """Version, ports, database, worker, certificate authority."""
        return SystemAnswer.of(await queries.system())

    @routes.get("/system/devices", dependencies=[least(Role.VIEWER)])
    async def count_devices() -> DeviceCountsAnswer:
        """How many devices there are, online and by state, and the tags in use."""
        return DeviceCountsAnswer.of(await queries.device_counts())

    @routes.get("/alerts", dependencies=[least(Role.VIEWER)])
    async def list_alerts() -> PageAnswer[AlertAnswer]:
        """What somebody should look at, the worst first."""
        return PageAnswer(items=[AlertAnswer.of(alert) for alert in await queries.alerts()])

    @routes.get("/strategies", dependencies=[least(Role.VIEWER)])
    async def list_strategies() -> PageAnswer[StrategyAnswer]:
        """Strategies that a run can choose."""
        return PageAnswer(items=[StrategyAnswer.of(info) for info in await queries.strategies()])

    @routes.get("/audit", dependencies=[least(Role.OPERATOR)])
    async def list_audit(page: PageQuery, wanted: AuditQuery) -> PageAnswer[AuditAnswer]:
        """Who did what, newest first."""
        listing = await queries.audit(page, wanted)
        return PageAnswer(items=[AuditAnswer.of(entry) for entry in listing.items], next_page_token=listing.next_token)

    return routes


def open_routes(health: HealthProbe, metrics_text: Callable[[], tuple[bytes, str]]) -> APIRouter:
    """Routes that ask for no role; the gate decides who reaches them."""
    routes = APIRouter(include_in_schema=False, dependencies=[ANYBODY])

    @routes.get("/healthz")
    async def healthz() -> PlainTextResponse:
        """The process answers."""
        return PlainTextResponse("ok\n")

    @routes.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether database, worker and ports can do their work: 200 or 503."""
        answer = HealthAnswer.of(await health.check())
        return JSONResponse(answer.model_dump(), 200 if answer.status == "ready" else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        text, media_type = metrics_text()
        return Response(text, headers={"Content-Type": media_type})

    return routes
