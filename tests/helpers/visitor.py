"""A visitor with Chromium: opens pages as somebody, and notes errors and requests that leave the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from chromium import Watch
from federation import Federation
from live_site import PASSWORD, name_of
from playwright.sync_api import Browser, BrowserContext, Page, expect

from glora_server.coordinator.people import Role

PATIENCE_MS = 60_000
"""A busy machine is slow; nothing here is about speed."""
expect.set_options(timeout=PATIENCE_MS)


@dataclass
class Desk:
    """Windows that stay open from test to test, one for each user of each server: signed in, with a warm cache."""

    browser: Browser
    windows: dict[tuple[str, str], BrowserContext] = field(default_factory=dict)

    def window_of(self, url: str, user: str) -> BrowserContext:
        """The window that this user has had all along."""
        if (url, user) not in self.windows:
            self.windows[url, user] = self.fresh_window()
        return self.windows[url, user]

    def fresh_window(self) -> BrowserContext:
        """A window that nobody signed in with."""
        context = self.browser.new_context(timezone_id="Europe/Berlin", locale="en-GB")
        context.set_default_timeout(PATIENCE_MS)
        return context


@dataclass
class Visitor:
    """Opens pages as somebody, and knows what went wrong on them."""

    desk: Desk
    watches: list[tuple[Page | BrowserContext, Watch]] = field(default_factory=list)

    def __call__(
        self,
        federation: Federation,
        path: str = "/",
        *,
        role: Role = Role.OPERATOR,
        fresh: bool = False,
        dark: bool = False,
        size: tuple[int, int] = (1280, 900),
        expected: tuple[str, ...] = (),
    ) -> Page:
        """A fresh page at `path`, signed in as the user of `role`."""
        user = name_of(role)
        return self.at(federation.url, path, user=user, fresh=fresh, dark=dark, size=size, expected=expected)

    def at(
        self,
        url: str,
        path: str,
        *,
        user: str,
        password: str = PASSWORD,
        fresh: bool = False,
        dark: bool = False,
        size: tuple[int, int] = (1280, 900),
        expected: tuple[str, ...] = (),
    ) -> Page:
        """A fresh page at `path` of any server, signed in as `user`.

        It is one more page of the user's window, which keeps session and cache, as browsers do; `fresh` gives it a
        window of its own, for tests that change what a browser keeps or need a session of their own.
        """
        context = self.desk.fresh_window() if fresh else self.desk.window_of(url, user)
        page = context.new_page()
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.emulate_media(color_scheme="dark" if dark else "light")
        watch = Watch(host=urlsplit(url).netloc, expected=("401 (Unauthorized)", *expected))
        self.watches.append((context if fresh else page, watch))
        watch.follow(page)
        page.goto(url + path)
        if urlsplit(page.url).path == "/login":
            sign_in(page, user, password)
        until_live(page)
        return page

    def close(self) -> list[str]:
        """Everything that went wrong."""
        for opened, _ in self.watches:
            opened.close()
        return [problem for _, watch in self.watches for problem in watch.problems]


def sign_in(page: Page, user: str, password: str = PASSWORD) -> None:
    """Go through the login page that stands before what was asked for."""
    page.get_by_label("User name").fill(user)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()
    until_live(page)


def until_live(page: Page) -> None:
    """Return when the page is connected with its server."""
    expect(page.locator("g-connection")).to_have_attribute("data-state", "live")


def pick(page: Page, field: str, choice: str) -> None:
    """Choose one of the words of a field."""
    page.get_by_label(field, exact=True).click()
    page.get_by_role("option", name=choice, exact=True).click()


def act(page: Page, name: str) -> None:
    """Press one of the buttons above a run or a device."""
    page.get_by_role("group", name="Actions").get_by_role("button", name=name, exact=True).click()
