"""/api/v1/users, /me, /api-tokens and /sign-in."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from glora_dashboard.access_models import (
    ApiTokenAnswer,
    MeAnswer,
    NewApiToken,
    NewApiTokenAnswer,
    NewPassword,
    NewRole,
    NewUser,
    PasswordChange,
    SignIn,
    UserAnswer,
)
from glora_dashboard.bodies import Name, PageQuery
from glora_dashboard.models import PageAnswer
from glora_dashboard.permission import ANYBODY, Admin, Viewer
from glora_server.coordinator.access import Access
from glora_server.coordinator.access_tokens import ApiTokenView


def access_routes(access: Access) -> APIRouter:
    """Routes about who may come in."""
    routes = APIRouter(tags=["people"])
    _add_users(routes, access)
    _add_changes(routes, access)
    _add_own(routes, access)
    _add_tokens(routes, access)
    return routes


def _add_users(routes: APIRouter, access: Access) -> None:
    @routes.get("/users")
    async def list_users(actor: Admin, page: PageQuery) -> PageAnswer[UserAnswer]:
        """Users by name."""
        listing = await access.users(actor, page)
        return PageAnswer(items=[UserAnswer.of(user) for user in listing.items], next_page_token=listing.next_token)

    @routes.post("/users", status_code=201)
    async def create_user(actor: Admin, body: NewUser) -> UserAnswer:
        """Make a user."""
        return UserAnswer.of(await access.create_user(actor, body.name, body.role, body.password))

    @routes.get("/users/{name}")
    async def show_user(actor: Admin, name: Name) -> UserAnswer:
        """One user."""
        return UserAnswer.of(await access.user(actor, name))


def _add_changes(routes: APIRouter, access: Access) -> None:
    @routes.post("/users/{name}/role")
    async def set_user_role(actor: Admin, name: Name, body: NewRole) -> UserAnswer:
        """Give another role; the user must sign in again."""
        return UserAnswer.of(await access.set_role(actor, name, body.role))

    @routes.post("/users/{name}/password")
    async def set_user_password(actor: Admin, name: Name, body: NewPassword) -> UserAnswer:
        """Set another password; the user must sign in again."""
        return UserAnswer.of(await access.set_password(actor, name, body.password))

    @routes.post("/users/{name}/disable")
    async def disable_user(actor: Admin, name: Name) -> UserAnswer:
        """Let nobody in by this name, neither with the password nor with a token."""
        return UserAnswer.of(await access.disable_user(actor, name))

    @routes.post("/users/{name}/enable")
    async def enable_user(actor: Admin, name: Name) -> UserAnswer:
        """Let a disabled user in again; tokens that were not revoked hold again."""
        return UserAnswer.of(await access.enable_user(actor, name))

    @routes.post("/users/{name}/remove")
    async def remove_user(actor: Admin, name: Name) -> UserAnswer:
        """Forget a user with all sessions and API tokens; the audit keeps the name."""
        return UserAnswer.of(await access.remove_user(actor, name))


def _add_own(routes: APIRouter, access: Access) -> None:
    @routes.get("/me")
    async def show_me(actor: Viewer) -> MeAnswer:
        """Who asks, and with which role."""
        return MeAnswer.of(actor)

    @routes.post("/me/password")
    async def change_own_password(actor: Viewer, body: PasswordChange) -> UserAnswer:
        """Change one's own password; all one's sessions end."""
        return UserAnswer.of(await access.change_password(actor, body.current, body.password))

    @routes.post("/sign-in", status_code=201, dependencies=[ANYBODY])
    async def sign_in(request: Request, body: SignIn) -> NewApiTokenAnswer:
        """Make an API token with a user name and a password; tries are limited."""
        origin = "" if request.client is None else request.client.host
        actor = await access.check_password(body.username, body.password, origin=origin)
        view, text = await access.create_api_token(
            actor, name=body.token_name, role=body.role or actor.role, ttl_seconds=body.ttl_seconds
        )
        return _made(view, text)


def _add_tokens(routes: APIRouter, access: Access) -> None:
    @routes.get("/api-tokens")
    async def list_api_tokens(
        actor: Viewer,
        page: PageQuery,
        user: Annotated[
            str | None, Query(max_length=64, description="Whose; for admins, left out: everybody's.")
        ] = None,
    ) -> PageAnswer[ApiTokenAnswer]:
        """API tokens, newest first: one's own, or for admins everybody's."""
        listing = await access.api_tokens(actor, page, user=user)
        items = [ApiTokenAnswer.of(view) for view in listing.items]
        return PageAnswer(items=items, next_page_token=listing.next_token)

    @routes.post("/api-tokens", status_code=201)
    async def create_api_token(actor: Viewer, body: NewApiToken) -> NewApiTokenAnswer:
        """Make an API token; the answer is the only place where its text is shown."""
        view, text = await access.create_api_token(
            actor, name=body.name, role=body.role, ttl_seconds=body.ttl_seconds, user=body.user
        )
        return _made(view, text)

    @routes.post("/api-tokens/{token_id}/revoke")
    async def revoke_api_token(actor: Viewer, token_id: Name) -> ApiTokenAnswer:
        """Refuse a token from now on: one's own, or for admins anybody's."""
        return ApiTokenAnswer.of(await access.revoke_api_token(actor, token_id))


def _made(view: ApiTokenView, text: str) -> NewApiTokenAnswer:
    return NewApiTokenAnswer(**ApiTokenAnswer.of(view).model_dump(), token=text)
