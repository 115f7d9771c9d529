"""A run's page: what it shows, and what an operator does there, while the run goes on."""

from __future__ import annotations

import contextlib
import re

from federation import Federation
from glora_processes import until
from live_site import RUN, add_run
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import expect
from visitor import Visitor, act

from glora_dashboard.access_models import UserAnswer
from glora_server.coordinator.people import Role
from glora_server.rounds.run import RunPhase

PAGE = f"/runs/{RUN}"


def test_it_shows_curves_consensus_rounds_and_lineage(site: Federation, visit: Visitor) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 2, "two rounds")
    page = visit(site, PAGE, role=Role.VIEWER)
    for label in (
        "Accuracy by version",
        "Loss by version",
        "Agreement of devices by module and version",
        "Captured energy and truncation error",
        "Norms of updates by round",
        "Bytes moved by round",
        "Seconds of each stage by round",
    ):
        expect(page.get_by_role("img", name=label).locator("svg path").first).to_be_attached()
    expect(page.locator(".lineage")).to_contain_text(re.compile(r"Version \d+"))
    expect(page.get_by_role("region", name="Rounds").get_by_role("row")).not_to_have_count(0)
    expect(page.locator(".facts")).to_contain_text("tiny-encoder")


def test_a_chart_s_numbers_are_there_for_those_who_do_not_see_it(site: Federation, visit: Visitor) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 2, "two rounds")
    page = visit(site, PAGE, role=Role.VIEWER)
    for label in ("Accuracy by version", "Agreement of devices by module and version"):
        page.get_by_text(f"Numbers of {label}", exact=True).click()
        table = page.get_by_role("region", name=f"Numbers of {label}")
        expect(table.get_by_role("rowheader").first).to_be_visible()
        expect(table.get_by_role("cell").filter(has_text=re.compile(r"\d")).first).to_be_visible()


def test_curves_grow_while_one_looks(site: Federation, visit: Visitor) -> None:
    page = visit(site, PAGE, role=Role.VIEWER)
    before = page.locator(".lineage b").first.inner_text()
    expect(page.locator(".lineage b").first).not_to_have_text(before, timeout=60_000)


def test_a_viewer_gets_no_actions(site: Federation, visit: Visitor) -> None:
    page = visit(site, PAGE, role=Role.VIEWER)
    expect(page.get_by_role("heading", name=RUN, level=1)).to_be_visible()
    expect(page.get_by_role("group", name="Actions")).to_have_count(0)


def test_pausing_and_resuming(site: Federation, visit: Visitor) -> None:
    page = visit(site, PAGE)
    act(page, "Pause")
    expect(page.get_by_text(f"{RUN} is paused; an open round goes on to its end.")).to_be_visible()
    expect(page.locator(".head-title")).to_contain_text("paused")
    assert site.show_run(RUN).phase == RunPhase.PAUSED
    act(page, "Resume")
    expect(page.locator(".head-title")).to_contain_text("active")
    assert site.show_run(RUN).phase == RunPhase.ACTIVE


def test_extending_the_deadline(site: Federation, visit: Visitor) -> None:
    page = visit(site, PAGE)
    dialog = page.get_by_role("dialog")
    for _ in range(20):  # the button is there while a round collects; a click that comes as it ends is not heard
        act(page, "Extend the deadline")
        with contextlib.suppress(PlaywrightTimeout):
            dialog.wait_for(timeout=3000)
            break
    expect(dialog.get_by_role("heading", name="Extend the deadline")).to_be_visible()
    told = page.get_by_text("The deadline is 15 min later.")
    between_rounds = page.get_by_text(f"Run {RUN} has no round that collects updates now.")
    for _ in range(20):
        site.wait_run(RUN, lambda run: run.round is not None and run.round.phase == "collecting", "an open round")
        dialog.get_by_role("button", name="Extend", exact=True).click()
        expect(told.or_(between_rounds)).to_be_visible()
        if not between_rounds.is_visible():
            break
        page.get_by_role("button", name="Close").click()
        expect(between_rounds).to_have_count(0)
    expect(dialog).to_have_count(0)


def test_a_wrong_policy_is_told_in_the_servers_words_and_a_right_one_counts(site: Federation, visit: Visitor) -> None:
    page = visit(site, PAGE)
    act(page, "Edit policy")
    dialog = page.get_by_role("dialog")
    quorum = dialog.get_by_label("Quorum")
    quorum.fill("0")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog.get_by_role("alert").filter(has_text="quorum")).to_contain_text("at least 1")
    quorum.fill("2")
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_have_count(0)
    expect(page.locator(".facts")).to_contain_text("quorum 2")
    assert site.show_run(RUN).spec.policy.quorum == 2


def test_starting_and_aborting_asks_for_the_name(site: Federation, visit: Visitor) -> None:
    add_run(site, "doomed", start=False)
    page = visit(site, "/runs/doomed")
    act(page, "Start")
    expect(page.locator(".head-title")).to_contain_text("active")
    act(page, "Abort")
    dialog = page.get_by_role("dialog")
    confirm = dialog.get_by_role("button", name="Abort the run")
    expect(confirm).to_be_disabled()
    dialog.get_by_label("Name of the run").fill("demo")
    expect(confirm).to_be_disabled()
    dialog.get_by_label("Name of the run").fill("doomed")
    dialog.get_by_label("Why (for the audit)").fill("only a test")
    expect(confirm).to_be_enabled()
    confirm.click()
    expect(page.locator(".head-title")).to_contain_text("aborted")
    expect(page.get_by_role("group", name="Actions").get_by_role("button")).to_have_count(0)
    assert site.show_run("doomed").phase == RunPhase.ABORTED


def test_older_rounds_are_in_parts(site: Federation, visit: Visitor) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 11, "eleven rounds")
    page = visit(site, PAGE, role=Role.VIEWER)
    card = page.locator("section.card").filter(has=page.get_by_role("heading", name="Rounds", exact=True))
    expect(card.get_by_role("button", name="Newer")).to_be_disabled()
    numbers = card.get_by_role("link", name=re.compile(r"^\d+$"))
    card.get_by_role("button", name="Older").click()
    expect(card.locator(".pager")).to_contain_text("11 to")

    def shown() -> list[int]:
        return [int(text) for text in numbers.all_inner_texts()]

    # What stands below the pager comes a moment after it.
    until(lambda: 0 < max(shown(), default=0) <= site.show_run(RUN).rounds_done - 5, "the older rounds are shown")
    older = shown()
    card.get_by_role("button", name="Newer").click()
    expect(card.locator(".pager")).to_contain_text("1 to 10")
    until(lambda: max(shown(), default=0) > site.show_run(RUN).rounds_done - 5, "the newest rounds are shown")
    newest = shown()
    assert newest
    assert older
    assert max(older) < min(newest), "rounds that began in the meantime make the newest ones newer still"


def test_who_lost_the_role_is_out_at_once(site: Federation, visit: Visitor) -> None:
    """An open page ends with the session that it was opened with."""
    page = visit(site, PAGE, expected=("Failed to load resource", "WebSocket connection"))
    expect(page.get_by_role("group", name="Actions")).to_be_visible()
    with site.api() as api:
        api.post(UserAnswer, "/users/operator-ada/role", {"role": "viewer"})
        try:
            expect(page).to_have_url(re.compile("/login"), timeout=60_000)
        finally:
            api.post(UserAnswer, "/users/operator-ada/role", {"role": "operator"})
