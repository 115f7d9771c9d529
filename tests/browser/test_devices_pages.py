"""The list of devices and a device's own page: found, approved, suspended, re-ranked, revoked with the mouse."""

from __future__ import annotations

import re

from federation import Federation
from live_site import RUN
from playwright.sync_api import Locator, Page, expect
from visitor import Visitor, act, pick, until_live

from glora_dashboard.models import DeviceAnswer
from glora_server.coordinator.model import DeviceState
from glora_server.coordinator.people import Role


def waiting(site: Federation, *names: str) -> None:
    """Let devices join with a token whose devices wait for approval."""
    token = site.token(uses=len(names), max_rank=8, approve=False, tags=["spare"])
    for name in names:
        site.join(name, 8, token)


def rows(page: Page) -> Locator:
    return page.get_by_role("region", name="Devices", exact=True).locator("tbody tr")


def test_a_device_is_found_by_name_state_and_order(site: Federation, visit: Visitor) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 1, "a round")
    page = visit(site, "/devices", role=Role.VIEWER)
    expect(rows(page).filter(has_text="pi-kitchen")).to_contain_text("0.")
    page.get_by_label("Name, id or platform").fill("JETSON")
    expect(rows(page)).to_have_count(1)
    expect(rows(page)).to_contain_text("jetson-lab")
    expect(page).to_have_url(re.compile(r"\?text=JETSON$"))
    page.reload()
    expect(rows(page)).to_have_count(1)
    page.get_by_label("Name, id or platform").fill("")
    pick(page, "Order", "least reliable first")
    expect(rows(page).first).to_contain_text(re.compile("phone-7|tablet-3"))
    pick(page, "Presence", "away")
    expect(page.get_by_role("link", name="pi-kitchen")).to_have_count(0)


def test_viewers_approve_nobody(site: Federation, visit: Visitor) -> None:
    waiting(site, "shy-1")
    page = visit(site, "/devices?state=pending", role=Role.VIEWER)
    expect(rows(page).filter(has_text="shy-1")).to_have_count(1)
    expect(page.get_by_role("button", name=re.compile("Approve"))).to_have_count(0)


def test_a_button_that_a_viewer_forged_does_nothing(site: Federation, visit: Visitor) -> None:
    """What pages do not offer is refused by the server too, should a browser ask for it."""
    waiting(site, "shy-2")
    page = visit(site, "/devices?state=pending&text=shy-2", role=Role.VIEWER)
    expect(rows(page)).to_have_count(1)
    page.evaluate(
        """() => {
          const forged = document.createElement("button");
          Object.assign(forged.dataset, { act: "approve", of: "shy-2" });
          forged.textContent = "Forged";
          document.querySelector("section.card").append(forged);
          forged.click();
        }"""
    )
    expect(page.locator(".q-notification")).to_contain_text("operator")
    with site.api() as api:
        assert api.get(DeviceAnswer, "/devices/shy-2").state == DeviceState.PENDING


def test_waiting_devices_are_approved_one_by_one_and_together(site: Federation, visit: Visitor) -> None:
    waiting(site, "new-1", "new-2", "new-3")
    page = visit(site, "/devices?state=pending&text=new-")
    expect(rows(page)).to_have_count(3)
    page.get_by_role("button", name="Approve new-2").click()
    expect(page.get_by_text("new-2 may work.")).to_be_visible()
    expect(rows(page)).to_have_count(2)
    page.get_by_role("button", name="Approve them").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("new-1, new-3")
    dialog.get_by_role("button", name="Approve", exact=True).click()
    expect(page.get_by_text("2 devices may work.")).to_be_visible()
    expect(page.get_by_text("No device is like that.")).to_be_visible()


