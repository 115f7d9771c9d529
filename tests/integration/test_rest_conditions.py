"""What programs rely on: ETags, If-Match, Idempotency-Key, and the stream of events."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from access_http import Site, site
from fake_answers import MemoryAnswers
from fake_server import ADMIN_TOKEN, FakeServer
from fastapi import FastAPI
from people_cases import principal
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from glora_dashboard.event_routes import event_routes
from glora_dashboard.idempotency import Idempotency
from glora_dashboard.problems import add_problem_handlers
from glora_server.coordinator.feed import Batch, ChangeKind, Feed
from glora_server.coordinator.model import DeviceState
from glora_server.coordinator.people import Role

RANK = "/api/v1/devices/pi-1/rank"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("conditions")) as web:
        yield web


@pytest.fixture
def web(shared: Site) -> Site:
    shared.reset()
    return shared


@pytest.fixture
def client(web: Site) -> TestClient:
    return web.program()


def test_what_was_read_before_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/api/v1/devices")
    tag = first.headers["etag"]
    assert (tag[0], tag[-1]) == ('"', '"')
    for given in (tag, f'"other", {tag}', "*"):
        again = client.get("/api/v1/devices", headers={"If-None-Match": given})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert "content-length" not in again.headers
    assert client.get("/api/v1/devices", headers={"If-None-Match": '"other"'}).content == first.content


def test_an_etag_changes_with_the_answer(client: TestClient) -> None:
    before = client.get("/api/v1/devices/pi-1").headers["etag"]
    assert client.get("/api/v1/devices/pi-1").headers["etag"] == before
    assert client.post("/api/v1/devices/pi-1/suspend").status_code == 200
    after = client.get("/api/v1/devices/pi-1", headers={"If-None-Match": before})
    assert after.status_code == 200
    assert after.headers["etag"] != before


def test_refusals_carry_no_etag(client: TestClient) -> None:
    assert "etag" not in client.get("/api/v1/devices/nobody").headers


async def test_the_audit_s_file_is_never_held_whole(web: Site) -> None:
    parts: list[Message] = []

    async def send(message: Message) -> None:
        parts.append(message)

    request = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        for message in request:
            return message
        return await asyncio.Future()

    headers = [(b"authorization", f"Bearer {ADMIN_TOKEN}".encode())]
    path = {"type": "http", "method": "GET", "path": "/api/v1/audit/export", "query_string": b"", "headers": headers}
    await web.app(path, receive, send)
    start, *bodies = parts
    assert start["status"] == 200
    assert b"etag" not in dict(start["headers"])
    assert [part["more_body"] for part in bodies] == [True] * (len(bodies) - 1) + [False]
    assert len(bodies) > 1
    described = web.app.openapi()["paths"]
    assert "304" not in described["/api/v1/audit/export"]["get"]["responses"]
    assert "304" in described["/api/v1/audit"]["get"]["responses"]


def test_a_change_that_is_based_on_old_news_is_refused(client: TestClient, web: Site) -> None:
    seen = client.get("/api/v1/devices/pi-1").json()["row_version"]
    good = client.post(RANK, json={"rank": 4}, headers={"If-Match": f'"rev-{seen}"'})
    assert (good.status_code, good.json()["row_version"]) == (200, seen + 1)
    late = client.post(RANK, json={"rank": 2}, headers={"If-Match": f'"rev-{seen}"'})
    assert (late.status_code, late.json()["reason"]) == (412, "STALE_STATE")
    assert "look at it again" in late.json()["detail"]
    assert late.json()["type"] == "urn:glora:problem:STALE_STATE"
    assert web.fake.device_records["pi-1"].granted_rank == 4
    assert client.post(RANK, json={"rank": 2}, headers={"If-Match": "*"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "devices/pi-1/approve", None),
        ("POST", "devices/pi-1/suspend", None),
        ("POST", "devices/pi-1/revoke", None),
        ("POST", "runs/demo/pause", None),
        ("POST", "runs/demo/abort", {"reason": "x"}),
        ("POST", "runs/demo/extend", {"seconds": 60}),
        ("PATCH", "runs/demo/policy", {"changes": {"quorum": 2}}),
    ],
)
def test_every_change_of_runs_and_devices_can_be_conditional(
    client: TestClient, web: Site, method: str, path: str, body: dict[str, object] | None
) -> None:
    answer = client.request(method, f"/api/v1/{path}", json=body, headers={"If-Match": '"rev-99"'})
    assert answer.status_code == 412
    assert web.fake.audit_log == []
    fine = client.request(method, f"/api/v1/{path}", json=body, headers={"If-Match": '"rev-0"'})
    assert fine.status_code == 200


@pytest.mark.parametrize("given", ["3", "rev-3", '"3"', '"rev--1"', 'W/"rev-3"', '"rev-99999999999999999999"'])
def test_an_if_match_that_is_none_is_refused(client: TestClient, given: str) -> None:
    answer = client.post(RANK, json={"rank": 4}, headers={"If-Match": given})
    assert (answer.status_code, answer.json()["reason"]) == (400, "REQUEST_INVALID")


def test_a_repeated_post_happens_once(client: TestClient, web: Site) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    order = {"description": "lab", "uses": 3}
    first = client.post("/api/v1/tokens", json=order, headers=key)
    again = client.post("/api/v1/tokens", json=order, headers=key)
    assert first.status_code == again.status_code == 201
    assert again.json() == first.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(web.fake.token_records) == 1


def test_a_key_is_good_for_one_request(client: TestClient, web: Site) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    client.post("/api/v1/tokens", json={"uses": 3}, headers=key)
    other = client.post("/api/v1/tokens", json={"uses": 4}, headers=key)
    assert other.status_code == 422
    assert "another request" in other.json()["detail"]
    elsewhere = client.post("/api/v1/runs/demo/pause", headers=key)
    assert elsewhere.status_code == 422
    assert len(web.fake.audit_log) == 1


def test_a_key_belongs_to_who_used_it(client: TestClient, web: Site) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    secret = client.post("/api/v1/api-tokens", json={"name": "other", "role": "operator", "user": "olga"}).json()
    mine = client.post("/api/v1/tokens", json={}, headers=key).json()
    other = web.program(secret["token"]).post("/api/v1/tokens", json={}, headers=key)
    assert other.status_code == 201
    assert other.json()["id"] != mine["id"]


def test_a_refused_request_can_be_tried_again_with_its_key(client: TestClient) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    assert client.post("/api/v1/runs/demo/resume", headers=key).status_code == 409
    assert client.post("/api/v1/runs/demo/pause").status_code == 200
    assert client.post("/api/v1/runs/demo/resume", headers=key).status_code == 200


async def test_repetitions_never_overlap_even_when_the_first_fails() -> None:
    going_on, most, gates = 0, 0, [asyncio.Event() for _ in range(3)]
    arrived = iter(gates)

    async def failing(_scope: Scope, _receive: Receive, send: Send) -> None:
        nonlocal going_on, most
        going_on += 1
        most = max(most, going_on)
        await next(arrived).wait()
        going_on -= 1
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    once = Idempotency(failing, answers=MemoryAnswers())
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/v1/tokens",
        "headers": [(b"idempotency-key", b"12345678")],
        "state": {"principal": principal("ada")},
    }

    async def ask() -> None:
        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            """Take it."""

        await once(dict(scope), receive, send)

    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as asking:
        for gate in gates:  # the second waits for the first, and the third comes while the second is served
            asking.create_task(ask())
            if gate is gates[1]:
                await settle()
                gates[0].set()
            await settle()
        gates[1].set()
        gates[2].set()
    assert most == 1


@pytest.mark.parametrize("key", ["short", "x" * 129, "with space in it"])
def test_a_key_that_is_none_is_refused(client: TestClient, web: Site, key: str) -> None:
    answer = client.post("/api/v1/tokens", json={}, headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    assert web.fake.token_records == {}


def test_what_is_kept_cannot_be_read_without_the_key(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []

    async def keep(_self: MemoryAnswers, *what: object) -> None:
        kept.extend(what)

    monkeypatch.setattr(MemoryAnswers, "keep", keep)
    key = str(uuid.uuid4())
    made = client.post("/api/v1/tokens", json={}, headers={"Idempotency-Key": key}).json()
    assert len(kept) == 4
    assert made["join_token"] not in repr(kept)
    assert made["id"] not in repr(kept)
    assert key not in repr(kept)


def test_events_are_told_as_they_happen() -> None:
    feed = Feed()

    async def listen() -> list[tuple[str, str]]:
        found = []
        async for batch in feed.follow(heartbeat=60.0, least=0.0):
            found += [(change.kind.value, change.id) for change in batch.changes]
            if len(found) >= 2:
                return found
        raise AssertionError("a feed has no end")

    async def both() -> list[tuple[str, str]]:
        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)
        feed.note(ChangeKind.RUN, "r")
        await asyncio.sleep(0)
        feed.note(ChangeKind.DEVICE, "d")
        return await asyncio.wait_for(listening, 60.0)

    assert asyncio.run(both()) == [("run", "r"), ("device", "d")]


def test_a_slow_reader_gets_the_newest_of_each_thing() -> None:
    feed = Feed()
    place = feed.place
    for _ in range(50):
        feed.note(ChangeKind.RUN, "r")
        feed.note(ChangeKind.ROUND, "q", run_id="r", number=3)
    changes = feed.since(place)
    assert [(change.kind, change.id, change.number) for change in changes] == [
        (ChangeKind.RUN, "r", None),
        (ChangeKind.ROUND, "q", 3),
    ]
    assert feed.since(feed.place) == ()


@pytest.mark.parametrize("place", ["", "nonsense", "00000000-0", "{epoch}-99", "{epoch}-x", "{epoch}--1"])
def test_a_place_that_is_not_covered_is_reset(place: str) -> None:
    feed = Feed()
    feed.note(ChangeKind.RUN, "r")
    epoch = feed.place.partition("-")[0]
    (change,) = feed.since(place.format(epoch=epoch))
    assert change.kind is ChangeKind.RESET


def test_what_was_forgotten_is_reset() -> None:
    feed = Feed(remembered=2)
    place = feed.place
    for name in "abc":
        feed.note(ChangeKind.DEVICE, name)
    assert [change.kind for change in feed.since(place)] == [ChangeKind.RESET]


def test_the_stream_is_made_of_server_sent_events(client: TestClient, web: Site) -> None:
    place = web.fake.feed.place
    client.post("/api/v1/runs/demo/pause")
    answer = client.get("/api/v1/events", headers={"Last-Event-ID": place})
    assert answer.headers["content-type"].startswith("text/event-stream")
    retry, event, rest = answer.text.split("\n\n")
    assert (retry, rest) == ("retry: 2000", "")
    fields = dict(line.split(": ", 1) for line in event.split("\n"))
    assert fields["event"] == "run"
    assert json.loads(fields["data"])["id"] == "demo"
    assert client.get("/api/v1/events", params={"after": fields["id"]}).text == "retry: 2000\n\n: still here\n\n"
    assert "event: reset" in client.get("/api/v1/events", headers={"Last-Event-ID": "gone-7"}).text


class EndlessEvents(FakeServer):
    async def events(self, after: str = "", *, heartbeat: float = 15.0) -> AsyncIterator[Batch]:
        async for batch in self.feed.follow(after, heartbeat=heartbeat):
            yield batch


async def test_only_so_many_may_listen_and_who_goes_at_once_leaves_the_place() -> None:
    app = FastAPI()
    add_problem_handlers(app)
    app.include_router(event_routes(EndlessEvents(), most=1))
    path = {"type": "http", "method": "GET", "path": "/events", "query_string": b"", "headers": []}
    started: asyncio.Queue[int] = asyncio.Queue()

    async def listen(until: asyncio.Event) -> None:
        async def receive() -> Message:
            await until.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await asyncio.sleep(0)  # a socket that takes no more for now
            if message["type"] == "http.response.start":
                started.put_nowait(message["status"])

        await app({**path, "state": {"principal": principal("vera", Role.VIEWER)}}, receive, send)

    now, later = asyncio.Event(), asyncio.Event()
    now.set()
    await listen(now)
    listening = asyncio.create_task(listen(later))
    assert await asyncio.wait_for(started.get(), 60.0) == 200
    await listen(later)
    assert started.get_nowait() == 429
    later.set()
    await listening
    await asyncio.wait_for(listen(now), 60.0)
    assert started.empty(), "gone before the first byte"
    again = asyncio.create_task(listen(asyncio.Event()))
    assert await asyncio.wait_for(started.get(), 60.0) == 200
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)


def test_devices_can_be_filtered(client: TestClient) -> None:
    pending = client.get("/api/v1/devices", params={"state": DeviceState.PENDING.value}).json()
    assert [item["name"] for item in pending["items"]] == ["pi-3"]
    wrong = client.get("/api/v1/devices", params={"state": "asleep"})
    assert wrong.status_code == 422
