"""The HTTP application: REST under /api/v1, health, metrics. It reads queries, sends commands, decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Final

from fastapi import APIRouter, FastAPI

from glora_dashboard.device_routes import device_routes, token_routes
from glora_dashboard.export_routes import export_routes
from glora_dashboard.guard import MAX_BODY_BYTES, Guard
from glora_dashboard.permission import RoleApi, route_roles
from glora_dashboard.ports import Commands, HealthProbe, Queries
from glora_dashboard.problems import MEDIA_TYPE, Problem, add_problem_handlers
from glora_dashboard.run_routes import run_routes
from glora_dashboard.system_routes import open_routes, system_routes

PREFIX: Final = "/api/v1"
_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    code: {"model": Problem, "content": {MEDIA_TYPE: {}}} for code in (400, 401, 404, 409, 413, 422, 503)
}


def create_app(
    commands: Commands,
    queries: Queries,
    *,
    admin_token_check: Callable[[str], bool],
    health: HealthProbe,
    metrics_text: Callable[[], tuple[bytes, str]],
    metrics_open: bool,
    work_dir: Path,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The application that uvicorn serves.

    `admin_token_check` says whether a bearer token is the right one; `metrics_text` gives Prometheus text and its
    media type; `metrics_open` is true where only this machine can reach the port or the settings say so; `work_dir`
    holds archives of exports while they are being sent.
    """
    version = installed_version("glora")
    app = RoleApi(
        title="glora",
        version=version,
        description="Federated LoRA fine-tuning. Every request under /api needs `Authorization: Bearer TOKEN`.",
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, check=admin_token_check, max_body=max_body_bytes)
    add_problem_handlers(app)
    api = APIRouter(prefix=PREFIX, responses=_PROBLEMS)
    for routes in (
        device_routes(commands, queries),
        token_routes(commands, queries),
        run_routes(commands, queries),
        export_routes(commands, work_dir),
        system_routes(queries),
    ):
        api.include_router(routes)
    app.include_router(api)
    app.include_router(open_routes(health, metrics_text, admin_token_check, metrics_open=metrics_open, version=version))
    route_roles(app)
    return app
