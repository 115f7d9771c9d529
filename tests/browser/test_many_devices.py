"""Pages before more devices and rounds than fit a screen: what is shown stays bounded, and the rest is in parts."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import expect
from visitor import Visitor

TOOL = Path(__file__).resolve().parents[2] / "tools" / "synthetic_server.py"
LINE = re.compile(r"(http://\S+)\s+user (\S+), password (\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """A synthetic federation."""

    url: str
    user: str
    password: str


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    """160 devices, and a round with most of them that goes on."""
    command = [sys.executable, str(TOOL), str(tmp_path_factory.mktemp("crowd") / "data"), "--port", "0"]
    options = ("--devices", "160", "--rounds", "30")
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = next((match for line in process.stdout if (match := LINE.search(line))), None)
            assert found is not None, f"the synthetic server ended with {process.wait()}"
            yield Crowd(url=found[1], user=found[2], password=found[3])
        finally:
            process.terminate()


def test_the_devices_of_a_round_come_in_parts(crowd: Crowd, visit: Visitor) -> None:
    page = visit.at(crowd.url, "/runs/news-topics", user=crowd.user, password=crowd.password)
    page.get_by_role("link", name="Timeline of every device").click()
    rows = page.locator(".g-row:not(.g-head)")
    expect(rows).to_have_count(50)
    first = rows.first.locator("a").inner_text()
    page.get_by_role("button", name="Next").click()
    expect(page.locator(".pager")).to_contain_text("51 to 100")
    expect(rows.first.locator("a")).not_to_have_text(first)
    page.wait_for_timeout(4000)  # what is refreshed by itself stays on its part
    expect(page.locator(".pager")).to_contain_text("51 to 100")
    page.get_by_role("button", name="Previous").click()
    expect(rows.first.locator("a")).to_have_text(first)


def test_a_run_with_many_modules_and_rounds_draws_one_cell_for_each(crowd: Crowd, visit: Visitor) -> None:
    page = visit.at(crowd.url, "/runs/news-topics", user=crowd.user, password=crowd.password)
    chart = page.get_by_role("img", name="Effective directions of the consensus by module and version")
    expect(chart.locator("svg")).to_be_visible()
    page.wait_for_timeout(500)
    assert chart.locator("svg path").count() > 24 * 29
    expect(page.locator(".busy li")).to_have_count(7)
    expect(page.locator(".busy li").last).to_contain_text("more")


def test_runs_that_go_on_come_first(crowd: Crowd, visit: Visitor) -> None:
    page = visit.at(crowd.url, "/", user=crowd.user, password=crowd.password)
    cards = page.get_by_role("article")
    expect(cards.first).to_contain_text("news-topics")
    expect(cards.last.locator(".pill")).to_have_text(re.compile("completed|failed|aborted"))
    expect(page.locator(".alerts")).to_contain_text("wait for approval")
