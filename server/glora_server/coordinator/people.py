"""Who asks: roles, the people and programs that have one, and whom the audit names."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NewType

UserId = NewType("UserId", str)
SessionId = NewType("SessionId", str)
ApiTokenId = NewType("ApiTokenId", str)

ADMIN_TOKEN_NAME: Final = "admin.token"  # noqa: S105 - a name, not a secret
"""Whom the audit names when the token of the data folder was used; no user may have this name."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Somebody who can sign in."""

    id: UserId
    name: str
    role: Role
    password_hash: str = field(repr=False)
    """What the port Passwords made of the password."""
    disabled: bool = False
    created_at: float
    last_sign_in_at: float | None = None
    row_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A browser that somebody signed in with; its secret is only in the browser's cookie."""

    id: SessionId
    user_id: UserId
    secret_sha256: str = field(repr=False)
    created_at: float
    expires_at: float
    """When it ends however much it is used."""
    seen_at: float
    """When it was used last, to the minute; a session that is not used ends too."""
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiToken:
    """A bearer token of a user; its text is shown once and then only its hash is known."""

    id: ApiTokenId
    user_id: UserId
    name: str
    """What it is for."""
    role: Role
    """What it may do at most; never more than its user may at that moment."""
    secret_sha256: str = field(repr=False)
    created_at: float
    expires_at: float | None
    used_at: float | None = None
    """When it was used last, to the minute."""
    revoked: bool = False
    row_version: int = 0
