"""The web surface over a fake server, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fake_server import ADMIN_TOKEN, FakeServer

from glora_dashboard.api import create_app


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    fake: FakeServer


@contextlib.contextmanager
def serving(fake: FakeServer, work_dir: Path) -> Iterator[Running]:
    """Serve `fake` while the context is open."""
    app = create_app(
        fake,
        fake,
        admin_token_check=lambda token: token == ADMIN_TOKEN,
        health=fake,
        metrics_text=lambda: (b"", "text/plain"),
        metrics_open=True,
        work_dir=work_dir,
    )
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(),))
    thread.start()
    try:
        _await_start(server)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(url=f"http://127.0.0.1:{port}", fake=fake)
    finally:
        server.should_exit = True
        thread.join(10)
        loop.close()


def _await_start(server: uvicorn.Server) -> None:
    deadline = time.monotonic() + 10
    while not server.started:
        if time.monotonic() > deadline:
            raise TimeoutError("uvicorn did not start")
        time.sleep(0.005)
