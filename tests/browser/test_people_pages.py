"""People and accounts: users are made, changed and removed, secrets are shown once, sessions end at once."""

from __future__ import annotations

import httpx2
from federation import Federation
from live_site import PASSWORD, name_of
from playwright.sync_api import Locator, Page, expect
from visitor import Visitor

from glora_server.coordinator.people import Role

PATH = "/people"
CUT = ("WebSocket connection", "Unexpected response code: 403")
"""What a browser says when its session ended while a page was open."""


def row(page: Page, region: str, text: str) -> Locator:
    return page.get_by_role("region", name=region).get_by_role("row").filter(has_text=text)


def create(page: Page, name: str, password: str = "") -> None:
    page.get_by_role("button", name="New user").click()
    dialog = page.get_by_role("dialog", name="New user")
    dialog.get_by_label("Name", exact=True).fill(name)
    dialog.get_by_label("Password", exact=True).fill(password)
    dialog.get_by_role("button", name="Create").click()


def answer_to(site: Federation, token: str) -> int:
    """The status that a program with this token gets."""
    headers = {"Authorization": f"Bearer {token}"}
    return httpx2.get(f"{site.url}/api/v1/runs", headers=headers, timeout=60.0).status_code


def test_a_user_is_made_and_signs_in_with_the_password_that_is_shown_once(
    bare_site: Federation, visit: Visitor
) -> None:
    page = visit(bare_site, PATH, role=Role.ADMIN)
    create(page, "grace")
    shown = page.get_by_role("dialog", name="Password of grace")
    password = shown.get_by_label("Password").input_value()
    page.keyboard.press("Escape")
    expect(shown).to_be_visible()
    shown.get_by_role("button", name="I have it").click()
    expect(row(page, "Users", "grace")).to_contain_text("viewer")
    page.reload()
    expect(row(page, "Users", "grace")).to_be_visible()
    assert password not in page.content()
    other = visit.at(bare_site.url, "/", user="grace", password=password, expected=CUT)
    expect(other.get_by_role("heading", name="Overview")).to_be_visible()
    page.get_by_role("button", name="Disable grace").click()
    page.get_by_role("dialog").get_by_role("button", name="Disable the user").click()
    expect(row(page, "Users", "grace")).to_contain_text("disabled")
    expect(other.get_by_role("button", name="Sign in")).to_be_visible(timeout=60_000)


def test_what_is_wrong_with_a_new_user_is_said_in_the_form(bare_site: Federation, visit: Visitor) -> None:
    page = visit(bare_site, PATH, role=Role.ADMIN)
    create(page, "bad name", PASSWORD)
    dialog = page.get_by_role("dialog", name="New user")
    expect(dialog.get_by_role("alert").filter(has_text="A user's name has 1 to 64 letters")).to_be_visible()
    dialog.get_by_label("Name", exact=True).fill("short")
    dialog.get_by_label("Password", exact=True).fill("abc")
    dialog.get_by_role("button", name="Create").click()
    expect(dialog.get_by_role("alert").filter(has_text="This password is not taken")).to_be_visible()


def test_a_role_is_changed_a_password_reset_and_a_user_removed(bare_site: Federation, visit: Visitor) -> None:
    page = visit(bare_site, PATH, role=Role.ADMIN)
    create(page, "linus", PASSWORD)
    page.get_by_role("button", name="Change the role of linus").click()
    dialog = page.get_by_role("dialog", name="Role of linus")
    dialog.get_by_label("Role", exact=True).click()
    page.get_by_role("option", name="operator").click()
    dialog.get_by_role("button", name="Save").click()
    expect(row(page, "Users", "linus")).to_contain_text("operator")
    page.get_by_role("button", name="Reset the password of linus").click()
    page.get_by_role("dialog").get_by_role("button", name="Reset the password").click()
    expect(page.get_by_role("dialog", name="Password of linus").get_by_label("Password")).not_to_have_value("")
    page.get_by_role("button", name="I have it").click()
    page.get_by_role("button", name="Remove linus").click()
    remove = page.get_by_role("dialog").get_by_role("button", name="Remove the user")
    expect(remove).to_be_disabled()
    page.get_by_role("dialog").get_by_label("Name of the user").fill("linus")
    remove.click()
    expect(row(page, "Users", "linus")).to_have_count(0)


