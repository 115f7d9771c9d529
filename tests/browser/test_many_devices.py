"""Pages before more devices and rounds than fit a screen: what is shown stays bounded, and the rest is in parts."""

from __future__ import annotations

import re

from chromium import Served
from playwright.sync_api import expect
from visitor import Visitor


def test_the_devices_of_a_round_come_in_parts(crowd: Served, visit: Visitor) -> None:
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


def test_a_run_with_many_modules_and_rounds_draws_one_cell_for_each(crowd: Served, visit: Visitor) -> None:
    page = visit.at(crowd.url, "/runs/news-topics", user=crowd.user, password=crowd.password)
    chart = page.get_by_role("img", name="Agreement of devices by module and version")
    expect(chart.locator("svg")).to_be_visible()
    expect(chart.locator("svg path").nth(24 * 29)).to_be_attached()
    expect(page.locator(".busy li")).to_have_count(7)
    expect(page.locator(".busy li").last).to_contain_text("more")


def test_runs_that_go_on_come_first(crowd: Served, visit: Visitor) -> None:
    page = visit.at(crowd.url, "/", user=crowd.user, password=crowd.password)
    cards = page.get_by_role("article")
    expect(cards.first).to_contain_text("news-topics")
    expect(cards.last.locator(".pill")).to_have_text(re.compile("completed|failed|aborted"))
    expect(page.locator(".alerts")).to_contain_text("wait for approval")
