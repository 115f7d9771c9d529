"""Who comes in: signing in and out, sessions, bearer tokens, and whether somebody still may.

Nothing here is kept in memory but the counting of tries: every request asks the database, so that a session that was
ended, a token that was revoked or a role that was taken away counts at once, in every process.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from glora_server.coordinator.access_base import MAX_PASSWORD, normal_password, sha256, user_name
from glora_server.coordinator.access_tokens import PREFIX, ApiTokenAdministration
from glora_server.coordinator.audit import note
from glora_server.coordinator.model import new_id
from glora_server.coordinator.observer import NobodyWatches, Observer, SignIn
from glora_server.coordinator.people import (
    ADMIN_TOKEN_NAME,
    ApiToken,
    ApiTokenId,
    Credential,
    Principal,
    Role,
    Session,
    SessionId,
    User,
)
from glora_server.coordinator.ports import UnitOfWork
from glora_wire.errors import GloraError, Reason

log = structlog.get_logger(__name__)

_TOUCH_SECONDS: Final = 60.0
"""Uses are noted this often at most: a request is no reason for a write."""
_SESSIONS_SHOWN: Final = 50
_NOBODY: Final = Principal(name="", role=Role.VIEWER, credential=Credential.SESSION)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTimes:
    """How long a session lasts, seconds."""

    absolute: float = 7 * 86400.0
    idle: float = 12 * 3600.0


@dataclass(kw_only=True)
class Access(ApiTokenAdministration):
    """The use cases of signing in and of being known; `admin_token` says whether a bearer is the data folder's."""

    admin_token: Callable[[str], bool]
    times: SessionTimes = field(default_factory=SessionTimes)
    observer: Observer = field(default_factory=NobodyWatches)

    async def sign_in(self, username: str, password: str, *, origin: str) -> tuple[Principal, str]:
        """A new session and its secret; raises SIGN_IN_REFUSED, or TOO_MANY_REQUESTS saying when to try again.

        Takes the same time whether there is such a user or not, and says the same.
        """
        user = await self._known(username, password, origin)
        secret = secrets.token_urlsafe(32)
        session = self._session(user, secret, origin)
        principal = _of(user, session, origin)

        def work(uow: UnitOfWork) -> None:
            self._let_in(uow, user, principal)
            uow.sessions.end_old(expired_at=self.clock(), seen_before=self.clock() - self.times.idle)
            uow.sessions.add(session)

        await self.store.write(work)
        await self._freshen(user, password)
        return principal, secret

    async def check_password(self, username: str, password: str, *, origin: str) -> Principal:
        """Who this is, for one request and without a session (the command line makes a token with it).

        Raises SIGN_IN_REFUSED, or TOO_MANY_REQUESTS saying when to try again.
        """
        user = await self._known(username, password, origin)
        principal = Principal(name=user.name, role=user.role, credential=Credential.SESSION, origin=origin)
        await self.store.write(lambda uow: self._let_in(uow, user, principal))
        await self._freshen(user, password)
        return principal

    def _let_in(self, uow: UnitOfWork, user: User, principal: Principal) -> None:
        """Note that somebody came in; raises SIGN_IN_REFUSED when the user was changed during the comparison."""
        now = uow.users.get(user.id)
        if now.disabled or now.password_hash != user.password_hash:
            raise _wrong()
        uow.users.signed_in(user.id, self.clock())
        note(uow, principal, "session.sign-in", user.name, at=self.clock())

    async def _known(self, username: str, password: str, origin: str) -> User:
        name = user_name(username) or ""
        try:
            self.limits.take(name, origin)
        except GloraError:
            self.observer.signed_in(SignIn.LIMITED)
            raise
        user = await self.store.read(lambda uow: uow.users.find(name)) if name else None
        given = normal_password(password[: MAX_PASSWORD + 1])
        right = await self.passwords.matches(None if user is None else user.password_hash, given)
        if user is None or not right or user.disabled:
            await self._note_refusal(user, origin)
            raise _wrong()
        self.limits.succeeded(name, origin)
        self.observer.signed_in(SignIn.ACCEPTED)
        return user

    async def _note_refusal(self, user: User | None, origin: str) -> None:
        """Count and log every refusal; the audit takes those that the limits let it take."""
        # A name that is nobody's is not written down: people type passwords into the wrong field.
        who = replace(_NOBODY, name="" if user is None else user.name, origin=origin)
        self.observer.signed_in(SignIn.REFUSED)
        log.info("sign_in_refused", user=who.name, origin=origin)
        unwritten = self.limits.unwritten()
        if unwritten is not None:
            await self.store.write(
                lambda uow: note(uow, who, "session.refused", who.name, at=self.clock(), left_out_before=unwritten)
            )

    def _session(self, user: User, secret: str, origin: str) -> Session:
        now = self.clock()
        return Session(
            id=SessionId(new_id()),
            user_id=user.id,
            secret_sha256=sha256(secret),
            created_at=now,
            expires_at=now + self.times.absolute,
            seen_at=now,
            origin=origin,
        )

    async def _freshen(self, user: User, password: str) -> None:
        """Hash the password again when the parameters have been raised since."""
        if not self.passwords.outdated(user.password_hash):
            return
        password_hash = await self.passwords.hash(normal_password(password))

        def work(uow: UnitOfWork) -> None:
            now = uow.users.get(user.id)
            if now.password_hash == user.password_hash:
                uow.users.save(replace(now, password_hash=password_hash))

        await self.store.write(work)

    async def sign_out(self, principal: Principal) -> None:
        """End the session; other credentials have nothing to end."""
        if principal.credential is not Credential.SESSION or not principal.credential_id:
            return

        def work(uow: UnitOfWork) -> None:
            uow.sessions.end(SessionId(principal.credential_id))
            note(uow, principal, "session.sign-out", principal.name, at=self.clock())

        await self.store.write(work)
        self._tell()

    async def own_sessions(self, actor: Principal) -> tuple[Session, ...]:
        """Where the user is signed in, newest first; raises USER_UNKNOWN for the token of the data folder."""
        user = await self.own_user(actor)
        found = await self.store.read(lambda uow: uow.sessions.of_user(user.id, _SESSIONS_SHOWN))
        now = self.clock()
        return tuple(session for session in found if self._lives(session, now))

    async def end_own_session(self, actor: Principal, session_id: str) -> None:
        """End one of the user's own sessions, at once; one that has ended already is no error."""
        user = await self.own_user(actor)

        def work(uow: UnitOfWork) -> None:
            session = uow.sessions.find(SessionId(session_id))
            if session is not None and session.user_id == user.id:
                uow.sessions.end(session.id)
                note(uow, actor, "session.end", user.name, at=self.clock(), signed_in_from=session.origin)

        await self.store.write(work)
        self._tell()

    def _lives(self, session: Session, now: float) -> bool:
        return now < session.expires_at and now < session.seen_at + self.times.idle

    async def of_session(self, secret: str, *, origin: str) -> Principal | None:
        """Who signed in with this secret, while that holds."""
        hashed = sha256(secret)
        return await self._of_session(lambda uow: uow.sessions.by_secret(hashed), origin)

    async def of_bearer(self, token: str, *, origin: str) -> Principal | None:
        """Whose token this is, while it holds: an API token, or the one of the data folder."""
        if token.startswith(PREFIX):
            hashed = sha256(token)
            return await self._of_token(lambda uow: uow.api_tokens.by_secret(hashed), origin)
        if self.admin_token(token):
            return Principal(name=ADMIN_TOKEN_NAME, role=Role.ADMIN, credential=Credential.ADMIN_TOKEN, origin=origin)
        return None

    async def still_holds(self, principal: Principal) -> Principal | None:
        """The principal as it is now; None when its session, its token or its user was taken away.

        The role may be a lower one than before: whoever asks compares it with what is to be done.
        """
        match principal.credential:
            case Credential.ADMIN_TOKEN:
                return principal
            case Credential.SESSION:
                session_id = SessionId(principal.credential_id)
                return await self._of_session(lambda uow: uow.sessions.find(session_id), principal.origin)
            case Credential.API_TOKEN:
                token_id = ApiTokenId(principal.credential_id)
                return await self._of_token(lambda uow: uow.api_tokens.find(token_id), principal.origin)

    async def _of_session(self, find: Callable[[UnitOfWork], Session | None], origin: str) -> Principal | None:
        now = self.clock()

        def work(uow: UnitOfWork) -> tuple[Session, User] | None:
            session = find(uow)
            if session is None or not self._lives(session, now):
                return None
            return session, uow.users.get(session.user_id)

        found = await self.store.read(work)
        if found is None or found[1].disabled:
            return None
        session, user = found
        if session.seen_at + _TOUCH_SECONDS <= now:
            await self.store.write(lambda uow: uow.sessions.seen(session.id, now))
        return _of(user, session, origin)

    async def _of_token(self, find: Callable[[UnitOfWork], ApiToken | None], origin: str) -> Principal | None:
        now = self.clock()

        def work(uow: UnitOfWork) -> tuple[ApiToken, User] | None:
            token = find(uow)
            if token is None or token.revoked or (token.expires_at is not None and token.expires_at <= now):
                return None
            return token, uow.users.get(token.user_id)

        found = await self.store.read(work)
        if found is None or found[1].disabled:
            return None
        token, user = found
        if (token.used_at or 0.0) + _TOUCH_SECONDS <= now:
            await self.store.write(lambda uow: uow.api_tokens.used(token.id, now))
        role = token.role if user.role.includes(token.role) else user.role
        return Principal(
            name=user.name, role=role, credential=Credential.API_TOKEN, credential_id=token.id, origin=origin
        )


def _of(user: User, session: Session, origin: str) -> Principal:
    return Principal(
        name=user.name, role=user.role, credential=Credential.SESSION, credential_id=session.id, origin=origin
    )


def _wrong() -> GloraError:
    return GloraError(Reason.SIGN_IN_REFUSED, "The user name or the password is wrong, or the user is disabled.")