def test_suspending_re_ranking_and_revoking(site: Federation, visit: Visitor) -> None:
    site.join("victim", 8)
    page = visit(site, "/devices/victim")
    act(page, "Change rank")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Largest rank it may use").fill("5000")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_role("alert")).to_contain_text("A rank is between 1 and 4096, not 5000.")
    dialog.get_by_label("Largest rank it may use").fill("2")
    dialog.get_by_role("button", name="Save").click()
    expect(page.get_by_text("victim may use rank 2.")).to_be_visible()
    act(page, "Suspend")
    page.get_by_role("dialog").get_by_role("button", name="Suspend").click()
    expect(page.locator(".head-title")).to_contain_text("suspended")
    act(page, "Approve")
    expect(page.locator(".head-title")).to_contain_text("away")
    act(page, "Revoke")
    dialog = page.get_by_role("dialog")
    revoke = dialog.get_by_role("button", name="Revoke the device")
    expect(revoke).to_be_disabled()
    dialog.get_by_label("Name of the device").fill("victim")
    revoke.click()
    expect(page.locator(".head-title")).to_contain_text("revoked")
    expect(page.get_by_role("group", name="Actions").get_by_role("button")).to_have_count(0)
    page.goto(f"{site.url}/devices?text=victim")
    expect(page.get_by_text("No device is like that.")).to_be_visible()
    pick(page, "State", "revoked")
    expect(rows(page)).to_have_count(1)
    expect(rows(page)).to_contain_text("victim")


def test_a_device_is_revoked_with_the_keyboard_alone(site: Federation, visit: Visitor) -> None:
    site.join("typed-away", 4)
    page = visit(site, "/devices?text=typed-away")
    link = page.get_by_role("link", name="typed-away")
    expect(link).to_be_visible()
    page.get_by_label("Order", exact=True).focus()
    for _ in range(10):
        page.keyboard.press("Tab")
        if link.evaluate("node => node === document.activeElement"):
            break
    page.keyboard.press("Enter")
    revoke = page.get_by_role("group", name="Actions").get_by_role("button", name="Revoke")
    expect(revoke).to_be_visible()
    until_live(page)
    for _ in range(40):
        page.keyboard.press("Tab")
        if revoke.evaluate("node => node === document.activeElement"):
            break
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_label("Name of the device")).to_be_focused()
    page.keyboard.type("typed-away")
    expect(page.get_by_role("button", name="Revoke the device")).to_be_enabled()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".head-title")).to_contain_text("revoked")


def test_a_device_that_is_not_there_is_said_so(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/devices/nobody", expected=("404 (Not Found)",))
    expect(page.get_by_role("heading", name="Not found")).to_be_visible()


def test_without_devices_the_next_step_is_a_token(bare_site: Federation, visit: Visitor) -> None:
    page = visit(bare_site, "/devices")
    page.get_by_role("link", name="Make a join token").click()
    expect(page.get_by_role("heading", name="Enrolment", level=1)).to_be_visible()


def test_a_device_page_shows_what_it_did_and_how_far_it_agrees(site: Federation, visit: Visitor) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 3, "three rounds")
    page = visit(site, "/devices/pi-kitchen", role=Role.VIEWER)
    expect(page.get_by_role("img", name="Agreement by version").locator("svg path").first).to_be_attached()
    expect(page.get_by_text(re.compile(r"\d+ accepted"))).to_be_visible()
    history = page.get_by_role("region", name="History").locator("tbody tr")
    expect(history.filter(has_text="accepted").first).to_contain_text(RUN)
    expect(page.get_by_role("group", name="Actions")).to_have_count(0)
    page.get_by_text("The last contributions as a table").click()
    expect(page.get_by_role("region", name="Contributions").locator("tbody tr").first).to_contain_text(RUN)


def test_on_a_phone_nothing_is_wider_than_the_screen(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/devices", size=(390, 844))
    for path in (
        "/devices",
        "/devices/pi-kitchen",
        "/enrolment",
        f"/exports?run={RUN}",
        "/audit",
        "/system",
        "/runs/new",
    ):
        page.goto(site.url + path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
