"""The gate before everything under /api, as plain ASGI so that nothing passes it: a token, and no body too large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glora_dashboard.problems import problem_response
from glora_server.coordinator.people import Credential, Principal, Role
from glora_wire.errors import GloraError, Reason

MAX_BODY_BYTES: Final = 20 * 1024 * 1024
"""A manifest may have 16 MiB."""


def require_token(headers: Headers, check: Callable[[str], bool]) -> None:
    """Return when the request carries the administration token; raises ADMIN_TOKEN_INVALID."""
    given = headers.get("authorization", "")
    scheme, _, token = given.partition(" ")
    if scheme.lower() == "bearer" and check(token.strip()):
        return
    what = "The administration token is wrong" if given else "This needs the administration token"
    raise GloraError(
        Reason.ADMIN_TOKEN_INVALID,
        f"{what}: send 'Authorization: Bearer TOKEN' (glora: --admin-token or $GLORA_ADMIN_TOKEN). The token stands in "
        "admin.token in the server's data folder.",
    )


class Guard:
    """ASGI middleware: /api needs the token, and no request body is longer than `max_body` bytes."""

    def __init__(self, app: ASGIApp, *, check: Callable[[str], bool], max_body: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._check = check
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer with a problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"].lower().startswith("/api"):
                require_token(headers, self._check)
                scope.setdefault("state", {})["principal"] = _admin_token_holder(scope)
            self._check_announced(headers)
            messages = await self._read_body(receive)
        except GloraError as error:
            status = None if error.reason is Reason.ADMIN_TOKEN_INVALID else 413
            await problem_response(error, status)(scope, receive, send)
            return
        await self._app(scope, _replay(messages, receive), _unstored(send))

    def _check_announced(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._max_body:
            raise self._too_large()

    async def _read_body(self, receive: Receive) -> list[Message]:
        messages: list[Message] = []
        total = 0
        while True:
            message = await receive()
            messages.append(message)
            total += len(message.get("body", b""))
            if total > self._max_body:
                raise self._too_large()
            if message["type"] != "http.request" or not message.get("more_body", False):
                return messages

    def _too_large(self) -> GloraError:
        limit = self._max_body // (1024 * 1024)
        return GloraError(Reason.REQUEST_INVALID, f"The request is too large; at most {limit} MiB are taken.")


def _admin_token_holder(scope: Scope) -> Principal:
    client = scope.get("client") or ("", 0)
    return Principal(name="admin.token", role=Role.ADMIN, credential=Credential.ADMIN_TOKEN, origin=client[0])


def _unstored(send: Send) -> Send:
    """Tell caches and browsers to keep nothing and to guess nothing."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("Cache-Control", "no-store")
            headers.setdefault("X-Content-Type-Options", "nosniff")
        await send(message)

    return send_with_headers


def _replay(messages: list[Message], receive: Receive) -> Receive:
    waiting = iter(messages)

    async def answer() -> Message:
        message = next(waiting, None)
        return message if message is not None else await receive()

    return answer
