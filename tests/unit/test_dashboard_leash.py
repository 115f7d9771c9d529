"""Connections that stay open are cut when the session or token behind them is taken away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from access_cases import PASSWORD, memory_access
from people_cases import ADMIN
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from glora_dashboard.gate import GateRules
from glora_dashboard.guard import Guard
from glora_server.coordinator.access import Access
from glora_server.coordinator.people import Role

PATIENCE = 5.0


@pytest.fixture
def access() -> Iterator[Access]:
    with memory_access("the-token-of-the-data-folder") as access:
        yield access


@pytest.fixture
async def token(access: Access) -> str:
    await access.create_user(ADMIN, "admin", Role.ADMIN, PASSWORD)
    await access.create_user(ADMIN, "ada", Role.OPERATOR, PASSWORD)
    return (await access.create_api_token(ADMIN, name="test", role=Role.OPERATOR, user="ada"))[1]


class Peer:
    """The other end of one connection."""

    def __init__(self, kind: str, token: str, **scope: object) -> None:
        self.scope: Scope = {
            "type": kind,
            "path": "/",
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {token}".encode())],
            "client": ("192.0.2.1", 1),
            "asgi": {"spec_version": "2.4"},
            **scope,
        }
        self.says: asyncio.Queue[Message] = asyncio.Queue()
        self.heard: list[Message] = []
        self.news = asyncio.Event()

    async def send(self, message: Message) -> None:
        self.heard.append(message)
        self.news.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.heard) < count:
                self.news.clear()
                await self.news.wait()

    def connected(self, app: ASGIApp, access: Access) -> asyncio.Task[None]:
        guard = Guard(app, access=access, rules=GateRules())

        async def serve() -> None:
            await guard(self.scope, self.says.get, self.send)

        return asyncio.create_task(serve())


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Says back what it hears; its end is told by an exception, as starlette does."""
    socket = WebSocket(scope, receive, send)
    await socket.accept()
    try:
        while True:
            await socket.send_text(await socket.receive_text())
    except WebSocketDisconnect as gone:
        scope["state"]["gone"].append(gone.code)


async def test_a_websocket_is_cut_when_its_token_is_revoked(access: Access, token: str) -> None:
    gone: list[int] = []
    peer = Peer("websocket", token, state={"gone": gone})
    task = peer.connected(echo, access)
    peer.says.put_nowait({"type": "websocket.connect"})
    peer.says.put_nowait({"type": "websocket.receive", "text": "hello"})
    await peer.until(2)
    assert peer.heard[1]["text"] == "hello"
    mine = (await access.api_tokens(ADMIN)).items[0].token
    await access.revoke_api_token(ADMIN, mine.id)
    await asyncio.wait_for(task, PATIENCE)
    assert (peer.heard[-1]["type"], peer.heard[-1]["code"]) == ("websocket.close", 1008)
    assert gone == [1008], "the application saw the peer go"


async def test_a_websocket_is_cut_when_its_user_may_do_less(access: Access, token: str) -> None:
    peer = Peer("websocket", token, state={"gone": []})
    task = peer.connected(echo, access)
    peer.says.put_nowait({"type": "websocket.connect"})
    await peer.until(1)
    await access.set_role(ADMIN, "ada", Role.VIEWER)
    await asyncio.wait_for(task, PATIENCE)
    assert peer.heard[-1]["type"] == "websocket.close"


async def test_what_happens_to_others_cuts_nobody(access: Access, token: str) -> None:
    await access.create_user(ADMIN, "bob", Role.VIEWER, PASSWORD)
    peer = Peer("websocket", token, state={"gone": []})
    task = peer.connected(echo, access)
    peer.says.put_nowait({"type": "websocket.connect"})
    await peer.until(1)
    await access.disable_user(ADMIN, "bob")
    peer.says.put_nowait({"type": "websocket.receive", "text": "still here"})
    await peer.until(2)
    assert peer.heard[-1]["text"] == "still here"
    peer.says.put_nowait({"type": "websocket.disconnect", "code": 1000})
    await asyncio.wait_for(task, PATIENCE)
    assert peer.heard[-1]["type"] == "websocket.send", "a peer that left is not told to"


@pytest.mark.parametrize("length", [None, 1_000_000])
async def test_a_stream_stops_when_its_token_is_revoked(access: Access, token: str, length: int | None) -> None:
    more = asyncio.Event()

    async def chunks() -> object:
        yield b"first"
        await more.wait()
        while True:
            yield b"secret"
            await asyncio.sleep(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = {} if length is None else {"Content-Length": str(length)}
        await StreamingResponse(chunks(), headers=headers)(scope, receive, send)  # type: ignore[arg-type]

    peer = Peer("http", token, method="GET", http_version="1.1")
    task = peer.connected(app, access)
    peer.says.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    await peer.until(2)
    mine = (await access.api_tokens(ADMIN)).items[0].token
    await access.revoke_api_token(ADMIN, mine.id)
    await asyncio.sleep(0.1)
    more.set()
    await asyncio.wait_for(task, PATIENCE)
    assert b"secret" not in b"".join(message.get("body", b"") for message in peer.heard)
    ended = peer.heard[-1].get("more_body") is False
    assert ended is (length is None), "an answer that announced its length is not made to look whole"


async def test_a_failure_of_the_application_is_not_swallowed(access: Access, token: str) -> None:
    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise OSError("the disk is gone")

    peer = Peer("http", token, method="GET", http_version="1.1")
    task = peer.connected(broken, access)
    peer.says.put_nowait({"type": "http.request", "body": b"", "more_body": False})
    with pytest.raises(OSError, match="disk"):
        await asyncio.wait_for(task, PATIENCE)
