"""Without a mouse, and without a server for a while."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from chromium import Served
from federation import Federation
from live_site import RUN, add_run
from playwright.sync_api import Page, expect
from visitor import Visitor, until_live

from glora_dashboard.run_models import RunAnswer
from glora_server.coordinator.people import Role


def focused(page: Page) -> str:
    text: str = page.evaluate("(document.activeElement.innerText || document.activeElement.ariaLabel || '').trim()")
    return text


def tab_to(page: Page, words: str) -> None:
    """Press Tab until what says `words` has the focus, and shows it."""
    for _ in range(150):
        page.keyboard.press("Tab")
        if focused(page).startswith(words):
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"{words} does not show that it has the focus"
            return
    raise AssertionError(f"Tab never reached {words}")


def test_the_first_stop_skips_to_the_content(site: Federation, visit: Visitor) -> None:
    page = visit(site)
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the content"
    page.keyboard.press("Enter")
    tab_to(page, RUN)
    assert page.evaluate("document.activeElement.getAttribute('href')") == f"/runs/{RUN}"


def test_a_run_is_aborted_with_the_keyboard_alone(site: Federation, visit: Visitor) -> None:
    add_run(site, "unwanted", start=False)
    page = visit(site, "/runs/unwanted")
    tab_to(page, "Abort")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert focused(page) == "Abort"
    page.keyboard.press("Enter")
    until_inside_dialog(page)
    tab_or_here(page, "Name of the run")
    page.keyboard.type("unwanted")
    tab_to(page, "Abort the run")
    page.keyboard.press("Enter")
    expect(page.locator(".head-title")).to_contain_text("aborted")


def test_a_run_is_made_changed_and_steered_with_the_keyboard_alone(site: Federation, visit: Visitor) -> None:
    page = visit(site, f"/runs/new?like={RUN}")
    tab_or_here(page, "Name")
    page.keyboard.press("Control+A")
    page.keyboard.type("by-keys")
    tab_to(page, "Create")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="by-keys", level=1)).to_be_visible()
    until_live(page)
    tab_to(page, "Edit policy")
    page.keyboard.press("Enter")
    until_inside_dialog(page)
    tab_or_here(page, "Quorum")
    page.keyboard.press("Control+A")
    page.keyboard.type("5")
    tab_to(page, "Save")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator(".facts")).to_contain_text("quorum 5")
    for button, state in (("Start", "active"), ("Pause", "paused"), ("Resume", "active")):
        tab_to(page, button)
        page.keyboard.press("Enter")
        expect(page.locator(".head-title")).to_contain_text(state)
    with site.api() as api:
        api.post(RunAnswer, "/runs/by-keys/abort", {"reason": "The test has seen enough."})


def test_a_deadline_is_extended_with_the_keyboard_alone(crowd: Served, visit: Visitor) -> None:
    page = visit.at(crowd.url, "/runs/news-topics", user=crowd.user, password=crowd.password)
    tab_to(page, "Extend the deadline")
    page.keyboard.press("Enter")
    until_inside_dialog(page)
    tab_or_here(page, "More time")
    page.keyboard.press("Enter")
    expect(page.get_by_role("option", name="1 hour")).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    tab_to(page, "Extend")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The deadline is 1 h later.")).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert focused(page) == "Extend the deadline"


def test_a_version_is_downloaded_with_the_keyboard_alone(site: Federation, visit: Visitor, tmp_path: Path) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 1, "a round")
    page = visit(site, f"/exports?run={RUN}")
    tab_or_here(page, "Rank")
    page.keyboard.press("Control+A")
    page.keyboard.type("4")
    tab_to(page, "Download the zip")
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    waiting.value.save_as(tmp_path / "adapter.zip")
    with zipfile.ZipFile(tmp_path / "adapter.zip") as archive:
        assert json.loads(archive.read("adapter_config.json"))["r"] == 4


def until_inside_dialog(page: Page) -> None:
    """Return when a dialog is open and has the focus."""
    page.wait_for_function("document.activeElement.closest('[role=dialog]') !== null")


def tab_or_here(page: Page, label: str) -> None:
    for _ in range(60):
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == label:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab never reached the field {label}")


def test_pages_have_landmarks_and_one_first_heading(site: Federation, visit: Visitor) -> None:
    site.wait_run(RUN, lambda run: run.round is not None, "a round to look at")
    for path in ("/", f"/runs/{RUN}", f"/runs/{RUN}/rounds/1"):
        page = visit(site, path, role=Role.VIEWER)
        expect(page.get_by_role("banner")).to_have_count(1)
        expect(page.get_by_role("main")).to_have_count(1)
        expect(page.get_by_role("navigation", name="Pages")).to_be_visible()
        expect(page.get_by_role("heading", level=1)).to_have_count(1)
        unnamed = page.locator("button:visible, a:visible, input:visible").evaluate_all(
            "all => all.filter(e => !(e.innerText || e.ariaLabel || e.title || e.labels?.length)).map(e => e.outerHTML)"
        )
        assert unnamed == []


def test_a_new_server_shows_the_first_step(bare_site: Federation, visit: Visitor) -> None:
    page = visit(bare_site)
    expect(page.get_by_role("heading", name="Welcome. First, let a device join")).to_be_visible()
    expect(page.get_by_role("link", name="Make a join token")).to_have_attribute("href", "/enrolment")
    viewer = visit(bare_site, role=Role.VIEWER)
    expect(viewer.get_by_text("An operator can create one.")).to_be_visible()


def test_a_page_survives_a_restart_of_its_server(bare_site: Federation, visit: Visitor) -> None:
    """It says that it lost the server, finds it again by itself, and says that it is up to date."""
    away = ("ERR_CONNECTION", "WebSocket connection", "Failed to load resource", "ERR_SOCKET")
    page = visit(bare_site, expected=away)
    page.evaluate("window.stays = true")
    for process in bare_site.processes:
        process.kill()
    expect(page.locator("g-connection")).to_contain_text("Connection lost")
    expect(page.locator("#popup")).to_be_visible()
    bare_site.start_server()
    expect(page.get_by_text("Connected again. This page shows the present state.")).to_be_visible(timeout=90_000)
    expect(page.locator("g-connection")).to_have_attribute("data-state", "live")
    assert page.evaluate("window.stays") is None, "the page was not loaded anew"
    expect(page).to_have_url(re.compile(r"/$"))


def test_what_has_the_focus_keeps_it_while_the_page_changes(site: Federation, visit: Visitor) -> None:
    """Markup is changed in place: a link that somebody is at is still the same one after many refreshes."""
    page = visit(site, "/", role=Role.VIEWER)
    link = page.get_by_role("link", name=RUN, exact=True)
    link.focus()
    page.evaluate("document.activeElement.marked = true")
    sentence = page.locator(".why").first
    before = sentence.inner_text()
    expect(sentence).not_to_have_text(before, timeout=60_000)
    assert page.evaluate("document.activeElement.marked") is True
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(rf"/runs/{RUN}$"))
