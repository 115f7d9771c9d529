"""API tokens: made by users for their programs, with a role and an end, revoked at any time."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Final

from glora_server.coordinator.access_base import sha256, stored_name
from glora_server.coordinator.access_users import UserAdministration
from glora_server.coordinator.audit import note
from glora_server.coordinator.errors import api_token_unknown, require_role
from glora_server.coordinator.model import Listing, Page, new_id
from glora_server.coordinator.people import ApiToken, ApiTokenId, Credential, Principal, Role, User
from glora_server.coordinator.ports import UnitOfWork
from glora_wire.errors import GloraError, Reason

PREFIX: Final = "glora-api-"
"""Every token begins with it, so that people and secret scanners know what they have found."""
MAX_TOKENS: Final = 100
MAX_TOKEN_SECONDS: Final = 5 * 366 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiTokenView:
    """An API token and whose it is."""

    token: ApiToken
    user: str


class ApiTokenAdministration(UserAdministration):
    """What users do with their own API tokens, and admins with everybody's."""

    async def create_api_token(
        self,
        actor: Principal,
        *,
        name: str,
        role: Role = Role.VIEWER,
        ttl_seconds: float | None = 90 * 86400.0,
        user: str | None = None,
    ) -> tuple[ApiTokenView, str]:
        """A new token and its text, which is shown this once; for somebody else (`user`) by admins only.

        Its role is not above that of its maker and its user; a token that is made with a token ends no later than
        that one. Raises ROLE_TOO_LOW, USER_UNKNOWN, REQUEST_INVALID.
        """
        if not 1 <= len(name.strip()) <= 100:
            raise GloraError(Reason.REQUEST_INVALID, "Say in 1 to 100 characters what the token is for (its name).")
        if ttl_seconds is not None and not 1 <= ttl_seconds <= MAX_TOKEN_SECONDS:
            raise GloraError(Reason.REQUEST_INVALID, f"ttl_seconds must be between 1 and {MAX_TOKEN_SECONDS:.0f}.")
        owner = await self._owner(actor, user)
        if not owner.role.includes(role):
            raise GloraError(
                Reason.ROLE_TOO_LOW, f"{owner.name} has the role {owner.role}; a token of theirs has no higher one."
            )
        require_role(actor, role)
        text = PREFIX + secrets.token_hex(32)
        now = self.clock()
        token = ApiToken(
            id=ApiTokenId(new_id()),
            user_id=owner.id,
            name=name.strip(),
            role=role,
            secret_sha256=sha256(text),
            created_at=now,
            expires_at=None if ttl_seconds is None else now + ttl_seconds,
        )
        saved = await self.store.write(lambda uow: self._add_token(uow, actor, owner, token))
        return ApiTokenView(token=saved, user=owner.name), text

    async def _owner(self, actor: Principal, user: str | None) -> User:
        if user is None or (user == actor.name and actor.credential is not Credential.ADMIN_TOKEN):
            return await self.own_user(actor)
        require_role(actor, Role.ADMIN)
        return await self.store.read(lambda uow: uow.users.by_name(stored_name(user)))

    def _add_token(self, uow: UnitOfWork, actor: Principal, owner: User, token: ApiToken) -> ApiToken:
        if uow.api_tokens.live_of(owner.id, self.clock()) >= MAX_TOKENS:
            raise GloraError(
                Reason.REQUEST_INVALID, f"{owner.name} has {MAX_TOKENS} API tokens already; revoke some of them first."
            )
        maker = uow.api_tokens.find(ApiTokenId(actor.credential_id))
        if actor.credential is Credential.API_TOKEN and maker is not None and maker.expires_at is not None:
            token = replace(token, expires_at=min(maker.expires_at, token.expires_at or maker.expires_at))
        uow.users.get(owner.id)
        uow.api_tokens.add(token)
        note(uow, actor, "api-token.create", token.id, at=self.clock(), after=_shown(token), user=owner.name)
        return token

    async def api_tokens(
        self, actor: Principal, page: Page | None = None, *, user: str | None = None
    ) -> Listing[ApiTokenView]:
        """Tokens, newest first: one's own; for admins those of `user`, or everybody's."""
        whose = user
        if not actor.role.includes(Role.ADMIN):
            if user not in {None, actor.name}:
                require_role(actor, Role.ADMIN)
            whose = actor.name

        def work(uow: UnitOfWork) -> Listing[ApiTokenView]:
            owner = None if whose is None else uow.users.by_name(stored_name(whose))
            found = uow.api_tokens.list(page or Page(), None if owner is None else owner.id)
            names = {token.user_id: uow.users.get(token.user_id).name for token in found.items}
            views = tuple(ApiTokenView(token=token, user=names[token.user_id]) for token in found.items)
            return Listing(items=views, next_token=found.next_token)

        return await self.store.read(work)

    async def revoke_api_token(self, actor: Principal, token_id: str) -> ApiTokenView:
        """Refuse a token from now on: one's own, or anybody's for admins; raises API_TOKEN_UNKNOWN."""

        def work(uow: UnitOfWork) -> ApiTokenView:
            token = uow.api_tokens.get(ApiTokenId(token_id))
            owner = uow.users.get(token.user_id)
            if owner.name != actor.name and not actor.role.includes(Role.ADMIN):
                raise api_token_unknown(token_id)
            if token.revoked:
                return ApiTokenView(token=token, user=owner.name)
            saved = uow.api_tokens.save(replace(token, revoked=True))
            note(
                uow,
                actor,
                "api-token.revoke",
                token.id,
                at=self.clock(),
                before=_shown(token),
                after=_shown(saved),
                user=owner.name,
            )
            return ApiTokenView(token=saved, user=owner.name)

        view = await self.store.write(work)
        self._tell()
        return view


def _shown(token: ApiToken) -> dict[str, object]:
    """What the audit tells of a token."""
    return {"name": token.name, "role": token.role, "expires_at": token.expires_at, "revoked": token.revoked}
