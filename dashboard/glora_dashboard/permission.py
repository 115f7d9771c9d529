"""Which role a route asks for at least, and what is said to those who have a lower one.

Every route names its least role with `least` (or one of the `Annotated` types below, where it needs to know who asks),
or says with `ANYBODY` that it is open on purpose. `route_roles` refuses an application in which one says neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, RouteContext, iter_route_contexts
from starlette.types import Scope

from glora_server.coordinator.errors import require_role
from glora_server.coordinator.people import Principal, Role
from glora_wire.errors import GloraError, Reason


def principal_of(scope: Scope) -> Principal | None:
    """Who was let in with this request or websocket; None where it is open to anybody and nobody said who they are."""
    found = scope.get("state", {}).get("principal")
    return found if isinstance(found, Principal) else None


def require(principal: Principal | None, role: Role) -> Principal:
    """The principal, when their role includes `role`; raises SIGN_IN_NEEDED or ROLE_TOO_LOW."""
    if principal is None:
        raise GloraError(Reason.SIGN_IN_NEEDED, "This needs somebody who has signed in, or a token.")
    return require_role(principal, role)


class _Least:
    """A dependency that lets in who has the role, and says who it is."""

    def __init__(self, role: Role) -> None:
        self.role = role

    async def __call__(self, request: Request) -> Principal:
        return require(principal_of(request.scope), self.role)


class _Anybody:
    """A dependency that lets everybody in."""

    async def __call__(self) -> None:
        return None


def least(role: Role) -> Any:
    """A dependency of a route: who asks must have `role` or a higher one; its value is the principal."""
    return Depends(_Least(role))


ANYBODY: Final = Depends(_Anybody())
"""A dependency of a route that is open to everybody, on purpose."""

Viewer = Annotated[Principal, least(Role.VIEWER)]
"""Who asks: a viewer or above."""
Operator = Annotated[Principal, least(Role.OPERATOR)]
"""Who asks: an operator or above."""
Admin = Annotated[Principal, least(Role.ADMIN)]
"""Who asks: an admin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRole:
    """One method of one route with the role that it asks for (None: open to anybody)."""

    method: str
    path: str
    role: Role | None


def route_roles(app: FastAPI) -> tuple[RouteRole, ...]:
    """Every route that was declared with its method and least role; raises RuntimeError for one that names none."""
    return tuple(_route_roles(app))


def _route_roles(app: FastAPI) -> Iterator[RouteRole]:
    for context in iter_route_contexts(app.routes):
        if not isinstance(context.original_route, APIRoute):
            continue
        role = _role_of(context)
        for method in sorted(context.methods or ()):
            yield RouteRole(method=method, path=context.path or "", role=role)


def _role_of(context: RouteContext) -> Role | None:
    calls = list(_calls(context.dependant))
    roles = [call.role for call in calls if isinstance(call, _Least)]
    is_open = any(isinstance(call, _Anybody) for call in calls)
    if bool(roles) == is_open:
        raise RuntimeError(f"{context.path} must name its least role (permission.least) or be open (ANYBODY), not both")
    return max(roles, key=list(Role).index, default=None)


def _calls(dependant: Dependant) -> Iterator[Callable[..., Any] | None]:
    for inner in dependant.dependencies:
        yield inner.call
        yield from _calls(inner)


class RoleApi(FastAPI):
    """An application whose description says with every operation which role it needs (`x-role`)."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        document = super().openapi()
        for route in route_roles(self):
            operation = document["paths"].get(route.path, {}).get(route.method.lower())
            if operation is not None:
                operation["x-role"] = route.role or "anybody"
        return document
