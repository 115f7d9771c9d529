"""The frame around every page: how a page is declared, its header with navigation, and who may see it.

A page is a function of a `Site` (and of what stands in its path or query):

    @page("/devices", title="Devices", nav="Devices")
    async def devices_page(site: Site) -> None:
        listing = await site.queries.devices(Page())     # first ask: a GloraError here becomes a page that says so
        with frame("Devices"):                           # then build
            ...
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Final

from markupsafe import Markup
from nicegui import context, ui
from starlette.requests import Request

from glora_dashboard.pages.assets import MARK, STATIC_PREFIX
from glora_dashboard.pages.parts import Block, Link, anchor, empty, join
from glora_dashboard.pages.site import may, site_of
from glora_dashboard.permission import principal_of, require
from glora_server.coordinator.people import Principal, Role
from glora_wire.errors import GloraError, Kind

_MARK: Final = 'name="glora-now"'
_BUILD_SECONDS: Final = 20.0
_STATUS: Final = {Kind.NOT_FOUND: 404, Kind.FORBIDDEN: 403, Kind.UNAUTHENTICATED: 401, Kind.UNAVAILABLE: 503}


@dataclass(frozen=True, slots=True, kw_only=True)
class PageEntry:
    """A page that was declared."""

    path: str
    title: str
    least: Role
    nav: str
    """Its words in the navigation; empty: it is reached from other pages."""


PAGES: Final[dict[str, PageEntry]] = {}
"""Every page by its path; the navigation is made of these."""
_NAV_ORDER: Final = ("/", "/devices", "/enrolment", "/exports", "/audit", "/system", "/people")


def page(
    path: str, *, title: str, nav: str = "", least: Role = Role.VIEWER
) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., Awaitable[None]]]:
    """Declare a page at `path` for those who have `least`; its parameters besides `site` come from path and query."""
    PAGES[path] = PageEntry(path=path, title=title, least=least, nav=nav)

    def declare(build: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        @wraps(build)
        async def built(request: Request, **parameters: object) -> None:
            try:
                require(principal_of(request.scope), least)
                await build(site_of(request), **parameters)
            except GloraError as error:
                _say(title, error)

        own = [p for p in inspect.signature(build, eval_str=True).parameters.values() if p.name != "site"]
        first = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Request)
        built.__signature__ = inspect.Signature([first, *own])  # type: ignore[attr-defined]  # what FastAPI reads
        ui.page(path, title=f"{title} · glora", response_timeout=_BUILD_SECONDS)(built)
        return build

    return declare


def may_see(address: str) -> bool:
    """Whether there is a page at the address that the viewer of this context may open."""
    parts = address.partition("?")[0].split("/")
    for entry in PAGES.values():
        own = entry.path.split("/")
        if len(own) == len(parts) and all(a == b or a.startswith("{") for a, b in zip(own, parts, strict=True)):
            return may(entry.least)
    return False


def _say(title: str, error: GloraError) -> None:
    client = context.client
    client.status_code = _STATUS.get(error.kind, 400)
    for child in list(client.content.default_slot.children):
        client.content.remove(child)
    with frame(title, heading=False):
        empty("Not found" if error.kind is Kind.NOT_FOUND else title, error.message, link=("Go to the overview", "/"))


@contextmanager
def frame(title: str, *, crumbs: tuple[Link, ...] = (), heading: bool = True) -> Iterator[None]:
    """The page's frame, to be filled as a context. `crumbs` lead back; `heading` shows the title above the content."""
    ui.page_title(f"{title} · glora")
    if _MARK not in context.client.head_html:  # a page that fails half-way opens its frame a second time
        ui.add_head_html(
            f'<meta {_MARK} content="{time.time():.3f}">'
            f'<link rel="stylesheet" href="{STATIC_PREFIX}/site.css">'
            f'<link rel="stylesheet" href="{STATIC_PREFIX}/desk.css"><script src="{STATIC_PREFIX}/site.js"></script>'
        )
        _header(principal_of(context.client.request.scope), context.client.request.url.path)
    with ui.element("div").classes("page").props('id="content"'):
        if crumbs:
            trail = join(Markup("<li>{}</li>").format(anchor(words, address)) for words, address in crumbs)
            Block(Markup("<ol>{}</ol>").format(trail), tag="nav").classes("crumbs").props('aria-label="Back"')
        if heading:
            Block(Markup("{}").format(title), tag="h1")
        yield


def _header(principal: Principal | None, path: str) -> None:
    with ui.header(fixed=False).classes("site-header"):
        Block(Markup('<a class="skip" href="#content">Skip to the content</a>'), tag="div").classes("skip-box")
        Block(Markup('<a class="brand" href="/" aria-label="glora: overview">{}<b>glora</b></a>').format(Markup(MARK)))  # noqa: S704 - our own file
        Block(_navigation(principal, path), tag="nav").props('aria-label="Pages"').classes("nav")
        ui.element("g-connection")
        theme = ui.element("button").props('type="button" data-theme-button aria-label="Colours"').classes("theme")
        theme.on("click", js_handler="() => glora.nextTheme()")
        if principal is not None:
            Block(_who(principal), tag="div").classes("who")


def _navigation(principal: Principal | None, path: str) -> Markup:
    items = []
    for entry in sorted(PAGES.values(), key=_nav_place):
        if entry.nav and principal is not None and principal.role.includes(entry.least):
            here = path == entry.path or (entry.path != "/" and path.startswith(entry.path + "/"))
            here = here or (entry.path == "/" and path.startswith("/runs"))
            current = Markup(' aria-current="page"') if here else ""
            items.append(Markup('<li><a href="{}"{}>{}</a></li>').format(entry.path, current, entry.nav))
    return Markup("<ul>{}</ul>").format(join(items))


def _nav_place(entry: PageEntry) -> tuple[int, str]:
    return (_NAV_ORDER.index(entry.path) if entry.path in _NAV_ORDER else len(_NAV_ORDER), entry.path)


def _who(principal: Principal) -> Markup:
    account = Markup('<a href="/account">Account</a>') if "/account" in PAGES else ""
    return Markup(
        '<details class="menu"><summary aria-label="{} ({})"><span class="face" aria-hidden="true">{}</span>'
        '<span class="name">{}</span></summary><div class="menu-body"><p><b>{}</b><br>{}</p>{}'
        '<form method="post" action="/logout"><button type="submit">Sign out</button></form></div></details>'
    ).format(
        principal.name,
        principal.role,
        principal.name[:1].upper(),
        principal.name,
        principal.name,
        principal.role,
        account,
    )
