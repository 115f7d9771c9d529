from __future__ import annotations

from dataclasses import replace

import pytest

from glora_dashboard.pages import gantt
from glora_dashboard.pages.signs import ASSIGNMENT_SIGNS
from glora_server.coordinator.views import AssignmentView, LiveProgress
from glora_server.rounds.assignment import Assignment, AssignmentKind, AssignmentPhase
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_wire.errors import Reason

T = 1000.0
OFFERED = Assignment(
    id=AssignmentId("a1"),
    run_id=RunId("r"),
    round_id=RoundId("round"),
    device_id=DeviceId("d"),
    kind=AssignmentKind.TRAIN,
    rank=8,
    version_id=VersionId("v"),
    offered_at=T,
    deadline_at=T + 60,
)
ACCEPTED = replace(
    OFFERED,
    phase=AssignmentPhase.ACCEPTED_UPDATE,
    accepted_at=T + 1,
    delivered_at=T + 3,
    upload_started_at=T + 20,
    received_at=T + 24,
    closed_at=T + 25,
    training_rows=400,
)


def view(assignment: Assignment, progress: LiveProgress | None = None, name: str = "pi-1") -> AssignmentView:
    return AssignmentView(assignment=assignment, device_name=name, progress=progress)


def test_a_finished_device_went_through_every_stage() -> None:
    assert list(gantt.pieces(ACCEPTED, now=T + 99)) == [
        ("offered", T, T + 1),
        ("downloading", T + 1, T + 3),
        ("training", T + 3, T + 20),
        ("uploading", T + 20, T + 24),
        ("judging", T + 24, T + 25),
    ]


def test_the_present_stage_lasts_until_now() -> None:
    training = replace(OFFERED, phase=AssignmentPhase.DELIVERED, accepted_at=T + 1, delivered_at=T + 3)
    assert list(gantt.pieces(training, now=T + 9))[-1] == ("training", T + 3, T + 9)


def test_a_stage_that_was_skipped_is_absent() -> None:
    """A device may pull before its word "accepted" arrives."""
    fast = replace(OFFERED, phase=AssignmentPhase.UPLOADING, upload_started_at=T + 4)
    assert [stage for stage, _, _ in gantt.pieces(fast, now=T + 5)] == ["offered", "uploading"]


def test_clocks_that_go_back_make_no_negative_pieces() -> None:
    assert all(end >= start for _, start, end in gantt.pieces(OFFERED, now=T - 50))


def test_every_piece_lies_within_the_window() -> None:
    window = gantt.window_of(T, T + 25, T + 60, now=T + 500)
    assert window.deadline == T + 60
    assert 0 <= window.place(T - 10) == 0.0
    assert window.place(T + 9999) == 100.0
    assert window.place(T + 10) < window.place(T + 20) < 100.0


def test_a_deadline_far_away_does_not_squeeze_the_timeline() -> None:
    window = gantt.window_of(T, None, T + 86400, now=T + 60)
    assert window.deadline is None
    assert window.end < T + 70


def test_a_window_has_a_length_even_at_the_very_start() -> None:
    window = gantt.window_of(T, None, None, now=T)
    assert window.end > window.start


def test_what_devices_are_called_and_say_is_escaped() -> None:
    refused = replace(
        OFFERED,
        phase=AssignmentPhase.DECLINED,
        reason=Reason.INTERNAL,
        message="<img src=x onerror=alert(1)>",
        closed_at=T,
    )
    markup = str(gantt.gantt([view(refused, name="<script>")], gantt.window_of(T, None, None, now=T), now=T))
    assert "<script>" not in markup
    assert "<img" not in markup
    assert "&lt;img src=x" in markup


@pytest.mark.parametrize("phase", list(AssignmentPhase))
def test_every_phase_has_a_word_and_a_sign(phase: AssignmentPhase) -> None:
    tone, word = ASSIGNMENT_SIGNS[phase]
    markup = str(gantt.row(view(replace(OFFERED, phase=phase)), gantt.window_of(T, None, None, now=T + 5), now=T + 5))
    assert f'<span class="pill {tone}">' in markup
    assert word in markup


def test_progress_in_words() -> None:
    training = LiveProgress(phase="training", done=40, total=100, loss=0.5234, at=T)
    assert gantt.progress_words(training) == "training, step 40 of 100, loss 0.523"
    assert gantt.progress_words(training, besides="training") == "step 40 of 100, loss 0.523"
    uploading = LiveProgress(phase="uploading", done=610_000, total=1_000_000, loss=0.0, at=T)
    assert gantt.progress_words(uploading) == "uploading, 61 % of 1.0 MB"
    loading = LiveProgress(phase="loading", done=0, total=0, loss=0.0, at=T)
    assert gantt.progress_words(loading) == "loading"
    assert gantt.share_of(loading) is None
