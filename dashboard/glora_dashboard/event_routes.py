"""/api/v1/events: what changed, as server-sent events.

A client keeps one request open and reads events; an event says that something changed, and the thing's own address
says what it is now. `id` of the last event goes into Last-Event-ID to go on after a pause. A client that was away too
long, or whose server was restarted, gets a "reset": read everything again that is shown.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import APIRouter, Header, Query
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from glora_dashboard.permission import least
from glora_dashboard.places import Places
from glora_dashboard.ports import Queries
from glora_server.coordinator.feed import Batch, Change, ChangeKind
from glora_server.coordinator.people import Role

MEDIA_TYPE: Final = "text/event-stream"
MOST_LISTENERS: Final = 500
_HEARTBEAT_SECONDS: Final = 10.0
_RECONNECT_MILLISECONDS: Final = 2000
_EXAMPLE: Final = (
    'retry: 2000\n\nid: 5f0c-12\nevent: round\ndata: {"id":"r7","run_id":"k3","number":7}\n\n: still here\n\n'
)


class _Stream(StreamingResponse):
    """Events for one listener, whose place is free again however that ends, even before the first one is sent."""

    def __init__(self, lines: AsyncIterator[str], places: Places) -> None:
        super().__init__(lines, media_type=MEDIA_TYPE, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until somebody goes away; raises TOO_MANY_REQUESTS."""
        self._places.take()
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._places.give_back()


def event_routes(queries: Queries, *, most: int = MOST_LISTENERS, heartbeat: float = _HEARTBEAT_SECONDS) -> APIRouter:
    """The route of the events."""
    routes = APIRouter(tags=["events"])
    places = Places(most, "clients listen for events")

    @routes.get(
        "/events",
        dependencies=[least(Role.VIEWER)],
        response_class=StreamingResponse,
        responses={200: {"content": {MEDIA_TYPE: {"schema": {"type": "string"}, "example": _EXAMPLE}}}},
    )
    async def follow_events(
        last_event_id: Annotated[str, Header(max_length=64, description="Go on after this event.")] = "",
        after: Annotated[str, Query(max_length=64, description="The same, where headers cannot be set.")] = "",
        run: Annotated[str, Query(max_length=128, description="Only what concerns the run of this id.")] = "",
    ) -> StreamingResponse:
        """Changes of runs, rounds and devices as they happen, at most two batches a second; never ends by itself."""
        batches = queries.events(last_event_id or after, heartbeat=heartbeat)
        return _Stream(_lines(batches, run), places)

    return routes


async def _lines(batches: AsyncIterator[Batch], run: str) -> AsyncIterator[str]:
    yield f"retry: {_RECONNECT_MILLISECONDS}\n\n"
    async for batch in batches:
        wanted = [change for change in batch.changes if _concerns(change, run)]
        # The place is that of the whole batch: what was left out by `run` is not asked for again either.
        yield "".join(_event(change, batch.place) for change in wanted) or ": still here\n\n"


def _concerns(change: Change, run: str) -> bool:
    return not run or change.kind is ChangeKind.RESET or run in {change.id, change.run_id}


def _event(change: Change, place: str) -> str:
    data: dict[str, str | int] = {"id": change.id, "revision": change.revision}
    if change.kind is ChangeKind.ROUND:
        data |= {"run_id": change.run_id, "number": change.number or 0}
    return f"id: {place}\nevent: {change.kind.value}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
