"""A run on the screen: one line for lists, a page for `show` and `watch`."""

from __future__ import annotations

import time
from typing import Final

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from glora_cli.output import console, share, size, span
from glora_dashboard.models import AssignmentAnswer
from glora_dashboard.run_models import RoundAnswer, RunAnswer, ScoreAnswer

ENDED: Final = frozenset({"completed", "failed", "aborted"})
_BAR_WIDTH: Final = 20
_COLOURS: Final = {
    "accepted_update": "green",
    "completed": "green",
    "rejected": "red",
    "failed": "red",
    "expired": "yellow",
    "declined": "yellow",
}


def standing(run: RunAnswer) -> str:
    """Where a run stands, in one line."""
    if run.phase in ENDED or run.round is None:
        return run.message or run.waiting or f"{run.rounds_done} of {run.rounds} rounds"
    return f"{_place(run.round, run.rounds)}: {run.waiting}" if run.waiting else round_line(run.round, run.rounds)


def round_line(round_: RoundAnswer, rounds: int) -> str:
    """Where a round stands, in one line."""
    parts = [f"{_place(round_, rounds)}: {round_.phase}"]
    if round_.devices:
        parts.append(f"{round_.accepted} of {round_.target or round_.devices} updates")
    if round_.phase in {"collecting", "grace"} and round_.deadline_at is not None:
        parts.append(f"deadline in {span(round_.deadline_at - time.time())}")
    if round_.message:
        parts.append(round_.message)
    return ", ".join(parts)


def _place(round_: RoundAnswer, rounds: int) -> str:
    attempt = f", attempt {round_.attempt}" if round_.attempt > 1 else ""
    return f"round {round_.number} of {rounds}{attempt}"


def device_line(assignment: AssignmentAnswer) -> str:
    """What a device is doing, in one line."""
    report = assignment.progress
    words = [f"{assignment.device} (rank {assignment.rank}): {assignment.phase}"]
    if report is not None and report.phase and assignment.closed_at is None:
        words.append(f"{report.phase} {report.done}/{report.total}" if report.total else report.phase)
    if assignment.reason:
        words.append(f"{assignment.reason}: {assignment.message}")
    return ", ".join(words)


def page(run: RunAnswer) -> RenderableType:
    """A run as `show` prints it and `watch` keeps it up to date."""
    parts: list[RenderableType] = [
        Text(f"{run.name}  {run.phase}  {run.rounds_done} of {run.rounds} rounds  {run.strategy}, rank {run.max_rank}"),
        Text(f"devices: {run.online_devices} of {run.eligible_devices} eligible are there", style="dim"),
    ]
    if run.waiting or run.message:
        parts.append(Text(run.message or run.waiting, style="red" if run.phase == "failed" else "yellow"))
    if run.round is not None:
        parts += [Text(""), Text(round_line(run.round, run.rounds), style="bold")]
        parts += [_devices(run.round.assignments)] if run.round.assignments else []
    if run.evaluations:
        parts += [Text(""), Text("evaluating", style="bold"), _devices(run.evaluations)]
    if run.scores:
        parts += [Text(""), _scores(run.scores)]
    return Group(*parts)


def print_run(run: RunAnswer) -> None:
    """Print a run."""
    console().print(page(run))


def _devices(assignments: list[AssignmentAnswer]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("DEVICE", "RANK", "PHASE", "DOING", "", "DOWN", "UP", "WHY"):
        table.add_column(heading)
    for assignment in assignments:
        report = assignment.progress if assignment.closed_at is None else None
        table.add_row(
            Text(assignment.device),
            str(assignment.rank),
            Text(assignment.phase, style=_COLOURS.get(assignment.phase, "")),
            Text(report.phase if report else ""),
            ProgressBar(total=report.total, completed=report.done, width=_BAR_WIDTH) if report and report.total else "",
            size(assignment.bytes_down),
            size(assignment.bytes_up),
            Text(assignment.message),
        )
    return table


def _scores(scores: list[ScoreAnswer]) -> Table:
    """Accuracy by version (rows) and rank (columns): as evaluators measured it, else as devices received it."""
    found = {(s.version_number, s.rank): s for s in scores if s.phase == "before"}
    found |= {(s.version_number, s.rank): s for s in scores if s.phase == "version"}
    ranks = sorted({rank for _, rank in found})
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("ACCURACY")
    for rank in ranks:
        table.add_column(f"rank {rank}", justify="right")
    for version in sorted({version for version, _ in found}):
        cells = [found.get((version, rank)) for rank in ranks]
        table.add_row(f"version {version}", *(share(cell.accuracy) if cell else "-" for cell in cells))
    return table
