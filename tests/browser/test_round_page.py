"""A round's timeline: every device, and what it does just now."""

from __future__ import annotations

import re
import time

from chromium import Served
from federation import Federation
from live_site import DEVICES, RUN
from playwright.sync_api import expect
from visitor import Visitor

from glora_server.coordinator.people import Role


def test_every_device_has_a_row_with_what_became_of_it(site: Federation, visit: Visitor) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 1, "a round")
    page = visit(site, f"/runs/{RUN}/rounds/1", role=Role.VIEWER)
    rows = page.get_by_role("row").filter(has=page.get_by_role("link"))
    expect(rows).to_have_count(len(DEVICES))
    expect(rows.filter(has_text="nuc-attic")).to_contain_text("accepted")
    expect(rows.filter(has_text="nuc-attic").locator(".g-piece.training")).to_have_count(1)
    expect(rows.filter(has_text="phone-7")).to_contain_text("rejected")
    expect(rows.filter(has_text="phone-7")).to_contain_text("NaN or infinite")
    expect(rows.filter(has_text="tablet-3")).to_contain_text("declined")
    expect(rows.filter(has_text="tablet-3")).to_contain_text("3.8 GB are needed")
    expect(page.locator(".counts")).to_contain_text("1 rejected")


def test_training_steps_move_by_themselves(site: Federation, visit: Visitor) -> None:
    page = visit(site, f"/runs/{RUN}", role=Role.VIEWER)
    page.get_by_role("link", name="Timeline of every device").click()
    expect(page).to_have_url(re.compile(r"/rounds/\d+$"))
    page.evaluate("window.stays = true")
    seen: set[str] = set()
    step = re.compile(r"step (\d+) of 20")
    deadline = time.monotonic() + 120.0
    while len(seen) <= 3 and time.monotonic() < deadline:
        seen |= set(step.findall(page.locator(".gantt").inner_text())) if page.locator(".gantt").count() else set()
        after = page.get_by_role("link", name="Round after")
        if after.count() and not page.locator(".g-live").count():
            after.click()
            page.wait_for_timeout(300)
        page.wait_for_timeout(150)
    assert len(seen) > 3, f"steps that were shown: {seen}"


def test_the_newest_round_leads_to_none_after_it(crowd: Served, visit: Visitor) -> None:
    page = visit.at(crowd.url, "/runs/news-topics", user=crowd.user, password=crowd.password)
    page.get_by_role("link", name="Timeline of every device").click()
    expect(page.get_by_role("link", name="Round before")).to_be_visible()
    expect(page.get_by_role("link", name="Round after")).to_have_count(0)
    page.get_by_role("link", name="Round before").click()
    expect(page.get_by_role("link", name="Round after")).to_be_visible()


def test_a_round_to_come_says_so(site: Federation, visit: Visitor) -> None:
    page = visit(site, f"/runs/{RUN}/rounds/99999", expected=("404 (Not Found)",))
    expect(page.locator(".empty")).to_contain_text("99999")
