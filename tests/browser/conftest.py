"""Chromium before a real server: every page that a test opens is watched for errors and for requests that leave."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from federation import LIVE, Federation
from live_site import add_people, live_site
from playwright.sync_api import Browser, Playwright, sync_playwright
from visitor import Visitor

CHROMIUM = Path(os.environ.get("GLORA_CHROMIUM", "/usr/bin/chromium"))
_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here is one with real processes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def playwright_() -> Iterator[Playwright]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM} (Debian: package chromium; elsewhere: set GLORA_CHROMIUM)")
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="session")
def browser(playwright_: Playwright) -> Iterator[Browser]:
    launched = playwright_.chromium.launch(executable_path=str(CHROMIUM), args=list(_ARGS))
    yield launched
    launched.close()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server whose run goes on while tests look at it."""
    with live_site(tmp_path_factory.mktemp("live"), seconds=3.0) as federation:
        yield federation


@pytest.fixture(scope="session")
def bare_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server that was just set up: people, but no device and no run."""
    with Federation(tmp_path_factory.mktemp("bare")) as federation:
        federation.start_server()
        add_people(federation)
        yield federation


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visitor]:
    """Opens pages; the test fails when one complained, or asked somebody else than its server."""
    visitor = Visitor(browser)
    yield visitor
    problems = visitor.close()
    assert not problems, "\n".join(problems)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Logs of the processes beside every failure."""
    report = yield
    if report.failed:
        for federation in LIVE:
            report.sections += [(f"log of {name}", text) for name, text in federation.logs()]
    return report
