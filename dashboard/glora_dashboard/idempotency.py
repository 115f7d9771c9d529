"""Idempotency-Key: a change that is sent twice happens once, and is answered twice.

A client that does not know whether its POST arrived sends it again with the same key, and gets the first answer. Kept
for a day, for the principal who asked, and only what changed something (2xx, JSON). What is kept is encrypted with the
key of the request, since it can hold a new token: the database knows neither.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from typing import Final
from weakref import WeakValueDictionary

from cryptography.fernet import Fernet, InvalidToken
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glora_dashboard.guard import replayed
from glora_dashboard.permission import principal_of
from glora_dashboard.ports import Answers
from glora_dashboard.problems import problem_response
from glora_server.coordinator.people import Principal
from glora_wire.errors import GloraError, Reason

HEADER: Final = "idempotency-key"
_LONGEST_KEY: Final = 128
_SHORTEST_KEY: Final = 8
_LARGEST_ANSWER: Final = 1024 * 1024
_KEPT_HEADERS: Final = frozenset({"content-type", "location"})


class Idempotency:
    """ASGI middleware, behind the gate: answers a repeated POST under /api with what it was answered before."""

    def __init__(self, app: ASGIApp, *, answers: Answers) -> None:
        self._app = app
        self._answers = answers
        self._going_on: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        """A repetition waits for the request that it repeats; a lock is there while anybody holds it or waits."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer again."""
        principal = principal_of(scope) if scope["type"] == "http" else None
        key = Headers(scope=scope).get(HEADER) if principal is not None else None
        if principal is None or key is None or scope["method"] != "POST" or not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        try:
            _check(key)
            await self._once(principal, key, scope, receive, send)
        except _RefusedError as refused:
            await problem_response(refused.error, 422)(scope, receive, send)

    async def _once(self, principal: Principal, key: str, scope: Scope, receive: Receive, send: Send) -> None:
        who, key_sha256 = f"{principal.name} {principal.role}", hashlib.sha256(key.encode()).hexdigest()
        messages, request_sha256 = await _read(scope, receive)
        lock = self._going_on.setdefault((who, key_sha256), asyncio.Lock())
        async with lock:
            kept = await self._answers.find(who, key_sha256)
            if kept is None:
                await self._serve(scope, messages, receive, send, _Place(who, key, key_sha256, request_sha256))
                return
            if kept[0] != request_sha256:
                raise _RefusedError("was used for another request; take a new key for a new change")
            await _again(_opened(kept[1], key), send)

    async def _serve(self, scope: Scope, messages: list[Message], receive: Receive, send: Send, place: _Place) -> None:
        """Serve for the first time; the answer is kept before it is sent."""
        start: Message | None = None
        body = bytearray()

        async def hold(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_kept(message):
                start = message
                return
            if start is None:
                await send(message)
                return
            body.extend(message.get("body", b""))
            if not message.get("more_body", False):
                if len(body) <= _LARGEST_ANSWER:
                    sealed = _sealed(start, bytes(body), place.key)
                    await self._answers.keep(place.who, place.key_sha256, place.request_sha256, sealed)
                await send(start)
                await send({"type": "http.response.body", "body": bytes(body)})

        await self._app(scope, replayed(messages, receive), hold)


class _Place:
    """Where an answer is kept."""

    def __init__(self, who: str, key: str, key_sha256: str, request_sha256: str) -> None:
        self.who, self.key, self.key_sha256, self.request_sha256 = who, key, key_sha256, request_sha256


class _RefusedError(Exception):
    def __init__(self, what: str) -> None:
        self.error = GloraError(Reason.REQUEST_INVALID, f"This Idempotency-Key {what}.")


def _check(key: str) -> None:
    if not _SHORTEST_KEY <= len(key) <= _LONGEST_KEY or not all(" " < letter <= "~" for letter in key):
        raise _RefusedError(
            f"cannot be used: it must have {_SHORTEST_KEY} to {_LONGEST_KEY} letters, digits and signs, best a UUID"
        )


async def _read(scope: Scope, receive: Receive) -> tuple[list[Message], str]:
    """The body's messages (the gate has bounded them), and a digest of method, address and body."""
    digest = hashlib.sha256(f"{scope['method']} {scope['path']}?".encode() + scope.get("query_string", b"") + b"\n")
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        digest.update(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return messages, digest.hexdigest()


def _is_kept(start: Message) -> bool:
    kind = Headers(raw=start["headers"]).get("content-type", "")
    return 200 <= start["status"] < 300 and kind.startswith("application/json")


def _cipher(key: str) -> Fernet:
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(b"glora answer " + key.encode()).digest()))


def _sealed(start: Message, body: bytes, key: str) -> bytes:
    headers = {name: value for name, value in Headers(raw=start["headers"]).items() if name in _KEPT_HEADERS}
    document = {"status": start["status"], "headers": headers, "body": body.decode()}
    return _cipher(key).encrypt(json.dumps(document).encode())


def _opened(sealed: bytes, key: str) -> bytes:
    try:
        return _cipher(key).decrypt(sealed)
    except InvalidToken as error:
        raise _RefusedError("has a stored answer that cannot be read; take a new key") from error


async def _again(document: bytes, send: Send) -> None:
    kept = json.loads(document)
    body = kept["body"].encode()
    headers = MutableHeaders(kept["headers"] | {"content-length": str(len(body)), "idempotency-replayed": "true"})
    await send({"type": "http.response.start", "status": kept["status"], "headers": headers.raw})
    await send({"type": "http.response.body", "body": body})
