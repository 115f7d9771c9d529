"""Users: made, listed, given roles and passwords, disabled, removed; there is always an admin left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from glora_server.coordinator.access_base import (
    MAX_PASSWORD,
    AccessBase,
    checked_password,
    new_user_name,
    normal_password,
    stored_name,
)
from glora_server.coordinator.audit import note
from glora_server.coordinator.errors import require_role
from glora_server.coordinator.model import Listing, Page, new_id
from glora_server.coordinator.people import Credential, Principal, Role, User, UserId
from glora_server.coordinator.ports import UnitOfWork
from glora_wire.errors import GloraError, Reason

FIRST_ADMIN: Final = "admin"
SERVER: Final = Principal(name="server", role=Role.ADMIN, credential=Credential.ADMIN_TOKEN)
"""Whom the audit names for what the server does by itself at its first start."""


class UserAdministration(AccessBase):
    """What admins do with users; the last admin who is not disabled cannot be taken away."""

    async def ensure_admin(self, password: str = "") -> str | None:
        """Make the first user where there is none; the password where it was made up, to be shown this once.

        `password` is that of the first admin when the settings name one; raises PASSWORD_REFUSED.
        """
        if await self.store.read(lambda uow: uow.users.any()):
            return None
        chosen = password or "-".join(new_id(5) for _ in range(4))
        user = await self._drafted(FIRST_ADMIN, Role.ADMIN, chosen)

        def work(uow: UnitOfWork) -> bool:
            if uow.users.any():
                return False
            uow.users.add(user)
            note(uow, SERVER, "user.create", user.name, at=self.clock(), after=_shown(user))
            return True

        made = await self.store.write(work)
        return chosen if made and not password else None

    async def users(self, actor: Principal, page: Page | None = None) -> Listing[User]:
        """Users by name; raises ROLE_TOO_LOW."""
        require_role(actor, Role.ADMIN)
        return await self.store.read(lambda uow: uow.users.list(page or Page()))

    async def user(self, actor: Principal, name: str) -> User:
        """One user: anybody for admins, else only oneself; raises USER_UNKNOWN, ROLE_TOO_LOW."""
        if name != actor.name:
            require_role(actor, Role.ADMIN)
        return await self.store.read(lambda uow: uow.users.by_name(stored_name(name)))

    async def create_user(self, actor: Principal, name: str, role: Role, password: str) -> User:
        """A new user; raises NAME_INVALID, NAME_TAKEN, PASSWORD_REFUSED."""
        require_role(actor, Role.ADMIN)
        user = await self._drafted(new_user_name(name), role, password)

        def work(uow: UnitOfWork) -> User:
            uow.users.add(user)
            note(uow, actor, "user.create", user.name, at=self.clock(), after=_shown(user))
            return user

        return await self.store.write(work)

    async def set_role(self, actor: Principal, name: str, role: Role) -> User:
        """Give another role; the user must sign in again; raises LAST_ADMIN."""
        return await self._change(actor, "user.set-role", name, role=role)

    async def disable_user(self, actor: Principal, name: str) -> User:
        """Let nobody in by this name, at once; sessions end, API tokens rest; raises LAST_ADMIN."""
        return await self._change(actor, "user.disable", name, disabled=True)

    async def enable_user(self, actor: Principal, name: str) -> User:
        """Let the user in again."""
        return await self._change(actor, "user.enable", name, disabled=False)

    async def set_password(self, actor: Principal, name: str, password: str) -> User:
        """Set anybody's password; the user must sign in again; raises PASSWORD_REFUSED."""
        require_role(actor, Role.ADMIN)
        password_hash = await self.passwords.hash(checked_password(password, stored_name(name)))
        return await self._change(actor, "user.set-password", name, password_hash=password_hash)

    async def change_password(self, actor: Principal, current: str, password: str) -> User:
        """Change one's own password; all one's sessions end; raises PASSWORD_REFUSED, TOO_MANY_REQUESTS."""
        user = await self.own_user(actor)
        checked = checked_password(password, user.name)
        self.limits.take(user.name, actor.origin)
        if not await self.passwords.matches(user.password_hash, normal_password(current[: MAX_PASSWORD + 1])):
            raise GloraError(Reason.PASSWORD_REFUSED, "The current password is wrong.")
        self.limits.succeeded(user.name, actor.origin)
        password_hash = await self.passwords.hash(checked)
        work = partial(self._save, actor, "user.change-password", user.name, {"password_hash": password_hash})
        return await self._told(await self.store.write(work))

    async def remove_user(self, actor: Principal, name: str) -> User:
        """Forget a user with all sessions and API tokens; the audit keeps the name; raises LAST_ADMIN."""
        require_role(actor, Role.ADMIN)

        def work(uow: UnitOfWork) -> User:
            user = uow.users.by_name(stored_name(name))
            _keep_an_admin(uow, user)
            uow.users.remove(user.id)
            note(uow, actor, "user.remove", user.name, at=self.clock(), before=_shown(user))
            return user

        return await self._told(await self.store.write(work))

    async def own_user(self, actor: Principal) -> User:
        """The user that the principal is; raises USER_UNKNOWN for the token of the data folder, which is nobody."""
        if actor.credential is Credential.ADMIN_TOKEN:
            raise GloraError(
                Reason.USER_UNKNOWN, "The token of the data folder belongs to no user; name the user that is meant."
            )
        return await self.store.read(lambda uow: uow.users.by_name(actor.name))

    async def _drafted(self, name: str, role: Role, password: str) -> User:
        password_hash = await self.passwords.hash(checked_password(password, name))
        return User(id=UserId(new_id()), name=name, role=role, password_hash=password_hash, created_at=self.clock())

    async def _change(self, actor: Principal, action: str, name: str, **changes: object) -> User:
        require_role(actor, Role.ADMIN)
        return await self._told(await self.store.write(partial(self._save, actor, action, name, changes)))

    def _save(self, actor: Principal, action: str, name: str, changes: Mapping[str, object], uow: UnitOfWork) -> User:
        """Save the user with changes; sessions made before end."""
        before = uow.users.by_name(stored_name(name))
        after = replace(before, **changes)  # type: ignore[arg-type]  # the callers above name fields of a user
        if after.disabled or after.role is not Role.ADMIN:
            _keep_an_admin(uow, before)
        if after == before:
            return before
        saved = uow.users.save(after)
        ended = uow.sessions.end_of_user(saved.id)
        note(
            uow, actor, action, saved.name, at=self.clock(), before=_shown(before), after=_shown(saved), sessions=ended
        )
        return saved

    async def _told(self, user: User) -> User:
        self._tell()
        return user


def _keep_an_admin(uow: UnitOfWork, user: User) -> None:
    """Raise LAST_ADMIN when nobody but `user` is an admin who can sign in."""
    if [admin.id for admin in uow.users.admins()] == [user.id]:
        raise GloraError(
            Reason.LAST_ADMIN,
            f"{user.name} is the only admin who can sign in; make another one first.",
            user=user.name,
        )


def _shown(user: User) -> dict[str, object]:
    """What the audit tells of a user."""
    return {"role": user.role, "disabled": user.disabled}
