"""Users, sessions and API tokens."""

from __future__ import annotations

from sqlalchemy import delete, func, or_, select, update

from glora_server.coordinator.errors import api_token_unknown
from glora_server.coordinator.model import Listing, Page
from glora_server.coordinator.people import ApiToken, ApiTokenId, Role, User, UserId
from glora_server.coordinator.people import Session as SessionRecord
from glora_server.coordinator.people import SessionId as SessionKey
from glora_server.storage.people_models import ApiTokenRow, SessionRow, UserRow
from glora_server.storage.repositories.rows import (
    Order,
    Session,
    add_row,
    add_unless_there,
    built,
    columns_of,
    page_of,
    save_row,
    values_of,
)
from glora_wire.errors import GloraError, Reason


class UserRepository:
    """People who can sign in."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, user: User) -> None:
        """Store a new user; raises NAME_TAKEN."""
        if not add_unless_there(self._session, UserRow, values_of(user)):
            raise GloraError(
                Reason.NAME_TAKEN, f"There is a user {user.name!r} already; choose another name.", name=user.name
            )

    def get(self, user_id: UserId) -> User:
        """The user; raises USER_UNKNOWN."""
        row = self._session.first(columns_of(UserRow).where(UserRow.id == user_id), lock=True)
        if row is None:
            raise _user_unknown(user_id)
        return built(User, row)

    def by_name(self, name: str) -> User:
        """The user of that name; raises USER_UNKNOWN."""
        found = self.find(name)
        if found is None:
            raise _user_unknown(name)
        return found

    def find(self, name: str) -> User | None:
        """The user of that name, where there is one."""
        row = self._session.first(columns_of(UserRow).where(UserRow.name == name), lock=True)
        return None if row is None else built(User, row)

    def save(self, user: User) -> User:
        """Store a change; returns it with its new row version; raises STALE_STATE."""
        return save_row(self._session, UserRow, user, what=f"The user {user.name!r}")

    def signed_in(self, user_id: UserId, at: float) -> None:
        """Note when somebody signed in last, whatever the row version."""
        self._session.connection.execute(update(UserRow).where(UserRow.id == user_id).values(last_sign_in_at=at))

    def remove(self, user_id: UserId) -> None:
        """Forget the user with all sessions and API tokens."""
        self._session.connection.execute(delete(SessionRow).where(SessionRow.user_id == user_id))
        self._session.connection.execute(delete(ApiTokenRow).where(ApiTokenRow.user_id == user_id))
        self._session.connection.execute(delete(UserRow).where(UserRow.id == user_id))

    def list(self, page: Page) -> Listing[User]:
        """Users by name."""
        order = Order((UserRow.name,), (str,), descending=False)
        return page_of(self._session, columns_of(UserRow), order, page, lambda row: built(User, row))

    def admins(self) -> tuple[User, ...]:
        """Admins who are not disabled, by name; kept from other writers until the transaction ends."""
        statement = columns_of(UserRow).where(UserRow.role == Role.ADMIN, UserRow.disabled.is_(False))
        if self._session.locks:
            # In one order, so that two who each take away another admin wait and see what the first one did.
            statement = statement.with_for_update(key_share=True)
        return tuple(built(User, row) for row in self._session.rows(statement.order_by(UserRow.name)))

    def any(self) -> bool:
        """Whether there is a user at all."""
        return self._session.first(select(UserRow.id).limit(1)) is not None


class SessionRepository:
    """Browsers that somebody signed in with."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, session: SessionRecord) -> None:
        """Store a new session."""
        add_row(self._session, SessionRow, values_of(session))

    def find(self, session_id: SessionKey) -> SessionRecord | None:
        """The session, where it was not ended."""
        row = self._session.first(columns_of(SessionRow).where(SessionRow.id == session_id))
        return None if row is None else built(SessionRecord, row)

    def by_secret(self, secret_sha256: str) -> SessionRecord | None:
        """The session of that secret, where it was not ended."""
        row = self._session.first(columns_of(SessionRow).where(SessionRow.secret_sha256 == secret_sha256))
        return None if row is None else built(SessionRecord, row)

    def of_user(self, user_id: UserId, limit: int) -> tuple[SessionRecord, ...]:
        """The user's newest sessions that were not ended, newest first; at most `limit`."""
        statement = columns_of(SessionRow).where(SessionRow.user_id == user_id)
        newest = statement.order_by(SessionRow.created_at.desc(), SessionRow.id).limit(limit)
        return tuple(built(SessionRecord, row) for row in self._session.rows(newest))

    def seen(self, session_id: SessionKey, at: float) -> None:
        """Note that it was used."""
        self._session.connection.execute(update(SessionRow).where(SessionRow.id == session_id).values(seen_at=at))

    def end(self, session_id: SessionKey) -> None:
        """Forget it."""
        self._session.connection.execute(delete(SessionRow).where(SessionRow.id == session_id))

    def end_of_user(self, user_id: UserId) -> int:
        """Forget all sessions of the user; how many there were."""
        return self._session.connection.execute(delete(SessionRow).where(SessionRow.user_id == user_id)).rowcount

    def end_old(self, *, expired_at: float, seen_before: float) -> int:
        """Forget sessions that ended by `expired_at` or were not used since `seen_before`; how many there were."""
        old = or_(SessionRow.expires_at <= expired_at, SessionRow.seen_at <= seen_before)
        return self._session.connection.execute(delete(SessionRow).where(old)).rowcount


