"""Signing in and out: a page that needs no script, and the two posts behind it."""

from __future__ import annotations

import html
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from glora_dashboard.gate import (
    LOGIN_PATH,
    LOGIN_STYLE_PATH,
    SESSION_COOKIE,
    check_same_origin,
    is_encrypted,
    safe_next,
)
from glora_dashboard.permission import ANYBODY, principal_of
from glora_server.coordinator.access import Access
from glora_wire.errors import GloraError, Kind

FORM_COOKIE: Final = "glora_form"
_FORM_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_MAX_FORM_BYTES: Final = 8192
_MAX_FIELDS: Final = 8
_FORM_SECONDS: Final = 3600
_STATIC: Final = Path(__file__).parent / "static"
_STYLE: Final = (_STATIC / "login.css").read_bytes()
_PAGE: Final = (_STATIC / "login.html").read_text(encoding="utf-8")
_POLICY: Final = (
    "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    username: str = ""
    password: str = ""
    token: str = ""
    next: str = "/"


def login_routes(access: Access) -> APIRouter:
    """The login page, its style, and the posts that sign in and out."""
    routes = APIRouter(include_in_schema=False, dependencies=[ANYBODY])

    @routes.get(LOGIN_STYLE_PATH)
    async def login_style() -> Response:
        """The only file that strangers get."""
        return Response(_STYLE, media_type="text/css", headers={"Cache-Control": "max-age=3600"})

    @routes.get(LOGIN_PATH)
    async def login_page(request: Request) -> Response:
        """The form; who has signed in already goes on."""
        wanted = safe_next(request.query_params.get("next", "/"))
        if principal_of(request.scope) is not None:
            return RedirectResponse(wanted, 303)
        return _page(request, _Form(next=wanted))

    @routes.post(LOGIN_PATH)
    async def sign_in(request: Request) -> Response:
        """Start a session under a new secret, whatever cookie came along; the old session ends."""
        form = _read(await request.body())
        if not _came_from_here(request, form):
            return _page(request, form, "This form was too old. Please try again.", 403)
        try:
            _, secret = await access.sign_in(form.username, form.password, origin=_address(request))
        except GloraError as error:
            return _refused(request, form, error)
        before = principal_of(request.scope)
        if before is not None:
            await access.sign_out(before)
        response = RedirectResponse(form.next, 303)
        _set_cookie(request, response, SESSION_COOKIE, secret, path="/", strict=False)
        response.delete_cookie(FORM_COOKIE, path=LOGIN_PATH)
        return response

    @routes.post("/logout")
    async def sign_out(request: Request) -> Response:
        """End the session, here and in the database."""
        principal = principal_of(request.scope)
        if principal is not None:
            await access.sign_out(principal)
        response = RedirectResponse(LOGIN_PATH, 303)
        response.delete_cookie(SESSION_COOKIE, path="/", secure=is_encrypted(request.scope), httponly=True)
        # The browser forgets what it kept of this server's pages, the back button's included.
        response.headers["Clear-Site-Data"] = '"cache"'
        return response

    return routes


def _read(body: bytes) -> _Form:
    """The fields of the form; what is not one is an empty form."""
    if len(body) > _MAX_FORM_BYTES:
        return _Form()
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="replace")
    except ValueError:
        return _Form()
    first = {name: values[0] for name, values in fields.items()}
    return _Form(
        username=first.get("username", ""),
        password=first.get("password", ""),
        token=first.get("form_token", ""),
        next=safe_next(first.get("next", "/")),
    )


def _came_from_here(request: Request, form: _Form) -> bool:
    """Whether the form is one that this server showed to this browser."""
    if "origin" in request.headers or "sec-fetch-site" in request.headers:
        try:
            check_same_origin(request.scope, request.headers)
        except GloraError:
            return False
    cookie = request.cookies.get(FORM_COOKIE, "")
    given = form.token if form.token.isascii() else ""
    return bool(_FORM_TOKEN.fullmatch(cookie)) and secrets.compare_digest(cookie, given)


def _refused(request: Request, form: _Form, error: GloraError) -> Response:
    status = {Kind.UNAUTHENTICATED: 401, Kind.EXHAUSTED: 429}.get(error.kind, 503)
    response = _page(request, form, error.message, status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after)))
    return response


def _page(request: Request, form: _Form, problem: str = "", status: int = 200) -> Response:
    known = request.cookies.get(FORM_COOKIE, "")
    token = known if _FORM_TOKEN.fullmatch(known) else secrets.token_urlsafe(32)
    alert = f'<p class="problem" id="problem" role="alert">{html.escape(problem)}</p>' if problem else ""
    described = ' aria-describedby="problem" aria-invalid="true"' if problem else ""
    body = _PAGE.format(
        style=LOGIN_STYLE_PATH,
        action=LOGIN_PATH,
        alert=alert,
        described=described,
        username=html.escape(form.username[:64]),
        token=token,
        next=html.escape(form.next),
        focus_user="" if form.username else " autofocus",
        focus_password=" autofocus" if form.username else "",
    )
    response = HTMLResponse(body, status, headers={"Content-Security-Policy": _POLICY})
    _set_cookie(request, response, FORM_COOKIE, token, path=LOGIN_PATH, strict=True)
    return response


def _set_cookie(request: Request, response: Response, name: str, value: str, *, path: str, strict: bool) -> None:
    """A cookie that scripts cannot read and that travels encrypted where the page did.

    The session's has no end of its own: the server knows it, and browsers drop it when they are closed.
    """
    response.set_cookie(
        name,
        value,
        max_age=_FORM_SECONDS if strict else None,
        path=path,
        secure=is_encrypted(request.scope),
        httponly=True,
        samesite="strict" if strict else "lax",
    )


def _address(request: Request) -> str:
    return "" if request.client is None else request.client.host
