"""Connections that stay open end when whoever opened them may no longer."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glora_server.coordinator.access import Access
from glora_server.coordinator.people import Principal
from glora_wire.errors import GloraError

_ASK_SECONDS: Final = 15.0
"""Ask this often even if nobody of this process said that something changed: another process may have."""
_POLICY_VIOLATION: Final = 1008


async def _lost(access: Access, principal: Principal) -> None:
    """Return when the principal's credential holds no longer, or for less than it did."""
    seen = access.revision
    while True:
        seen = await access.changed(seen, _ASK_SECONDS)
        with contextlib.suppress(GloraError):  # a database that is away for a moment says nothing about anybody
            now = await access.still_holds(principal)
            if now is None or not now.role.includes(principal.role):
                return


async def leashed_websocket(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, *, access: Access, principal: Principal
) -> None:
    """Serve a websocket, and close it when the principal is lost: the application sees that the peer went away."""
    lost = asyncio.create_task(_lost(access, principal))
    closed = False

    async def leashed_receive() -> Message:
        nonlocal closed
        message = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({message, lost}, return_when=asyncio.FIRST_COMPLETED)
            if message.done():
                return message.result()
        finally:
            message.cancel()
        if not closed:
            closed = True
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": "signed out"})
        return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION}

    async def leashed_send(message: Message) -> None:
        if not lost.done():
            await send(message)

    try:
        await app(scope, leashed_receive, leashed_send)
    finally:
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)


class _CutError(OSError):
    """What a response is told that nobody may read any further."""


async def leashed_http(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, *, access: Access, principal: Principal
) -> None:
    """Serve a request; an answer that is streamed stops when the principal is lost."""
    lost: asyncio.Task[None] | None = None
    announced = False

    async def leashed_send(message: Message) -> None:
        nonlocal lost, announced
        if message["type"] == "http.response.start":
            announced = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
        elif lost is not None and lost.done():
            raise _CutError("the session or token was taken away")
        elif lost is None and message.get("more_body", False):
            lost = asyncio.create_task(_lost(access, principal))
        await send(message)

    try:
        await app(scope, receive, leashed_send)
    except (OSError, ClientDisconnect):
        if lost is None or not lost.done():
            raise
        # An answer of known length stays short, so that nobody takes it for whole; others get their end.
        if not announced:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        if lost is not None:
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)