def test_the_last_admin_stays(bare_site: Federation, visit: Visitor) -> None:
    page = visit(bare_site, PATH, role=Role.ADMIN)
    for name in ("admin", name_of(Role.ADMIN)):
        page.get_by_role("button", name=f"Disable {name}", exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name="Disable the user").click()
        if name == "admin":
            expect(page.get_by_role("button", name="Enable admin", exact=True)).to_be_visible()
            expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_text("is the only admin who can sign in; make another one first.")).to_be_visible()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Enable admin", exact=True).click()
    expect(page.get_by_role("button", name="Disable admin", exact=True)).to_be_visible()


def test_an_api_token_works_until_an_admin_revokes_it(bare_site: Federation, visit: Visitor) -> None:
    page = visit(bare_site, "/account")
    page.get_by_role("button", name="New API token").click()
    dialog = page.get_by_role("dialog", name="New API token")
    dialog.get_by_label("What it is for").fill("nightly export")
    dialog.get_by_label("What it may do at most").click()
    expect(page.get_by_role("option", name="admin")).to_have_count(0)
    page.get_by_role("option", name="viewer").click()
    dialog.get_by_role("button", name="Create").click()
    token = page.get_by_role("dialog", name="Your API token").get_by_label("Token").input_value()
    assert answer_to(bare_site, token) == 200
    page.get_by_role("button", name="I have it").click()
    expect(row(page, "API tokens", "nightly export")).to_contain_text("valid")
    admin = visit(bare_site, PATH, role=Role.ADMIN)
    row(admin, "API tokens", "nightly export").get_by_role("button").click()
    admin.get_by_role("dialog").get_by_role("button", name="Revoke the token").click()
    expect(row(admin, "API tokens", "nightly export")).to_contain_text("revoked")
    assert answer_to(bare_site, token) == 401


def test_ones_own_sessions_are_listed_and_ended(bare_site: Federation, visit: Visitor) -> None:
    page, other = visit(bare_site, "/account"), visit(bare_site, "/", fresh=True, expected=CUT)
    rows = page.get_by_role("region", name="Sessions").locator("tbody tr")
    page.reload()
    expect(rows.filter(has_text="this one")).to_have_count(1)
    while rows.get_by_role("button").count():
        before = rows.count()
        rows.get_by_role("button").first.click()
        expect(rows).to_have_count(before - 1)
    expect(other.get_by_role("button", name="Sign in")).to_be_visible(timeout=60_000)
    expect(rows).to_have_count(1)


def test_signing_out_ends_the_session(bare_site: Federation, visit: Visitor) -> None:
    page = visit(bare_site, fresh=True, expected=CUT)
    page.get_by_role("banner").get_by_text(name_of(Role.OPERATOR)).first.click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    page.goto(f"{bare_site.url}/account")
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()


def test_changing_the_password_signs_out_and_the_new_one_counts(bare_site: Federation, visit: Visitor) -> None:
    admin = visit(bare_site, PATH, role=Role.ADMIN)
    create(admin, "edsger", PASSWORD)
    expect(row(admin, "Users", "edsger")).to_be_visible()
    page = visit.at(bare_site.url, "/account", user="edsger", expected=CUT)
    page.get_by_label("Current password").fill(PASSWORD)
    page.get_by_label("New password", exact=True).fill("goto considered harmful")
    page.get_by_label("New password again").fill("goto considered")
    page.get_by_role("button", name="Change the password").click()
    expect(page.get_by_role("alert").filter(has_text="not the same both times")).to_be_visible()
    page.get_by_label("New password again").fill("goto considered harmful")
    page.get_by_label("New password again").press("Enter")
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    page.get_by_label("User name").fill("edsger")
    page.get_by_label("Password").fill("goto considered harmful")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Account")).to_be_visible()


def test_people_are_for_admins(bare_site: Federation, visit: Visitor) -> None:
    page = visit(bare_site, PATH, expected=("403 (Forbidden)",))
    expect(page.get_by_role("button", name="New user")).to_have_count(0)
    expect(page.get_by_role("navigation", name="Pages").get_by_text("People")).to_have_count(0)
