"""Chromium before a real server: every page that a test opens is watched for errors and for requests that leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Served, launch, synthetic
from failure_logs import pytest_runtest_makereport
from federation import Federation
from live_site import add_people, live_site
from playwright.sync_api import Browser, Playwright, sync_playwright
from visitor import Desk, Visitor

__all__ = ["pytest_runtest_makereport"]


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
    launched = launch(playwright_)
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


@pytest.fixture(scope="session")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """160 devices, and a round with most of them that goes on."""
    with synthetic(tmp_path_factory.mktemp("crowd") / "data", devices=160, rounds=30) as served:
        yield served


@pytest.fixture(scope="session")
def desk(browser: Browser) -> Desk:
    """The windows of every user, shared by all tests."""
    return Desk(browser)


@pytest.fixture
def visit(desk: Desk) -> Iterator[Visitor]:
    """Opens pages; the test fails when one complained, or asked somebody else than its server."""
    visitor = Visitor(desk)
    yield visitor
    problems = visitor.close()
    assert not problems, "\n".join(problems)
