"""Exports are downloaded and can be read; the audit is filtered and handed out; the system says how it is."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from federation import Federation
from live_site import RUN, add_run
from playwright.sync_api import Page, expect
from visitor import Visitor, pick

from glora_dashboard.run_models import RunAnswer
from glora_server.coordinator.people import Role


def download(page: Page, folder: Path) -> zipfile.ZipFile:
    """Press the button; the archive that comes."""
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download the zip").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return zipfile.ZipFile(path)


@contextlib.contextmanager
def at_rest(site: Federation) -> Iterator[None]:
    """The run is paused and between two rounds while the context is open: no version comes."""
    with site.api() as api:
        api.post(RunAnswer, f"/runs/{RUN}/pause")
        try:
            site.wait_run(RUN, between_rounds, "an ended round")
            yield
        finally:
            api.post(RunAnswer, f"/runs/{RUN}/resume")


def between_rounds(run: RunAnswer) -> bool:
    """Whether no round is open; one that is only planned does not open while the run is paused."""
    return run.round is not None and (run.round.closed_at is not None or run.round.phase == "planned")


def test_a_version_is_downloaded_at_a_rank_and_in_a_flavour(site: Federation, visit: Visitor, tmp_path: Path) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 2, "two rounds")
    page = visit(site, f"/exports?run={RUN}")
    page.get_by_label("Rank", exact=True).fill("4")
    pick(page, "Flavour", "serving (one rank)")
    with download(page, tmp_path) as archive:
        config = json.loads(archive.read("adapter_config.json"))
        names = archive.namelist()
        assert Path(archive.filename or "").name.endswith("-r4-serving.zip")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(names)
    assert (config["peft_type"], config["r"], config["rank_pattern"]) == ("LORA", 4, {})


def test_the_list_of_versions_chooses_what_is_exported(site: Federation, visit: Visitor, tmp_path: Path) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 2, "two rounds")
    with at_rest(site):
        page = visit(site, f"/exports?run={RUN}")
        older = page.get_by_role("button", name=re.compile("Export version")).nth(1)
        number = re.sub(r"\D", "", older.get_attribute("aria-label") or "")
        older.click()
        expect(page.get_by_label("Version", exact=True)).to_have_value(number)
    with download(page, tmp_path) as archive:
        assert f"-v{number}-" in (archive.filename or "")
    page.get_by_text("How to load it").click()
    lines = page.get_by_label("In Python, after unpacking into the folder adapter").input_value().splitlines()
    assert len(lines) == 3
    compile("\n".join(lines), "loading", "exec")


def test_quality_stands_beside_the_rank_it_was_measured_at(site: Federation, visit: Visitor) -> None:
    with at_rest(site):
        page = visit(site, f"/exports?run={RUN}")
        page.get_by_label("Rank", exact=True).fill("8")
        expect(page.get_by_text("No device measured version")).to_be_visible()
    expect(page.get_by_text("Accuracy at rank 8")).to_be_visible()
    page.get_by_label("Rank", exact=True).fill("7")
    expect(page.get_by_text(re.compile("was not measured at this rank; it was at"))).to_be_visible()


def test_what_cannot_be_exported_is_said(site: Federation, visit: Visitor) -> None:
    page = visit(site, f"/exports?run={RUN}", expected=("422", "400"))
    page.get_by_label("Version", exact=True).fill("9999")
    expect(page.get_by_role("alert").filter(has_text="Version 9999 cannot be exported")).to_be_visible()
    page.reload()
    page.get_by_label("Rank", exact=True).fill("100")
    page.get_by_role("button", name="Download the zip").click()
    expect(page.get_by_text(re.compile("an export has rank 1 to 16"))).to_be_visible()


def test_viewers_see_versions_and_download_nothing(site: Federation, visit: Visitor) -> None:
    site.wait_run(RUN, lambda run: run.rounds_done >= 1, "a round")
    page = visit(site, f"/exports?run={RUN}", role=Role.VIEWER)
    expect(page.get_by_role("region", name="Versions").locator("tbody tr").first).to_contain_text("Version")
    expect(page.get_by_role("button", name=re.compile("Download|Export version"))).to_have_count(0)


def test_a_run_without_a_version_says_the_next_step(site: Federation, visit: Visitor) -> None:
    add_run(site, "not-started", start=False)
    page = visit(site, "/exports?run=not-started")
    page.get_by_role("link", name="Go to the run").click()
    expect(page.get_by_role("heading", name="not-started", level=1)).to_be_visible()


def test_without_runs_there_is_nothing_to_export(bare_site: Federation, visit: Visitor) -> None:
    page = visit(bare_site, "/exports")
    expect(page.get_by_role("link", name="Create a run")).to_have_attribute("href", "/runs/new")


def test_the_audit_is_filtered_readable_and_handed_out(site: Federation, visit: Visitor, tmp_path: Path) -> None:
    with site.api() as api:
        for rank in (2, 1):
            api.patch(RunAnswer, f"/runs/{RUN}/policy", {"changes": {"min_rank": rank}})
    page = visit(site, "/audit")
    rows = page.get_by_role("region", name="Audit").locator("tbody tr")
    pick(page, "What", "runs")
    page.get_by_label("To what (the whole name)").fill(RUN)
    page.get_by_label("Who (the whole name)").fill("admin.token")
    edited = rows.filter(has_text="run.edit").first
    expect(edited).to_contain_text("min rank 2 → 1")
    expect(rows.filter(has_text="token.create")).to_have_count(0)
    link = page.get_by_role("link", name="Download these rows as JSON")
    expect(link).to_have_attribute("href", re.compile("actor=admin.token"))
    with page.expect_download() as waiting:
        link.click()
    waiting.value.save_as(tmp_path / "audit.json")
    told = json.loads((tmp_path / "audit.json").read_text())
    assert {(row["actor"], row["target"]) for row in told} == {("admin.token", RUN)}
    assert {"min_rank": 1} in [row["after"] for row in told if row["action"] == "run.edit"]
    page.get_by_label("Who (the whole name)").fill("nobody")
    expect(page.get_by_text("Nothing like that was done.")).to_be_visible()


def test_the_audit_between_two_times_in_the_viewers_zone(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/audit")
    rows = page.get_by_role("region", name="Audit").locator("tbody tr")
    expect(rows.first).to_be_visible()
    pick(page, "When", "between two times")
    page.get_by_label("Until").fill("2020-01-01T00:00")
    page.get_by_label("Until").press("Tab")
    expect(page.get_by_text("Nothing like that was done.")).to_be_visible()
    # Berlin is an hour ahead of UTC on that day.
    expect(page.get_by_role("link", name="Download these rows as JSON")).to_have_attribute(
        "href", re.compile(r"until=1577833200\.000")
    )


def test_the_audit_is_not_for_viewers(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/audit", role=Role.VIEWER, expected=("403 (Forbidden)",))
    expect(page.get_by_role("region", name="Audit")).to_have_count(0)


def test_the_system_says_how_its_parts_are(site: Federation, visit: Visitor) -> None:
    page = visit(site, "/system", role=Role.VIEWER)
    for part in ("database", "worker", "ports"):
        expect(page.locator(".checks li", has_text=part)).to_contain_text("works")
    expect(page.locator(".page")).to_contain_text(f"port {site.ports.enrolment}")
    expect(page.locator(".page")).to_contain_text("SQLite")
    expect(page.get_by_role("progressbar", name="Disk")).to_be_visible()
    assert site.system().authority_pin in page.content()
