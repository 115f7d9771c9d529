"""What the REST API takes and answers about users and API tokens."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field

from glora_dashboard.bodies import Body
from glora_dashboard.models import Answer
from glora_server.coordinator.access_base import MAX_PASSWORD
from glora_server.coordinator.access_tokens import MAX_TOKEN_SECONDS, ApiTokenView
from glora_server.coordinator.people import Credential, Principal, Role, User

_Password = Annotated[str, Field(min_length=1, max_length=MAX_PASSWORD)]
_RoleName = Annotated[Role, Field(strict=False)]
_Seconds = Annotated[
    float | None, Field(ge=1, le=MAX_TOKEN_SECONDS, description="Seconds that it holds; null: no end.")
]
_TOKEN_SECONDS = 90 * 86400.0


class NewUser(Body):
    """A user to be made."""

    name: str = Field(min_length=1, max_length=64)
    role: _RoleName = Role.VIEWER
    password: _Password


class NewRole(Body):
    """A role to be given."""

    role: _RoleName


class NewPassword(Body):
    """A password to be set."""

    password: _Password


class PasswordChange(Body):
    """One's own password to be changed."""

    current: _Password
    password: _Password


class NewApiToken(Body):
    """An API token to be made."""

    name: str = Field(min_length=1, max_length=100, description="What it is for.")
    role: _RoleName = Field(default=Role.VIEWER, description="What it may do at most.")
    ttl_seconds: _Seconds = _TOKEN_SECONDS
    user: str | None = Field(default=None, max_length=64, description="Whose it is; left out: one's own.")


class SignIn(Body):
    """A user name and a password, for which the command line gets an API token."""

    username: str = Field(min_length=1, max_length=64)
    password: _Password
    token_name: str = Field(default="command line", min_length=1, max_length=100)
    role: _RoleName | None = Field(default=None, description="What the token may do at most; left out: as the user.")
    ttl_seconds: _Seconds = _TOKEN_SECONDS


class UserAnswer(Answer):
    """Somebody who can sign in."""

    id: str
    name: str
    role: Role
    disabled: bool
    created_at: float
    last_sign_in_at: float | None

    @classmethod
    def of(cls, user: User) -> Self:
        """The answer for a record."""
        return cls.model_validate(user)


class MeAnswer(Answer):
    """Who asks."""

    name: str
    role: Role
    credential: Credential

    @classmethod
    def of(cls, principal: Principal) -> Self:
        """The answer for a principal."""
        return cls.model_validate(principal)


class ApiTokenAnswer(Answer):
    """An API token; never its text."""

    id: str
    user: str
    name: str
    role: Role
    created_at: float
    expires_at: float | None
    used_at: float | None = Field(description="To the minute.")
    revoked: bool

    @classmethod
    def of(cls, view: ApiTokenView) -> Self:
        """The answer for a token and its user."""
        token = view.token
        return cls(
            id=token.id,
            user=view.user,
            name=token.name,
            role=token.role,
            created_at=token.created_at,
            expires_at=token.expires_at,
            used_at=token.used_at,
            revoked=token.revoked,
        )


class NewApiTokenAnswer(ApiTokenAnswer):
    """An API token that was made just now."""

    token: str = Field(description="Its text, shown this once.")
