"""The REST API keeps what its description promises: schemathesis asks every operation of a real server's application.

The server is a whole one, with a small history that never was; what it answers comes from its database and services.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from synthetic_history import Crowd, fill

from glora_server.config import Settings, prepare_data_dir
from glora_server.main import Server

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ENDLESS = "/api/v1/events"
"""Its answer has no end; tests/integration/test_rest_conditions.py reads it."""


class Serving:
    """A server in a thread with a loop of its own."""

    def __init__(self, folder: Path) -> None:
        self.url = ""
        self.token = ""
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self) -> Serving:
        self._thread.start()
        assert self._ready.wait(60), "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        self._loop.close()

    async def _serve(self) -> None:
        overrides: dict[str, object] = {
            "http.port": 0,
            "grpc.port": 0,
            "enrolment.port": 0,
            "http.admin_password": "schema-but-long-enough",
        }
        made = Settings.load(data_dir=self._folder, env={}, overrides=overrides)
        async with Server(made) as server:
            crowd = await Crowd.of(server.services.hub, server.services.store)
            crowd.tick()
            self.url = f"http://127.0.0.1:{server.http_port}"
            self.token = (self._folder / "admin.token").read_text().strip()
            self._ready.set()
            await self._stop.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = prepare_data_dir(tmp_path_factory.mktemp("schema") / "data")
    fill(folder, devices=30, rounds=6, per_round=10, live=20)
    with Serving(folder) as serving:
        yield serving


@pytest.fixture(scope="module")
def api(server: Serving) -> Any:
    found = schemathesis.openapi.from_url(
        f"{server.url}/api/v1/openapi.json", headers={"Authorization": f"Bearer {server.token}"}
    )
    return found.exclude(path=ENDLESS).exclude(path_regex="/(users|me|api-tokens|sign-in|sign-out)")


def test_every_operation_answers_as_described(api: Any, server: Serving) -> None:
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) >= 35
    wrong = [
        (f"{operation.label} ({mode.value})", text)
        for operation in operations
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if (text := _what_is_wrong(operation, mode, server))
    ]
    assert not wrong, "\n\n".join(f"{label}\n{text}" for label, text in wrong)


def _what_is_wrong(operation: Any, mode: GenerationMode, server: Serving) -> str:
    """The first broken promise of an operation; empty when all of the examples went well."""

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        _aim(case)
        case.call_and_validate(headers={"Authorization": f"Bearer {server.token}"}, checks=CHECKS, timeout=20)

    try:
        check()
    except (Failure, FailureGroup) as broken:
        return "".join(traceback.format_exception_only(broken))
    except Unsatisfiable:  # an operation without any input cannot be asked wrongly
        assert mode is GenerationMode.NEGATIVE
    return ""


def _aim(case: Any) -> None:
    """Half of the examples ask for things that are there; nobody waits for a change that does not come."""
    parameters = case.path_parameters or {}
    if len(repr(parameters)) % 2 and "name" in parameters:
        parameters["name"] = "news-topics" if "/runs/" in case.path else "pi-0004"
    if case.query and "timeout" in case.query:
        case.query["timeout"] = 0
