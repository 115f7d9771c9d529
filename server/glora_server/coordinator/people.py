"""Who asks: roles, the people and programs that have one, and whom the audit names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What somebody may do; each role may do all that the ones before it may."""

    VIEWER = "viewer"
    """Sees everything but secrets, users and the audit."""
    OPERATOR = "operator"
    """Runs the federation: runs, devices, join tokens, exports; sees the audit."""
    ADMIN = "admin"
    """Says who may come in: users, roles, everybody's API tokens."""

    def includes(self, other: Role) -> bool:
        """Whether somebody with this role may do what `other` may."""
        order = tuple(Role)
        return order.index(self) >= order.index(other)


class Credential(StrEnum):
    """How somebody showed who they are."""

    SESSION = "session"
    """A browser's cookie after signing in."""
    API_TOKEN = "api_token"  # noqa: S105 - the name of a kind, not a secret
    """A bearer token that a user made."""
    ADMIN_TOKEN = "admin_token"  # noqa: S105
    """The bearer token in the server's data folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Somebody who was let in, for one request or one page."""

    name: str
    """The user's name; "admin.token" for the token of the data folder."""
    role: Role
    """What they may do with this credential: never more than the user's own role."""
    credential: Credential
    credential_id: str = ""
    """Id of the session or API token, so that it can be asked again whether it still holds."""
    origin: str = ""
    """Address that the request came from, for the audit."""
