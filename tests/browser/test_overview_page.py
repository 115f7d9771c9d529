"""The overview before a run that goes on."""

from __future__ import annotations

import re

import pytest
from federation import Federation
from live_site import DEVICES, RUN
from playwright.sync_api import expect
from visitor import Visitor

from glora_server.coordinator.people import Role


def test_it_says_what_goes_on_at_one_glance(site: Federation, visit: Visitor) -> None:
    page = visit(site, role=Role.VIEWER)
    card = page.get_by_role("article").filter(has=page.get_by_role("link", name=RUN, exact=True))
    expect(card.get_by_text("active")).to_be_visible()
    expect(card).to_contain_text(re.compile(r"\d+ of \d+ updates are in \(at least 3 needed\)|aggregated|planned"))
    told = re.search(r"Devices online\s*(\d+)", page.locator(".tiles").inner_text())
    assert told is not None
    assert int(told[1]) >= len(DEVICES)


def test_it_is_live_without_being_loaded_anew(site: Federation, visit: Visitor) -> None:
    page = visit(site)
    page.evaluate("window.stays = true")
    card = page.get_by_role("article").filter(has=page.get_by_role("link", name=RUN, exact=True))
    expect(card).to_contain_text(re.compile(r"Round \d+:"))
    done = site.show_run(RUN).rounds_done
    to_come = "|".join(str(number) for number in range(done + 2, done + 100))
    expect(card).to_contain_text(re.compile(rf"Round ({to_come}):"), timeout=90_000)
    assert page.evaluate("window.stays") is True


def test_rejected_updates_become_an_alert(site: Federation, visit: Visitor) -> None:
    page = visit(site, role=Role.VIEWER)
    expect(page.locator(".alerts li").filter(has_text="phone-7")).to_be_visible(timeout=90_000)


def test_pages_may_ask_nobody_but_their_server(site: Federation, visit: Visitor) -> None:
    """Not even when a script of somebody else got into one."""
    elsewhere = "http://127.0.0.1:9/"
    page = visit(site, expected=("Content Security Policy", elsewhere))
    blocked = page.evaluate(
        """address => new Promise((done) => {
          document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
          fetch(address).then(() => done("asked"), () => {});
        })""",
        elsewhere,
    )
    assert blocked == "connect-src"
    framed = page.evaluate(
        """() => new Promise((done) => {
          document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
          document.body.append(Object.assign(document.createElement("iframe"), { src: "/" }));
        })"""
    )
    assert framed == "frame-src"


def test_a_run_is_one_click_away(site: Federation, visit: Visitor) -> None:
    page = visit(site, role=Role.VIEWER)
    page.get_by_role("link", name=RUN, exact=True).click()
    expect(page).to_have_url(re.compile(rf"/runs/{RUN}$"))
    expect(page.get_by_role("heading", name=RUN, level=1)).to_be_visible()


@pytest.mark.parametrize("path", ["/", f"/runs/{RUN}", f"/runs/{RUN}/rounds/1"])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(site: Federation, visit: Visitor, path: str, dark: bool) -> None:
    site.wait_run(RUN, lambda run: run.round is not None, "a round to look at")
    page = visit(site, path, size=(390, 844), dark=dark)
    for chart in page.locator(".chart").all():
        expect(chart.locator("svg")).to_be_attached()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")


def test_the_choice_of_dark_is_kept(site: Federation, visit: Visitor) -> None:
    page = visit(site, fresh=True)
    for _ in range(2):  # as the system, light, dark
        page.get_by_role("button", name="Colours").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.locator("body")).to_have_class(re.compile("body--dark"))


def test_an_address_of_nothing_says_so(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/no/such/page", expected=("404 (Not Found)",))
    expect(page.get_by_role("heading", name="Not found")).to_be_visible()
    expect(page.get_by_text("There is no page at /no/such/page.")).to_be_visible()
    page.get_by_role("link", name="Go to the overview").click()
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()


def test_a_run_that_is_not_there_says_so(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/runs/nothing", expected=("404 (Not Found)",))
    expect(page.locator(".empty")).to_contain_text("nothing")
