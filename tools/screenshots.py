"""Takes pictures of every page in light, dark and on a phone: `make screenshots`, or `tools/screenshots.py OUT`.

Serves a federation that never was (tools/synthetic_server.py) and looks at it with Chromium. Fails when a page
complains on its console, asks anybody but its server, or is wider than its window.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, StorageState, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from chromium import Served, Watch, launch, synthetic

ROOT: Final = Path(__file__).resolve().parents[1]
RUN: Final = "news-topics"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A way of looking at a page."""

    name: str
    width: int
    height: int
    dark: bool = False
    scale: float = 1.0


LOOKS: Final = (
    Look(name="light", width=1280, height=860),
    Look(name="dark", width=1280, height=860, dark=True),
    Look(name="phone", width=390, height=844, scale=2.0),
)
PAGES: Final = {
    "overview": "/",
    "run": f"/runs/{RUN}",
    "round": f"/runs/{RUN}/rounds/{{round}}",
    "round-open": f"/runs/{RUN}/rounds/{{open_round}}",
    "new-run": "/runs/new",
    "devices": "/devices",
    "device": "/devices/{device}",
    "enrolment": "/enrolment",
    "exports": f"/exports?run={RUN}",
    "audit": "/audit",
    "system": "/system",
    "people": "/people",
    "account": "/account",
    "missing": "/no/such/page",
}
"""Every page by the name of its picture; braces are filled with what the federation has."""


class Photographer:
    """Visits pages and notes what is wrong with them."""

    def __init__(self, browser: Browser, served: Served, out: Path) -> None:
        self._browser, self._served, self._out = browser, served, out
        self._signed_in: StorageState | None = None
        self._watches: list[tuple[str, Watch]] = []
        self._too_wide: list[str] = []

    def problems(self) -> list[str]:
        """What was wrong, by look."""
        complaints = [f"{look}: {problem}" for look, watch in self._watches for problem in watch.problems]
        return complaints + self._too_wide

    def visit(self, look: Look, only: frozenset[str], *, whole: bool) -> None:
        """Pictures of all pages in one look."""
        if not only:
            self._take_login(look)
        context = self._context(look)
        page = context.new_page()
        self._watch(page, look)
        self._sign_in(page)
        names = self._names(page, rounds=max(1, self._open_round(page)))
        for name, address in PAGES.items():
            if not only or name in only:
                page.goto(self._served.url + address.format(**names))
                self._take(page, look, name, whole=whole)
        context.close()

    def _context(self, look: Look) -> BrowserContext:
        context = self._browser.new_context(
            viewport={"width": look.width, "height": look.height},
            device_scale_factor=look.scale,
            color_scheme="dark" if look.dark else "light",
            timezone_id="Europe/Berlin",
            locale="en-GB",
            storage_state=self._signed_in,
        )
        context.set_default_timeout(60_000)
        return context

    def _watch(self, page: Page, look: Look) -> None:
        watch = Watch(host=urlsplit(self._served.url).netloc, expected=("401 (", "404 ("))
        self._watches.append((look.name, watch))
        watch.follow(page)

    def _take_login(self, look: Look) -> None:
        signed_in, self._signed_in = self._signed_in, None
        context = self._context(look)
        self._signed_in = signed_in
        page = context.new_page()
        self._watch(page, look)
        page.goto(self._served.url + "/login")
        page.screenshot(path=self._out / f"login-{look.name}.png")
        context.close()

    def _sign_in(self, page: Page) -> None:
        page.goto(self._served.url + "/")
        if self._signed_in is None:
            page.get_by_label("User name").fill(self._served.user)
            page.get_by_label("Password").fill(self._served.password)
            page.get_by_role("button", name="Sign in").click()
            page.wait_for_selector("g-connection[data-state=live]")
            self._signed_in = page.context.storage_state()

    def _open_round(self, page: Page) -> int:
        page.goto(f"{self._served.url}/runs/{RUN}")
        page.wait_for_selector("g-connection[data-state=live]")
        shown = page.get_by_role("link", name="Timeline of every device").get_attribute("href") or "/1"
        return int(shown.rpartition("/")[2])

    def _names(self, page: Page, *, rounds: int) -> dict[str, str]:
        page.goto(f"{self._served.url}/devices")
        page.wait_for_selector("g-connection[data-state=live]")
        device = page.locator("main a[href^='/devices/']").first.get_attribute("href") or ""
        return {"device": device.rpartition("/")[2], "round": str(max(1, rounds - 1)), "open_round": str(rounds)}

    def _take(self, page: Page, look: Look, name: str, *, whole: bool) -> None:
        page.wait_for_selector("g-connection[data-state=live]")
        page.wait_for_timeout(1200)  # charts are drawn after the page is there
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > look.width:
            self._too_wide.append(f"{look.name}: {name} is {width} pixels wide")
        page.screenshot(path=self._out / f"{name}-{look.name}.png", full_page=whole)


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "build" / "screenshots")
    parser.add_argument("--devices", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=[], choices=sorted(PAGES), help="names of pages; default: all")
    parser.add_argument("--looks", nargs="*", default=[look.name for look in LOOKS])
    parser.add_argument("--window", action="store_true", help="what fits the window, not the whole page")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="glora-screenshots-") as folder,
        synthetic(Path(folder) / "data", devices=given.devices, rounds=given.rounds) as served,
        sync_playwright() as playwright,
    ):
        browser = launch(playwright)
        photographer = Photographer(browser, served, given.out)
        for look in LOOKS:
            if look.name in given.looks:
                photographer.visit(look, frozenset(given.only), whole=not given.window)
        browser.close()
    print(f"Pictures are in {given.out}.")
    if problems := photographer.problems():
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
