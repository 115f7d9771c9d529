"""/api/v1/audit/export: every row of the audit that fits, as one JSON file that is written while it is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final, Protocol

from fastapi import APIRouter
from starlette.responses import StreamingResponse

from glora_dashboard.bodies import AuditQuery
from glora_dashboard.description import STREAMED
from glora_dashboard.models import AuditAnswer
from glora_dashboard.permission import least
from glora_dashboard.ports import Queries
from glora_server.coordinator.model import AuditEntry, Listing, Page
from glora_server.coordinator.people import Role
from glora_server.coordinator.views_history import AuditFilter

_ROWS_AT_ONCE: Final = 500


def audit_routes(queries: Queries) -> APIRouter:
    """The route that hands out the audit whole."""
    routes = APIRouter(prefix="/audit", tags=["system"])

    @routes.get(
        "/export",
        dependencies=[least(Role.OPERATOR)],
        response_class=StreamingResponse,
        responses={200: {"content": {"application/json": {"schema": {"type": "array", "items": {"type": "object"}}}}}},
        openapi_extra={STREAMED: True},
    )
    async def export_audit(wanted: AuditQuery) -> StreamingResponse:
        """The rows as a JSON array, newest first; the same query as /audit, without pages."""
        headers = {"Content-Disposition": 'attachment; filename="glora-audit.json"', "Cache-Control": "no-store"}
        return StreamingResponse(written_audit(queries, wanted), media_type="application/json", headers=headers)

    return routes


class AuditQueries(Protocol):
    """What is asked for the file."""

    async def audit(self, page: Page, wanted: AuditFilter = ...) -> Listing[AuditEntry]:
        """Who did what, newest first."""
        ...


async def written_audit(queries: AuditQueries, wanted: AuditFilter) -> AsyncIterator[bytes]:
    """The array in parts; never holds more rows than one part of the list."""
    token, before = "", b"[\n"
    while True:
        listing = await queries.audit(Page(size=_ROWS_AT_ONCE, token=token), wanted)
        for entry in listing.items:
            yield before + AuditAnswer.of(entry).model_dump_json().encode()
            before = b",\n"
        token = listing.next_token
        if not token:
            break
    yield b"[]\n" if before == b"[\n" else b"\n]\n"
