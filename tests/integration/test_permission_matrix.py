"""Every route of the application, asked by everybody: who may is let through, who may not is not."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import pytest
from access_cases import PASSWORD
from access_http import Site, site
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from glora_dashboard.gate import OPEN_PATHS
from glora_dashboard.permission import ANYBODY, RouteRole, least, route_roles
from glora_server.coordinator.people import Role

ROLES: Final = tuple(Role)
REFUSALS: Final = {401, 403}
EXPECTED: Final = {
    ("GET", "/api/v1/audit"): Role.OPERATOR,
    ("GET", "/api/v1/tokens"): Role.OPERATOR,
    ("GET", "/api/v1/users"): Role.ADMIN,
    ("GET", "/api/v1/runs"): Role.VIEWER,
    ("POST", "/api/v1/api-tokens"): Role.VIEWER,
    ("POST", "/api/v1/me/password"): Role.VIEWER,
    ("POST", "/api/v1/users/{name}/password"): Role.ADMIN,
    ("POST", "/api/v1/runs/{name}/export"): Role.OPERATOR,
    ("POST", "/api/v1/sign-in"): None,
}
"""Some that must not change by oversight; the others are checked against what they say themselves."""


class Asker(NamedTuple):
    """Somebody who asks."""

    name: str
    client: TestClient
    role: Role | None


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("matrix")) as web:
        yield web


@pytest.fixture(scope="module")
def askers(web: Site) -> Iterator[tuple[Asker, ...]]:
    with contextlib.ExitStack() as running:
        found = [Asker("nobody", web.browser(), None), *_programs(web)]
        yield tuple(asker._replace(client=running.enter_context(asker.client)) for asker in found)


def _programs(web: Site) -> Iterator[Asker]:
    root = web.program()
    for role in ROLES:
        user = {"name": f"the-{role}", "role": role, "password": PASSWORD}
        assert root.post("/api/v1/users", json=user).status_code == 201
        order = {"name": "matrix", "role": role, "user": user["name"]}
        made = root.post("/api/v1/api-tokens", json=order).json()
        yield Asker(role.value, web.program(made["token"]), role)
        made = root.post("/api/v1/api-tokens", json=order).json()
        assert root.post(f"/api/v1/api-tokens/{made['id']}/revoke").status_code == 200
        yield Asker(f"revoked {role}", web.program(made["token"]), None)


def asked(asker: Asker, method: str, path: str) -> int:
    """The status of the answer to an empty request for something that is not there: roles are asked before."""
    filled = re.sub(r"\{[^}]+\}", "nothing-of-this-name", path)
    # A query that is refused, once the role was asked for, where an answer would have no end.
    query = {"after": "x" * 65} if path.endswith("/events") else None
    return asker.client.request(
        method, filled, params=query, json={} if method in {"POST", "PATCH", "PUT"} else None
    ).status_code


def may(asker: Asker, route: RouteRole) -> bool:
    if asker.name == "nobody":
        return route.path in OPEN_PATHS
    if asker.role is None:
        return False
    return route.role is None or asker.role.includes(route.role)


def test_every_route_lets_in_who_may_and_nobody_else(web: Site, askers: tuple[Asker, ...]) -> None:
    routes = route_roles(web.app)
    wrong = [
        (route.method, route.path, asker.name, status)
        for route in routes
        if route.path != "/api/v1/sign-in"
        for asker in askers
        if ((status := asked(asker, route.method, route.path)) in REFUSALS) is may(asker, route)
        and not (route.path == "/login" and route.method == "POST")
    ]
    assert len(routes) >= 40
    assert wrong == []


def test_signing_in_is_open_and_refuses_by_itself(web: Site) -> None:
    browser = web.browser()
    assert browser.post("/api/v1/sign-in", json={}).status_code == 422
    assert browser.post("/login").status_code == 403, "not our form"


def test_nothing_that_only_the_gate_protects_is_open(web: Site, askers: tuple[Asker, ...]) -> None:
    """Routes that are not FastAPI's know no roles: they need somebody, and there are few of them."""
    others = [
        context for context in iter_route_contexts(web.app.routes) if not isinstance(context.original_route, APIRoute)
    ]
    assert [context.path for context in others] == ["/api/v1/openapi.json"]
    for asker in askers:
        status = asked(asker, "GET", "/api/v1/openapi.json")
        assert status == (200 if asker.role else 401)


def test_no_request_without_the_role_changed_anything(web: Site, askers: tuple[Asker, ...]) -> None:
    web.fake.refill()
    for route in route_roles(web.app):
        path = route.path.replace("{name}", "demo" if "/runs/" in route.path else "pi-1")
        for asker in askers:
            if not may(asker, route) and route.path not in {"/login", "/api/v1/sign-in"}:
                assert asked(asker, route.method, path) in REFUSALS
    assert web.fake.audit_log == []


@pytest.mark.parametrize(("route", "role"), EXPECTED.items(), ids=str)
def test_roles_are_those_that_were_decided(web: Site, route: tuple[str, str], role: Role | None) -> None:
    assert {(found.method, found.path): found.role for found in route_roles(web.app)}[route] is role


def test_whatever_changes_something_needs_more_than_a_viewer(web: Site) -> None:
    own = {"/api/v1/me/password", "/api/v1/api-tokens", "/api/v1/api-tokens/{token_id}/revoke"}
    for route in route_roles(web.app):
        if route.path.startswith("/api/") and route.method not in {"GET", "HEAD"} and route.path not in own:
            assert route.role in {Role.OPERATOR, Role.ADMIN} or route.path == "/api/v1/sign-in", route


def test_the_description_names_the_role_of_every_operation(web: Site) -> None:
    document = web.program().get("/api/v1/openapi.json").json()
    roles = {
        (method.upper(), path): operation["x-role"]
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    known = {(route.method, route.path): route.role or "anybody" for route in route_roles(web.app)}
    assert len(roles) >= 30
    assert roles == {key: known[key] for key in roles}


def test_a_route_that_names_no_role_is_refused() -> None:
    app = FastAPI()
    inner = APIRouter(prefix="/inner")

    @inner.get("/forgotten")
    async def forgotten() -> None: ...

    app.include_router(inner)
    with pytest.raises(RuntimeError, match="/inner/forgotten must name its least role"):
        route_roles(app)


def test_a_route_that_is_both_open_and_not_is_refused() -> None:
    app = FastAPI()

    @app.get("/both", dependencies=[ANYBODY, least(Role.ADMIN)])
    async def both() -> None: ...

    with pytest.raises(RuntimeError, match="/both"):
        route_roles(app)


def test_the_highest_role_that_is_named_counts() -> None:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/two", dependencies=[least(Role.VIEWER), least(Role.ADMIN)])
    async def two() -> None: ...

    assert [route.role for route in route_roles(app)] == [Role.ADMIN]
    assert not [route for route in app.routes if isinstance(route, Mount) or type(route) is Route]
