"""The HTTP application: REST under /api/v1, health, metrics. It reads queries, sends commands, decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, FastAPI

from glora_dashboard.access_routes import access_routes
from glora_dashboard.audit_routes import audit_routes
from glora_dashboard.description import RestApi
from glora_dashboard.device_routes import device_routes, token_routes
from glora_dashboard.etags import ETags
from glora_dashboard.export_routes import export_routes
from glora_dashboard.gate import GateRules
from glora_dashboard.guard import MAX_BODY_BYTES, Guard
from glora_dashboard.idempotency import Idempotency
from glora_dashboard.login import login_routes
from glora_dashboard.permission import route_roles
from glora_dashboard.ports import Answers, Commands, HealthProbe, Queries
from glora_dashboard.problems import MEDIA_TYPE, Problem, add_problem_handlers
from glora_dashboard.run_routes import run_routes
from glora_dashboard.system_routes import open_routes, system_routes
from glora_server.coordinator.access import Access

PREFIX: Final = "/api/v1"
_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    code: {"model": Problem, "content": {MEDIA_TYPE: {}}} for code in (400, 401, 403, 404, 409, 413, 422, 429, 503)
}


def create_app(
    commands: Commands,
    queries: Queries,
    *,
    access: Access,
    health: HealthProbe,
    metrics_text: Callable[[], tuple[bytes, str]],
    rules: GateRules,
    answers: Answers,
    work_dir: Path,
    max_body_bytes: int = MAX_BODY_BYTES,
    with_pages: bool = False,
) -> FastAPI:
    """The application that uvicorn serves.

    `access` knows people, `rules` what is open to strangers; `metrics_text` gives Prometheus text and its media type;
    `answers` keeps those that may be asked for again; `work_dir` holds archives of exports while they are being sent.
    With pages NiceGUI is loaded, which wants to be imported before an event loop runs, and the application's lifespan.
    """
    app = RestApi(
        title="glora",
        version=installed_version("glora"),
        description="Federated LoRA fine-tuning. Requests carry `Authorization: Bearer TOKEN` (see `glora login`) or "
        "the cookie of a browser that signed in; `x-role` says which role an operation needs.",
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(ETags)
    app.add_middleware(Idempotency, answers=answers)
    app.add_middleware(Guard, access=access, rules=rules, max_body=max_body_bytes)
    add_problem_handlers(app)
    api = APIRouter(prefix=PREFIX, responses=_PROBLEMS)
    for routes in (
        device_routes(commands, queries),
        token_routes(commands, queries),
        run_routes(commands, queries),
        export_routes(commands, work_dir),
        system_routes(queries),
        audit_routes(queries),
        access_routes(access),
    ):
        api.include_router(routes)
    app.include_router(api)
    app.include_router(open_routes(health, metrics_text))
    app.include_router(login_routes(access))
    route_roles(app)
    if with_pages:
        from glora_dashboard.pages.mounting import mount_pages  # noqa: PLC0415 - NiceGUI is large
        from glora_dashboard.pages.site import Site  # noqa: PLC0415

        mount_pages(app, Site(commands=commands, queries=queries, access=access, health=health))
    return app
