"""Enrolment: a token is made, its command pasted, the device approved; tokens are listed and revoked."""

from __future__ import annotations

import re
import shlex

from federation import Federation
from playwright.sync_api import Page, expect
from visitor import Visitor

from glora_server.coordinator.people import Role


def make(page: Page, what: str, *, hold: bool = False, tags: str = "") -> str:
    """Make a token; answers the command."""
    page.get_by_label("What it is for").fill(what)
    page.get_by_label("Tags").fill(tags)
    if hold:
        page.get_by_role("checkbox", name="Each device waits").click()
    page.get_by_role("button", name="Make the token").click()
    command = page.get_by_label("Run this on the device")
    expect(command).to_be_visible()
    return command.input_value()


def test_the_command_lets_a_device_join_and_the_page_approves_it(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/enrolment")
    words = shlex.split(make(page, "for the lab", hold=True, tags="lab, north"))
    assert words[:3] == ["glora", "client", "join"]
    assert words[words.index("--server") + 1] == f"127.0.0.1:{site.ports.enrolment}"
    site.join("pasted", 4, words[words.index("--token") + 1])
    approve = page.get_by_role("button", name="Approve pasted")
    expect(approve).to_be_visible()
    row = page.get_by_role("row").filter(has=approve)
    expect(row).to_contain_text("north")
    approve.click()
    expect(page.get_by_text("pasted may work.")).to_be_visible()
    expect(approve).to_have_count(0)


def test_the_command_is_copied(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/enrolment", fresh=True)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.url)
    command = make(page, "to copy")
    page.locator(".token-made").get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == command


def test_without_https_the_command_is_selected_and_copied_the_old_way(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/enrolment")
    command = make(page, "to copy without https")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.locator(".token-made [data-copy]").click()
    expect(page.locator(".token-made [data-copy]")).to_have_text(re.compile("Copied|Press Ctrl"))
    selected = "(() => { const f = document.activeElement; return f.value.slice(f.selectionStart, f.selectionEnd) })()"
    assert page.evaluate(selected) == command


def test_a_secret_is_shown_once(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/enrolment")
    command = make(page, "shown once")
    secret = shlex.split(command)[6]
    page.reload()
    expect(page.get_by_text("shown once").first).to_be_visible()
    assert secret not in page.content()


def test_wrong_values_are_told_in_the_servers_words(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/enrolment")
    page.get_by_label("Largest rank they may use").fill("9999")
    page.get_by_role("button", name="Make the token").click()
    expect(page.get_by_role("alert").filter(has_text="max_rank must be between 1 and 4096, not 9999.")).to_be_visible()


def test_a_token_is_revoked(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/enrolment")
    make(page, "to revoke")
    row = page.get_by_role("region", name="Tokens").get_by_role("row").filter(has_text="to revoke")
    expect(row).to_contain_text("valid")
    row.get_by_role("button", name=re.compile("Revoke token")).click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke the token").click()
    expect(row).to_contain_text("revoked")
    expect(row.get_by_role("button")).to_have_count(0)


def test_a_waiting_device_is_refused(site: Federation, visit: Visitor) -> None:
    site.join("unwanted", 4, site.token(max_rank=4, approve=False))
    page = visit(site, "/enrolment")
    page.get_by_role("button", name="Refuse unwanted").click()
    page.get_by_role("dialog").get_by_role("button", name="Refuse the device").click()
    expect(page.get_by_text("unwanted is refused.")).to_be_visible()
    expect(page.get_by_role("button", name="Refuse unwanted")).to_have_count(0)


def test_viewers_do_not_enrol(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/enrolment", role=Role.VIEWER, expected=("403 (Forbidden)",))
    expect(page.get_by_role("button", name="Make the token")).to_have_count(0)
    expect(page.get_by_role("navigation", name="Pages").get_by_text("Enrolment")).to_have_count(0)