class ApiTokenRepository:
    """Bearer tokens of users."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, token: ApiToken) -> None:
        """Store a new token."""
        add_row(self._session, ApiTokenRow, values_of(token))

    def get(self, token_id: ApiTokenId) -> ApiToken:
        """The token; raises API_TOKEN_UNKNOWN."""
        row = self._session.first(columns_of(ApiTokenRow).where(ApiTokenRow.id == token_id), lock=True)
        if row is None:
            raise api_token_unknown(token_id)
        return built(ApiToken, row)

    def find(self, token_id: ApiTokenId) -> ApiToken | None:
        """The token, where there is one."""
        row = self._session.first(columns_of(ApiTokenRow).where(ApiTokenRow.id == token_id))
        return None if row is None else built(ApiToken, row)

    def by_secret(self, secret_sha256: str) -> ApiToken | None:
        """The token of that text, where there is one."""
        row = self._session.first(columns_of(ApiTokenRow).where(ApiTokenRow.secret_sha256 == secret_sha256))
        return None if row is None else built(ApiToken, row)

    def save(self, token: ApiToken) -> ApiToken:
        """Store a change; returns it with its new row version; raises STALE_STATE."""
        return save_row(self._session, ApiTokenRow, token, what=f"The API token {token.id}")

    def used(self, token_id: ApiTokenId, at: float) -> None:
        """Note that it was used, whatever the row version."""
        self._session.connection.execute(update(ApiTokenRow).where(ApiTokenRow.id == token_id).values(used_at=at))

    def list(self, page: Page, user_id: UserId | None = None) -> Listing[ApiToken]:
        """Tokens of the user, or of everybody, newest first."""
        statement = columns_of(ApiTokenRow)
        if user_id is not None:
            statement = statement.where(ApiTokenRow.user_id == user_id)
        order = Order((ApiTokenRow.created_at, ApiTokenRow.id), (float, str), descending=True)
        return page_of(self._session, statement, order, page, lambda row: built(ApiToken, row))

    def live_of(self, user_id: UserId, now: float) -> int:
        """How many tokens of the user hold at `now`."""
        statement = select(func.count(ApiTokenRow.id)).where(
            ApiTokenRow.user_id == user_id,
            ApiTokenRow.revoked.is_(False),
            or_(ApiTokenRow.expires_at.is_(None), ApiTokenRow.expires_at > now),
        )
        return int(self._session.connection.execute(statement).scalar_one())


def _user_unknown(name: str) -> GloraError:
    return GloraError(Reason.USER_UNKNOWN, f"There is no user {name!r}; see `glora user list`.", user=name)
