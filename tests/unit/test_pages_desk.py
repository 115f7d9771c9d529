"""What the pages of devices, tokens and the audit say, without a browser."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from markupsafe import Markup
from storage_records import NOW, device, token

from glora_dashboard.pages.audit_parts import action_words, audit_table, change
from glora_dashboard.pages.device_parts import (
    abilities,
    agreement,
    devices_table,
    duties,
    now_doing,
    presence,
    reliability,
)
from glora_dashboard.pages.enrolment import token_state
from glora_dashboard.pages.forms import tags_of, whole
from glora_dashboard.pages.lists import wide_table
from glora_server.coordinator.model import AuditEntry, DeviceState, Profile
from glora_server.coordinator.views import DeviceView
from glora_server.coordinator.views_history import Contribution, DeviceLine
from glora_server.rounds.ids import DeviceId, RunId, VersionId

NASTY = "<img src=x onerror=alert(1)>"
MADE = Contribution(
    version_id=VersionId("v"),
    run_id=RunId("r"),
    number=3,
    device_id=DeviceId("d"),
    at=NOW,
    share=0.25,
    rows=100,
    update_norm=1.5,
    capture=0.875,
    cosine=0.5,
    deviation=0.3,
    outlier=False,
)


def line(name: str, state: DeviceState = DeviceState.APPROVED, **changes: object) -> DeviceLine:
    view = DeviceView(device=device(name, state=state, **changes), online=False)
    return DeviceLine(device=view, reliability=None, agreement=None)


def entry(**changes: object) -> AuditEntry:
    plain = AuditEntry(at=NOW, actor="ada", origin="192.0.2.7", action="run.edit", target="demo")
    return replace(plain, **changes)  # type: ignore[arg-type]  # fields by name


def test_what_devices_say_about_themselves_is_text_and_nothing_else() -> None:
    profile = Profile(platform=NASTY, software_version=NASTY, accelerators=(NASTY,))
    shown = devices_table((line("pi", profile=profile, tags=(NASTY,)),), operator=True)
    assert "<img" not in shown
    assert shown.count("&lt;img") >= 4


def test_a_device_that_measures_what_it_sent_says_so() -> None:
    view = DeviceView(device=device("pi"), online=True, measuring="demo")
    assert "measuring" in presence(view)
    assert Markup(now_doing(view)).striptags() == "For demo: measuring what it has sent."


def test_only_operators_approve_and_only_what_waits() -> None:
    lines = (line("waits", DeviceState.PENDING), line("works"))
    assert devices_table(lines, operator=True).count('data-act="approve"') == 1
    assert "data-act" not in devices_table(lines, operator=False)
    assert "data-act" not in devices_table((line("works"),), operator=True)


def test_an_outlier_is_marked_with_a_sign_and_a_word() -> None:
    shown = agreement(replace(MADE, outlier=True, deviation=4.25))
    assert "<svg" in shown
    assert "outlier</span><small>cosine 0.50, 4.2 deviations below the others; " in shown
    assert "outlier" not in agreement(MADE)


@pytest.mark.parametrize("made", [None, replace(MADE, cosine=None, capture=None)])
def test_agreement_that_nobody_measured_is_said_so(made: Contribution | None) -> None:
    assert "not measured" in agreement(made)


def test_low_reliability_has_a_sign_besides_its_colour() -> None:
    assert "<svg" in reliability(0.5)
    assert "<svg" not in reliability(0.9)
    assert "no round yet" in reliability(None)


def test_abilities_in_a_few_words() -> None:
    profile = Profile(cpu_count=4, memory_bytes=8_000_000_000, trains=True, evaluates=True)
    assert abilities(profile) == "4 cores · 8.0 GB · trains and evaluates"
    assert abilities(replace(profile, accelerators=("H200",), cpu_count=0)).startswith("H200 · ")
    assert duties(Profile(trains=False, evaluates=True)) == "evaluates"


@pytest.mark.parametrize("state", list(DeviceState))
def test_every_state_is_told_in_a_sentence(state: DeviceState) -> None:
    assert now_doing(line("pi", state).device).endswith(".")


def test_a_tokens_state_says_why_it_is_of_no_use() -> None:
    fresh = token()
    assert token_state(fresh, NOW) == ("good", "valid")
    assert token_state(fresh, fresh.expires_at)[1] == "expired"
    assert token_state(replace(fresh, uses=fresh.max_uses), NOW)[1] == "used up"
    assert token_state(replace(fresh, uses=fresh.max_uses, revoked=True), NOW)[1] == "revoked"


def test_a_change_reads_from_old_to_new() -> None:
    shown = change(entry(before_json='{"quorum": 1}', after_json='{"quorum": 2}', details_json='{"reason": "few"}'))
    assert "<del>1</del>" in shown
    assert "<b>2</b>" in shown
    assert "few" in shown


def test_a_change_shows_times_lists_and_nothing_as_people_read_them() -> None:
    after = {"expires_at": NOW, "tags": ["a", "b"], "approve": True, "before": None, "phase": NASTY}
    shown = change(entry(after_json=json.dumps(after)))
    assert "<g-time" in shown
    assert "a, b" in shown
    assert "yes" in shown
    assert "<img" not in shown


def test_the_audit_leads_to_what_was_changed() -> None:
    shown = audit_table(
        (entry(), entry(action="round.extend", target="demo/3"), entry(action="device.revoke", target="pi"))
    )
    for address in ("/runs/demo", "/runs/demo/rounds/3", "/devices/pi"):
        assert f'href="{address}"' in shown
    assert action_words("some.thing") == "some.thing"


def test_cells_are_labelled_for_narrow_screens() -> None:
    shown = wide_table(("Name", "Rank", ""), [("pi", "4", "")], label="Devices")
    assert shown.count('data-label="Rank"') == 1
    assert '<span class="visually-hidden">Actions</span>' in shown


def test_tags_and_whole_numbers_as_people_write_them() -> None:
    assert tags_of(" lab, edge,,lab ") == ("lab", "edge")
    assert whole(4.0) == 4
    assert whole(4.5) is None
    assert whole(None) is None
