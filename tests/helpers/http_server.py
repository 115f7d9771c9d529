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
from access_cases import memory_access
from fake_answers import MemoryAnswers
from fake_server import ADMIN_TOKEN, FakeServer

from glora_dashboard.api import create_app
from glora_dashboard.gate import GateRules
from glora_server.coordinator.access import Access


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    fake: FakeServer
    access: Access


@contextlib.contextmanager
def serving(fake: FakeServer, work_dir: Path) -> Iterator[Running]:
    """Serve `fake` while the context is open."""
    with memory_access(ADMIN_TOKEN) as access:
        yield from _serving(fake, access, work_dir)


def _serving(fake: FakeServer, access: Access, work_dir: Path) -> Iterator[Running]:
    app = create_app(
        fake,
        fake,
        access=access,
        rules=GateRules(metrics_open=True),
        health=fake,
        metrics_text=lambda: (b"", "text/plain"),
        answers=MemoryAnswers(),
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
        yield Running(url=f"http://127.0.0.1:{port}", fake=fake, access=access)
    finally:
        server.should_exit = True
        thread.join(60)
        loop.close()


def _await_start(server: uvicorn.Server) -> None:
    deadline = time.monotonic() + 60
    while not server.started:
        if time.monotonic() > deadline:
            raise TimeoutError("uvicorn did not start")
        time.sleep(0.005)
