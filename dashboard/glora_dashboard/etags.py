"""ETags on everything that is read whole, and If-Match on what is changed.

An ETag is a digest of the answer's bytes: who has them already sends If-None-Match and gets 304 without a body. For
changes the bytes are of no use, since an online device's last sign of life is another one every second; If-Match takes
`"rev-N"` with N the `row_version` of the answer that somebody decided on.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Annotated, Final

from fastapi import Depends, Header
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glora_wire.errors import GloraError, Reason

JSON: Final = "application/json"
_REVISION: Final = re.compile(r'"rev-(0|[1-9][0-9]{0,17})"')


def etag_of(body: bytes) -> str:
    """A strong ETag: 132 bits of the body's SHA-256."""
    return f'"{base64.urlsafe_b64encode(hashlib.sha256(body).digest())[:22].decode()}"'


class ETags:
    """ASGI middleware: whole JSON answers to GET under /api carry an ETag; 304 when the client has that one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; hold a JSON answer until it is whole."""
        if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        wanted = Headers(scope=scope).get("if-none-match", "")
        start: Message | None = None
        body = bytearray()

        async def hold(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_whole_json(message):
                start = message
                return
            if start is None:
                await send(message)
                return
            body.extend(message.get("body", b""))
            if not message.get("more_body", False):
                await _answer(start, bytes(body), wanted, send)

        await self._app(scope, receive, hold)


def _is_whole_json(message: Message) -> bool:
    """Whether it is JSON of known length; what is written while it is sent is never held."""
    headers = Headers(raw=message["headers"])
    return message["status"] == 200 and headers.get("content-type", "").startswith(JSON) and "content-length" in headers


async def _answer(start: Message, body: bytes, wanted: str, send: Send) -> None:
    tag = etag_of(body)
    headers = MutableHeaders(raw=list(start["headers"]))
    headers["ETag"] = tag
    known = [given.strip().removeprefix("W/") for given in wanted.split(",")]
    if tag in known or wanted.strip() == "*":
        del headers["content-length"]
        del headers["content-type"]
        await send({"type": "http.response.start", "status": 304, "headers": headers.raw})
        await send({"type": "http.response.body", "body": b""})
        return
    await send({**start, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body})


def _expected(
    if_match: Annotated[
        str,
        Header(
            max_length=64,
            description='Change it only if nobody else did: `"rev-N"` with N its `row_version` as you know it. '
            "Left out or `*`: change it in any case.",
            examples=['"rev-3"'],
        ),
    ] = "",
) -> int | None:
    """The row version that the thing must have; raises REQUEST_INVALID."""
    if if_match.strip() in {"", "*"}:
        return None
    found = _REVISION.fullmatch(if_match.strip())
    if found is None:
        raise GloraError(
            Reason.REQUEST_INVALID,
            f'If-Match: {if_match!r} is not understood; send "rev-N" in double quotes, N being the row_version of the '
            "answer that you decided on.",
        )
    return int(found[1])


IfMatch = Annotated[int | None, Depends(_expected)]
"""The row version that whoever changes something knows; None: any."""
