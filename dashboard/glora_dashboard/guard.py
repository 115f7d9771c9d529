"""The gate before everything, as plain ASGI so that nothing passes it: REST, pages, static files, websockets.

It says who asks (`permission.principal_of`) or refuses; what somebody may do is said by each route and page. Nothing is
open but the few paths of `gate.OPEN_PATHS`. A request whose body is too large ends here too.
"""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glora_dashboard.gate import (
    SESSION_COOKIE,
    GateRules,
    check_same_origin,
    login_address,
    wants_page,
)
from glora_dashboard.leash import leashed_http, leashed_websocket
from glora_dashboard.problems import problem_response
from glora_server.coordinator.access import Access
from glora_server.coordinator.people import Principal
from glora_wire.errors import GloraError, Reason

MAX_BODY_BYTES: Final = 20 * 1024 * 1024
"""A manifest may have 16 MiB."""
STRANGERS_BODY_BYTES: Final = 64 * 1024
"""A name and a password: what somebody who has not signed in may send."""
_POLICY_VIOLATION: Final = 1008
PAGE_POLICY: Final = (
    # NiceGUI's page starts from inline scripts, and Vue compiles its templates with Function().
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    # 'self' lets the page's websocket pass too: it has the same host.
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
"""What our pages may load and ask: this server only."""
DATA_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
"""What everything else may, should a browser ever show it as a page."""


class Guard:
    """ASGI middleware: puts the principal into the scope, and refuses who is not known, or a body that is too large."""

    def __init__(self, app: ASGIApp, *, access: Access, rules: GateRules, max_body: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._access = access
        self._rules = rules
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        match scope["type"]:
            case "http":
                await self._http(scope, receive, _with_headers(send))
            case "websocket":
                await self._websocket(scope, receive, send)
            case _:
                await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            principal = await self._who(scope, headers)
            if principal is None and not self._rules.is_open(scope["path"]):
                await _ask_to_sign_in(scope, headers)(scope, receive, send)
                return
            limit = self._max_body if principal is not None else min(self._max_body, STRANGERS_BODY_BYTES)
            messages = await _read_body(headers, receive, limit)
        except GloraError as error:
            await problem_response(error)(scope, receive, send)
            return
        except _TooLargeError as error:
            await problem_response(error.error, 413)(scope, receive, send)
            return
        _introduce(scope, principal)
        again = replayed(messages, receive)
        if principal is None:
            await self._app(scope, again, send)
        else:
            await leashed_http(self._app, scope, again, send, access=self._access, principal=principal)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            principal = await self._who(scope, Headers(scope=scope))
        except GloraError:
            principal = None
        if principal is None:
            await receive()
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": "sign in first"})
            return
        _introduce(scope, principal)
        await leashed_websocket(self._app, scope, receive, send, access=self._access, principal=principal)

    async def _who(self, scope: Scope, headers: Headers) -> Principal | None:
        """Who asks; None: nobody said so. Raises SIGN_IN_NEEDED (wrong token), HOST_REFUSED, ORIGIN_REFUSED.

        A token that is sent on purpose proves more than a cookie that a browser adds: only the latter's requests are
        asked where they come from.
        """
        origin = (scope.get("client") or ("", 0))[0]
        if "authorization" in headers:
            return await self._bearer(headers["authorization"], origin)
        self._rules.check_host(headers)
        secret = cookie_parser(headers.get("cookie", "")).get(SESSION_COOKIE, "")
        principal = await self._access.of_session(secret, origin=origin) if secret else None
        if principal is not None:
            check_same_origin(scope, headers)
        return principal

    async def _bearer(self, authorization: str, origin: str) -> Principal:
        scheme, _, token = authorization.partition(" ")
        principal = None
        if scheme.lower() == "bearer":
            principal = await self._access.of_bearer(token.strip(), origin=origin)
        if principal is None:
            raise GloraError(
                Reason.SIGN_IN_NEEDED,
                "The token is wrong, has ended or was revoked: make another one with `glora login` or `glora api-token "
                "create`. On the server's machine the data folder's admin.token is one.",
            )
        return principal


async def _read_body(headers: Headers, receive: Receive, limit: int) -> list[Message]:
    """The messages of a whole body of at most `limit` bytes; raises _TooLargeError."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise _TooLargeError(limit)
    messages: list[Message] = []
    total = 0
    while True:
        message = await receive()
        messages.append(message)
        total += len(message.get("body", b""))
        if total > limit:
            raise _TooLargeError(limit)
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages


class _TooLargeError(Exception):
    def __init__(self, limit: int) -> None:
        sentence = f"The request is too large; at most {limit // 1024} KiB are taken."
        self.error = GloraError(Reason.REQUEST_INVALID, sentence)


def _introduce(scope: Scope, principal: Principal | None) -> None:
    """Say who asks to whatever comes behind the gate."""
    scope["state"] = dict(scope.get("state", {})) | {"principal": principal}


def _ask_to_sign_in(scope: Scope, headers: Headers) -> Response:
    if wants_page(scope, headers):
        return RedirectResponse(login_address(scope), 303)
    return problem_response(
        GloraError(
            Reason.SIGN_IN_NEEDED,
            "This needs somebody who has signed in: send 'Authorization: Bearer TOKEN' (glora: --token, or once "
            "`glora login`), or sign in at /login.",
        )
    )


def _with_headers(send: Send) -> Send:
    """Tell caches to keep nothing, browsers to guess nothing, and other sites' pages not to frame ours."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("Cache-Control", "no-store")
            headers.setdefault("X-Content-Type-Options", "nosniff")
            headers.setdefault("X-Frame-Options", "DENY")
            # Not "no-referrer": browsers then send "Origin: null" with our own forms, and the gate would refuse them.
            headers.setdefault("Referrer-Policy", "same-origin")
            headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
            is_page = headers.get("content-type", "").startswith("text/html")
            headers.setdefault("Content-Security-Policy", PAGE_POLICY if is_page else DATA_POLICY)
        await send(message)

    return send_with_headers


def replayed(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives the messages of a body that was read already, and then what still comes."""
    waiting = iter(messages)

    async def answer() -> Message:
        message = next(waiting, None)
        return message if message is not None else await receive()

    return answer
