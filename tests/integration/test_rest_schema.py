"""The REST API keeps what its description promises: schemathesis asks every operation of a real server.

The server is a whole one, with a small history that never was; what it answers comes from its database and services.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from federation import Federation
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
from synthetic_history import fill

from glora_server.config import prepare_data_dir
from glora_server.security.admin_token import read_admin_token

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ENDLESS = "/api/v1/events"
"""Its answer has no end; tests/integration/test_rest_conditions.py reads it."""


CALM = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example]
"""A server that answers slowly, or an example that is hard to make, is no broken promise."""
PEOPLE = "/(users|me|api-tokens|sign-in)"
PEOPLE_THERE = ("ada", "bob")


@dataclass(frozen=True, slots=True)
class Serving:
    """Where a server answers, and what lets one in."""

    url: str
    headers: dict[str, str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    """A server of the test's own: what is asked about people takes away their passwords and roles."""
    with Federation(tmp_path) as federation:
        fill(prepare_data_dir(federation.data_dir), devices=30, rounds=6, per_round=10, live=20)
        federation.start_server()
        token = read_admin_token(federation.data_dir)
        yield Serving(federation.url, {"Authorization": f"Bearer {token}"})


def test_every_operation_on_runs_and_devices_answers_as_described(server: Serving) -> None:
    operations = described(server).exclude(path=ENDLESS).exclude(path_regex=PEOPLE)
    wrong = broken_promises(operations, server, at_least=35)
    assert not wrong, wrong


def test_every_operation_on_people_and_their_tokens_answers_as_described(server: Serving) -> None:
    """Asked with the data folder's admin.token, which no operation can take away."""
    with httpx2.Client(base_url=server.url, headers=server.headers) as client:
        for name in PEOPLE_THERE:
            body = {"name": name, "role": "operator", "password": "schema-but-long-enough"}
            assert client.post("/api/v1/users", json=body).status_code == 201
        wrong = broken_promises(described(server).include(path_regex=PEOPLE), server, at_least=13)
        assert not wrong, wrong
        assert client.get("/api/v1/me").json()["role"] == "admin"


def described(server: Serving) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/api/v1/openapi.json", headers=server.headers)


def broken_promises(api: Any, server: Serving, *, at_least: int) -> str:
    """What operations answered otherwise than described, as a text; empty when they kept their promises."""
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) >= at_least, [operation.label for operation in operations]
    wrong = [
        (f"{operation.label} ({mode.value})", text)
        for operation in operations
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if (text := _what_is_wrong(operation, mode, server))
    ]
    return "\n\n".join(f"{label}\n{text}" for label, text in wrong)


def _what_is_wrong(operation: Any, mode: GenerationMode, server: Serving) -> str:
    """The first broken promise of an operation; empty when all of the examples went well."""

    @settings(max_examples=6, deadline=None, suppress_health_check=CALM, database=None, derandomize=True)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        _aim(case)
        case.call_and_validate(headers=server.headers, checks=CHECKS, timeout=60)

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
        parameters["name"] = _known_name(case.path)
    if case.query and "timeout" in case.query:
        case.query["timeout"] = 0


def _known_name(path: str) -> str:
    if "/users/" in path:
        return PEOPLE_THERE[0]
    return "news-topics" if "/runs/" in path else "pi-0004"
