"""Users, sessions and API tokens in the relational database, and how passwords are kept."""

from __future__ import annotations

from typing import Protocol

from glora_server.coordinator.model import Listing, Page
from glora_server.coordinator.people import ApiToken, ApiTokenId, Session, SessionId, User, UserId


class Users(Protocol):
    """People who can sign in."""

    def add(self, user: User) -> None:
        """Store a new user; raises NAME_TAKEN."""
        ...

    def get(self, user_id: UserId) -> User:
        """The user; raises USER_UNKNOWN."""
        ...

    def by_name(self, name: str) -> User:
        """The user of that name; raises USER_UNKNOWN."""
        ...

    def find(self, name: str) -> User | None:
        """The user of that name, where there is one."""
        ...

    def save(self, user: User) -> User:
        """Store a change; returns it with its new row version; raises STALE_STATE."""
        ...

    def signed_in(self, user_id: UserId, at: float) -> None:
        """Note when somebody signed in last, whatever the row version."""
        ...

    def remove(self, user_id: UserId) -> None:
        """Forget the user with all sessions and API tokens."""
        ...

    def list(self, page: Page) -> Listing[User]:
        """Users by name."""
        ...

    def admins(self) -> tuple[User, ...]:
        """Admins who are not disabled, by name; kept from other writers until the transaction ends."""
        ...

    def any(self) -> bool:
        """Whether there is a user at all."""
        ...


class Sessions(Protocol):
    """Browsers that somebody signed in with."""

    def add(self, session: Session) -> None:
        """Store a new session."""
        ...

    def find(self, session_id: SessionId) -> Session | None:
        """The session, where it was not ended."""
        ...

    def by_secret(self, secret_sha256: str) -> Session | None:
        """The session of that secret, where it was not ended."""
        ...

    def of_user(self, user_id: UserId, limit: int) -> tuple[Session, ...]:
        """The user's newest sessions that were not ended, newest first; at most `limit`."""
        ...

    def seen(self, session_id: SessionId, at: float) -> None:
        """Note that it was used."""
        ...

    def end(self, session_id: SessionId) -> None:
        """Forget it."""
        ...

    def end_of_user(self, user_id: UserId) -> int:
        """Forget all sessions of the user; how many there were."""
        ...

    def end_old(self, *, expired_at: float, seen_before: float) -> int:
        """Forget sessions that ended by `expired_at` or were not used since `seen_before`; how many there were."""
        ...


class ApiTokens(Protocol):
    """Bearer tokens of users."""

    def add(self, token: ApiToken) -> None:
        """Store a new token."""
        ...

    def get(self, token_id: ApiTokenId) -> ApiToken:
        """The token; raises API_TOKEN_UNKNOWN."""
        ...

    def find(self, token_id: ApiTokenId) -> ApiToken | None:
        """The token, where there is one."""
        ...

    def by_secret(self, secret_sha256: str) -> ApiToken | None:
        """The token of that text, where there is one."""
        ...

    def save(self, token: ApiToken) -> ApiToken:
        """Store a change; returns it with its new row version; raises STALE_STATE."""
        ...

    def used(self, token_id: ApiTokenId, at: float) -> None:
        """Note that it was used, whatever the row version."""
        ...

    def list(self, page: Page, user_id: UserId | None = None) -> Listing[ApiToken]:
        """Tokens of the user, or of everybody, newest first."""
        ...

    def live_of(self, user_id: UserId, now: float) -> int:
        """How many tokens of the user hold at `now`."""
        ...


class Passwords(Protocol):
    """Makes hashes of passwords and compares; slow on purpose, and never on the event loop."""

    async def hash(self, password: str) -> str:
        """A text from which the password cannot be found, but with which it can be compared."""
        ...

    async def matches(self, password_hash: str | None, password: str) -> bool:
        """Whether the password made the hash; with None (there is no such user) False after the same work."""
        ...

    def outdated(self, password_hash: str) -> bool:
        """Whether a new hash of the same password would be made with other parameters."""
        ...
