import asyncio
from collections.abc import Iterator

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from glora_server.telemetry.metrics import Metrics


def application() -> FastAPI:
    app, outer, inner, mounted = FastAPI(), APIRouter(prefix="/api/v1"), APIRouter(), FastAPI()

    @inner.get("/runs/{name}")
    async def show(name: str) -> str:
        return name

    @app.get("/broken")
    async def broken() -> str:
        raise RuntimeError("as if there were a mistake in it")

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()

    @mounted.get("/page/{number}")
    async def page(number: int) -> int:
        return number

    async def file(_: object) -> PlainTextResponse:
        return PlainTextResponse("x")

    outer.include_router(inner)
    app.include_router(outer)
    app.mount("/sub", mounted)
    app.router.routes.append(Mount("/static", app=PlainTextResponse("s")))
    app.router.routes.append(Mount("/old", routes=[Route("/{name}", file)]))
    return app


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def client(metrics: Metrics) -> Iterator[TestClient]:
    with TestClient(metrics.web(application()), raise_server_exceptions=False) as opened:
        yield opened


def requests(metrics: Metrics) -> dict[tuple[str, str, str], float]:
    return {
        (sample.labels["route"], sample.labels["method"], sample.labels["status"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "glora_http_requests_total"
    }


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [
        ("/api/v1/runs/secret-name", "/api/v1/runs/{name}", 200),
        ("/sub/page/7", "/sub/page/{number}", 200),
        ("/sub/page/seven", "/sub/page/{number}", 422),
        ("/static/deep/file.css", "/static/*", 200),
        ("/old/thing", "/old/{name}", 200),
        ("/broken", "/broken", 500),
        ("/nowhere/at/all", "unmatched", 404),
    ],
)
def test_a_request_is_counted_under_the_template_of_its_route(
    client: TestClient, metrics: Metrics, path: str, route: str, status: int
) -> None:
    assert client.get(path).status_code == status
    assert requests(metrics) == {(route, "GET", str(status)): 1}
    assert metrics.registry.get_sample_value("glora_http_seconds_count", {"route": route, "method": "GET"}) == 1


def test_what_callers_write_makes_no_series(client: TestClient, metrics: Metrics) -> None:
    for number in range(20):
        client.get(f"/guess-{number}")
        client.get(f"/api/v1/runs/run-{number}")
        client.request(f"BREW{number}", f"/guess-{number}")
    assert {key[:2] for key in requests(metrics)} == {
        ("unmatched", "GET"),
        ("unmatched", "other"),
        ("/api/v1/runs/{name}", "GET"),
    }


def test_a_websocket_is_counted_while_it_is_open(client: TestClient, metrics: Metrics) -> None:
    def open_now() -> float | None:
        return metrics.registry.get_sample_value("glora_browser_clients")

    with client.websocket_connect("/socket") as socket:
        assert open_now() == 1
        socket.send_text("bye")
    assert open_now() == 0


async def test_a_request_that_is_cancelled_before_its_answer_is_not_counted(metrics: Metrics) -> None:
    async def for_ever(scope: object, receive: object, send: object) -> None:
        await asyncio.sleep(60)

    app = metrics.web(for_ever)

    async def receive() -> dict[str, object]:
        return {}

    async def send(message: object) -> None:
        raise AssertionError(f"nothing was answered, and yet {message} was sent")

    scope: dict[str, object] = {"type": "http", "method": "GET", "path": "/"}
    task: asyncio.Future[None] = asyncio.ensure_future(app(scope, receive, send))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert requests(metrics) == {}
