"""A run is created with the mouse: from the form, a run.toml, or another run; wrong values are told at their fields."""

from __future__ import annotations

import re
from pathlib import Path

from federation import Federation
from hand_fleet import fleet_manifest
from live_site import RUN, run_text
from playwright.sync_api import Page, WebSocketRoute, expect
from visitor import Visitor, until_live

from glora_server.coordinator.people import Role
from glora_server.coordinator.run_spec import parse_run_toml
from glora_server.rounds.run import RunPhase

PATH = "/runs/new"


def give(page: Page, which: str, path: Path) -> None:
    """Choose a file in the field of that name."""
    page.locator(".q-uploader", has_text=which).locator("input[type=file]").set_input_files(path)


def manifest(folder: Path) -> Path:
    path = folder / "manifest.json"
    path.write_text(fleet_manifest().to_json(), encoding="utf-8")
    return path


def test_the_form_creates_and_starts_a_run(site: Federation, visit: Visitor, tmp_path: Path) -> None:
    page = visit(site, PATH)
    page.get_by_label("Name", exact=True).fill("by-mouse")
    give(page, "manifest.json", manifest(tmp_path))
    expect(page.get_by_label("Path", exact=True)).to_have_value("tiny-encoder")
    expect(page.get_by_label("Labels", exact=True)).to_have_value("negative, positive")
    page.get_by_label("Max rank", exact=True).fill("8")
    page.get_by_label("Rounds", exact=True).fill("1")
    page.get_by_label("Tags", exact=True).fill("nowhere")
    page.get_by_label("Subspace", exact=True).click()
    page.get_by_role("option", name="mean", exact=True).click()
    page.get_by_role("button", name="Preview").click()
    shown = page.get_by_label("The same as a run.toml; what is not here has its default").input_value()
    spec = parse_run_toml(shown)
    assert (spec.lora.max_rank, spec.policy.tags, spec.strategy.options) == (8, ("nowhere",), {"subspace": "mean"})
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Create and start").click()
    expect(page.get_by_role("heading", name="by-mouse", level=1)).to_be_visible()
    assert site.show_run("by-mouse").phase == RunPhase.ACTIVE


def test_every_wrong_value_is_told_at_its_field(site: Federation, visit: Visitor) -> None:
    page = visit(site, PATH)
    page.get_by_label("Name", exact=True).fill("-bad")
    page.get_by_label("Max rank", exact=True).fill("0")
    page.get_by_label("Quorum", exact=True).fill("2.5")
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_text("must be at least 1 (you wrote 0).")).to_be_visible()
    expect(page.get_by_text(re.compile(r"must be a whole number"))).to_be_visible()
    expect(page.get_by_text("is missing.")).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text="marked with what is wrong")).to_be_visible()


def test_what_is_typed_while_the_page_connects_is_not_undone(site: Federation, visit: Visitor) -> None:
    """The server creates what the fields show: nothing typed early is put back, or arrives in another order."""
    page = visit(site)
    sockets: list[WebSocketRoute] = []

    def hold(socket: WebSocketRoute) -> None:
        sockets.append(socket)

    page.route_web_socket(re.compile("socket.io"), hold)
    page.goto(f"{site.url}{PATH}?like={RUN}")
    name = page.get_by_label("Name", exact=True)
    name.press("End")
    page.keyboard.type("-of-the-first-kind", delay=7)
    sockets[0].connect_to_server()
    until_live(page)
    page.get_by_role("button", name="Preview").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"Preview of {RUN}-of-the-first-kind")
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    expect(name).to_have_value(f"{RUN}-of-the-first-kind")


def test_what_only_the_server_knows_is_told_too(site: Federation, visit: Visitor) -> None:
    page = visit(site, f"{PATH}?like={RUN}")
    expect(page.get_by_label("Name", exact=True)).to_have_value(RUN)
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_role("alert").filter(has_text=re.compile(f"{RUN}.*(already|taken|choose)"))).to_be_visible()
    page.get_by_label("Name", exact=True).fill("other")
    page.get_by_label("Anchor", exact=True).fill("0.5")
    page.get_by_label("Subspace", exact=True).click()
    page.get_by_role("option", name="mean", exact=True).click()
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_role("alert").filter(has_text="'anchor' mixes").first).to_be_visible()
    page.get_by_label("Strategy", exact=True).click()
    expect(page.get_by_role("option", name="flora", exact=True)).to_have_count(0)
    page.get_by_role("option", name="fedrot").click()
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_role("alert").filter(has_text="set policy.min_rank = 16")).to_be_visible()
    page.get_by_label("Strategy", exact=True).click()
    page.get_by_role("option", name="flexlora").click()
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_role("heading", name="other", level=1)).to_be_visible()
    assert site.show_run("other").phase == RunPhase.CREATED


def test_a_run_toml_fills_the_form_or_says_which_line_is_wrong(
    site: Federation, visit: Visitor, tmp_path: Path
) -> None:
    page = visit(site, PATH)
    path = tmp_path / "run.toml"
    path.write_text(run_text("from-file", rounds=7).replace("rounds = 7", "rounds = 0\nqorum = 2"), encoding="utf-8")
    give(page, "run.toml", path)
    wrong = page.get_by_role("alert").filter(has_text="run.toml line")
    expect(wrong).to_contain_text("must be at least 1")
    expect(wrong).to_contain_text('did you mean "quorum"?')
    path.write_text(run_text("from-file", rounds=7), encoding="utf-8")
    give(page, "run.toml", path)
    expect(page.get_by_label("Name", exact=True)).to_have_value("from-file")
    expect(page.get_by_label("Rounds", exact=True)).to_have_value("7")
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_text("The manifest of the base model is missing").first).to_be_visible()
    page.get_by_label("The one of a run").click()
    page.get_by_role("option", name=RUN, exact=True).click()
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_role("heading", name="from-file", level=1)).to_be_visible()


def test_a_file_that_is_no_manifest_is_refused(site: Federation, visit: Visitor, tmp_path: Path) -> None:
    page = visit(site, PATH)
    path = tmp_path / "manifest.json"
    path.write_text('{"format": 1}', encoding="utf-8")
    give(page, "manifest.json", path)
    expect(page.get_by_role("alert").filter(has_text="manifest.json:")).to_be_visible()


def test_viewers_create_nothing(site: Federation, visit: Visitor) -> None:
    page = visit(site, PATH, role=Role.VIEWER, expected=("403 (Forbidden)",))
    expect(page.get_by_role("button", name="Create", exact=True)).to_have_count(0)
