"""The timeline of a round: one row per device, one piece per stage. Pure functions to markup."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.parts import anchor, bar, join, pill
from glora_dashboard.pages.signs import work_sign
from glora_server.coordinator.views import AssignmentView, LiveProgress
from glora_server.rounds.assignment import Assignment, AssignmentPhase

STAGES: Final = ("offered", "downloading", "training", "uploading", "judging")
"""The pieces of a row, in order; each has its own look in site.css."""
_TICKS: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The stretch of time that is shown, in Unix seconds."""

    start: float
    end: float
    deadline: float | None = None

    def place(self, at: float) -> float:
        """Where a moment stands, in per cent of the width."""
        return 100.0 * min(1.0, max(0.0, (at - self.start) / (self.end - self.start)))


def window_of(
    opened_at: float, closed_at: float | None, deadline_at: float | None, now: float, latest: float = 0.0
) -> Window:
    """From the opening to the end, or a little beyond now; the deadline is shown when it is near enough."""
    end = max(opened_at + 1.0, closed_at if closed_at is not None else now, latest)
    shown = deadline_at if deadline_at is not None and deadline_at <= opened_at + 2.5 * (end - opened_at) else None
    if closed_at is None:
        end += 0.03 * (end - opened_at)
    end = max(end, shown or 0.0)
    return Window(start=opened_at, end=end + 0.01 * (end - opened_at), deadline=shown)


def gantt(views: Sequence[AssignmentView], window: Window, *, now: float) -> Markup:
    """The timeline of these assignments."""
    rows = join(row(view, window, now=now) for view in views)
    return Markup(
        '<div class="gantt" role="table" aria-label="Devices of the round and when they did what">'
        '<div class="g-row g-head" role="row"><span role="columnheader">Device</span>'
        '<span class="g-track" role="columnheader"><span class="visually-hidden">Timeline</span>{}</span>'
        '<span role="columnheader">State</span></div>{}</div>'
    ).format(_axis(window), rows)


def legend() -> Markup:
    """What the pieces mean."""
    return Markup('<ul class="g-legend">{}</ul>').format(
        join(Markup('<li><i class="g-piece {}"></i>{}</li>').format(stage, stage) for stage in STAGES)
    )


def row(view: AssignmentView, window: Window, *, now: float) -> Markup:
    """One device."""
    assignment = view.assignment
    tone, word = work_sign(assignment)
    return Markup(
        '<div class="g-row" role="row" data-key="{key}"><span class="g-device" role="cell">{name}'
        '<small>rank {rank}</small></span><span class="g-track" role="cell">{marks}{pieces}'
        '<span class="visually-hidden">{spoken}</span></span>'
        '<span class="g-state" role="cell">{state}{detail}</span></div>'
    ).format(
        key=assignment.id,
        name=anchor(view.device_name, f"/devices/{view.device_name}"),
        rank=assignment.rank,
        marks=_deadline_mark(window),
        pieces=join(_piece(stage, start, end, window) for stage, start, end in pieces(assignment, now=now)),
        spoken=spoken(assignment, now=now),
        state=pill(tone, word),
        detail=_detail(view),
    )


def pieces(assignment: Assignment, *, now: float) -> Iterator[tuple[str, float, float]]:
    """(stage, start, end) of each stage that the device was in; the present one ends now."""
    marks = (
        assignment.offered_at,
        assignment.accepted_at,
        assignment.delivered_at,
        assignment.upload_started_at,
        assignment.received_at,
    )
    known = [(stage, at) for stage, at in zip(STAGES, marks, strict=True) if at is not None]
    ends = [at for _, at in known[1:]] + [assignment.closed_at if assignment.closed_at is not None else now]
    for (stage, start), end in zip(known, ends, strict=True):
        yield stage, start, max(start, end)


def spoken(assignment: Assignment, *, now: float) -> str:
    """The row's timeline in words."""
    parts = (f"{stage} {fmt.span(end - start)}" for stage, start, end in pieces(assignment, now=now))
    return ", ".join(parts)


def _piece(stage: str, start: float, end: float, window: Window) -> Markup:
    left = window.place(start)
    width = max(0.35, window.place(end) - left)
    return Markup('<i class="g-piece {}" style="left:{:.2f}%;width:{:.2f}%" title="{}: {}"></i>').format(
        stage, left, width, stage, fmt.span(end - start)
    )


def _deadline_mark(window: Window) -> Markup:
    if window.deadline is None:
        return Markup("")
    return Markup('<i class="g-deadline" style="left:{:.2f}%" title="Deadline"></i>').format(
        window.place(window.deadline)
    )


def _axis(window: Window) -> Markup:
    length = window.end - window.start
    step = next((tick for tick in _TICKS if length / tick <= 7), _TICKS[-1])
    ticks = [i * step for i in range(int(length // step) + 1)]
    return join(
        Markup('<i class="g-tick{}" style="left:{:.2f}%">{}</i>').format(
            " late" if tick > 0.9 * length else "", window.place(window.start + tick), fmt.span(tick) if tick else "0"
        )
        for tick in ticks
    )


def _detail(view: AssignmentView) -> Markup:
    assignment, progress = view.assignment, view.progress
    if assignment.is_open and progress is not None:
        return Markup('<span class="g-live">{}<small>{}</small></span>').format(
            bar(share_of(progress), label=f"{view.device_name} {progress.phase}"),
            progress_words(progress, besides=work_sign(assignment)[1]),
        )
    if assignment.phase is AssignmentPhase.ACCEPTED_UPDATE:
        rows = fmt.count(assignment.training_rows, "row")
        return Markup("<small>{}, {}</small>").format(rows, fmt.size(view.bytes_up))
    return Markup("<small>{}</small>").format(assignment.message) if assignment.message else Markup("")


def share_of(progress: LiveProgress) -> float | None:
    """How much of its present work the device has done; None where it does not know how much there is."""
    return progress.done / progress.total if progress.total else None


def progress_words(progress: LiveProgress, *, besides: str = "") -> str:
    """ "training, step 40 of 100, loss 0.52" or "uploading, 61 % of 2.4 MB", without the phase if it is `besides`."""
    parts = [progress.phase] if progress.phase != besides else []
    if progress.phase in {"training", "evaluating"}:
        unit = "step" if progress.phase == "training" else "row"
        parts.append(f"{unit} {progress.done:,}" + (f" of {progress.total:,}" if progress.total else ""))
        if progress.loss and math.isfinite(progress.loss):
            parts.append(f"loss {progress.loss:.3f}")
    elif (share := share_of(progress)) is not None:
        parts.append(f"{100 * share:.0f} % of {fmt.size(progress.total)}")
    return ", ".join(parts)
