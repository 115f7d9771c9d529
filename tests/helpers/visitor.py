"""A visitor with Chromium: opens pages as somebody, and notes errors and requests that leave the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from federation import Federation
from live_site import PASSWORD, name_of
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect

from glora_server.coordinator.people import Role

PATIENCE_MS = 30_000
"""A busy machine is slow; nothing here is about speed."""
expect.set_options(timeout=PATIENCE_MS)


@dataclass
class Watch:
    """What a page must not do: complain, or ask anybody but its server."""

    host: str
    problems: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()
    """Parts of messages that a test provokes."""

    def follow(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self._note(f"page error: {error}"))
        page.on("request", self._request)
        page.on("websocket", lambda socket: self._address(socket.url))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self._note(f"{message.type}: {message.text} ({message.location.get('url', '')})")

    def _request(self, request: Request) -> None:
        self._address(request.url)

    def _address(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"data", "blob", "about"} and parts.netloc != self.host:
            self._note(f"left the host: {url}")

    def _note(self, problem: str) -> None:
        if not any(part in problem for part in self.expected):
            self.problems.append(problem)


@dataclass
class Visitor:
    """Opens pages as somebody, and knows what went wrong on them."""

    browser: Browser
    watches: list[tuple[BrowserContext, Watch]] = field(default_factory=list)

    def __call__(
        self,
        federation: Federation,
        path: str = "/",
        *,
        role: Role | None = Role.OPERATOR,
        dark: bool = False,
        size: tuple[int, int] = (1280, 900),
        expected: tuple[str, ...] = (),
    ) -> Page:
        """A fresh window at `path`, signed in as the user of `role` (None: nobody)."""
        user = None if role is None else name_of(role)
        return self.at(federation.url, path, user=user, dark=dark, size=size, expected=expected)

    def at(
        self,
        url: str,
        path: str,
        *,
        user: str | None,
        password: str = PASSWORD,
        dark: bool = False,
        size: tuple[int, int] = (1280, 900),
        expected: tuple[str, ...] = (),
    ) -> Page:
        """A fresh window at `path` of any server, signed in as `user` (None: nobody)."""
        context = self.browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if dark else "light",
            timezone_id="Europe/Berlin",
            locale="en-GB",
        )
        context.set_default_timeout(PATIENCE_MS)
        watch = Watch(host=urlsplit(url).netloc, expected=("401 (Unauthorized)", *expected))
        self.watches.append((context, watch))
        page = context.new_page()
        watch.follow(page)
        if user is not None:
            sign_in(page, url + path, user, password)
        else:
            page.goto(url + path)
        return page

    def close(self) -> list[str]:
        """Everything that went wrong."""
        for context, _ in self.watches:
            context.close()
        return [problem for _, watch in self.watches for problem in watch.problems]


def sign_in(page: Page, address: str, user: str, password: str = PASSWORD) -> None:
    """Go to an address, and through the login page that stands before it."""
    page.goto(address)
    page.get_by_label("User name").fill(user)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()
    until_live(page)


def until_live(page: Page) -> None:
    """Return when the page is connected with its server."""
    expect(page.locator("g-connection")).to_have_attribute("data-state", "live")
