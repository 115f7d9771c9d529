"""What the demo tells at its end: for people as text, for scripts as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from glora_cli.output import share, size, span
from glora_dashboard.run_models import ScoreAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAccuracy:
    """Share of held-out rows that a version read out at a rank gets right."""

    rank: int
    accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionAccuracy:
    """What the evaluating device measured of the state after `round` rounds; 0 = before training."""

    round: int
    ranks: tuple[RankAccuracy, ...]

    def at(self, rank: int) -> float | None:
        """Accuracy at a rank; None where it was not measured."""
        return next((found.accuracy for found in self.ranks if found.rank == rank), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceShare:
    """A training device and its part of the data."""

    name: str
    rank: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Payload bytes between the server and all devices, the evaluating one included, as the server counted them."""

    down: int
    up: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that a finished demo has to say."""

    run: str
    strategy: str
    model: str
    labels: tuple[str, ...]
    devices: tuple[DeviceShare, ...]
    held_out_rows: int
    versions: tuple[VersionAccuracy, ...]
    server_rank: int
    traffic: Traffic
    seconds: float
    adapter: str
    """Folder of the exported adapter."""
    load: tuple[str, ...]
    """The lines of Python that load it."""
    folder: str | None
    """Where everything else was kept; None when it was removed."""

    @property
    def before(self) -> float | None:
        """Accuracy at the server's rank before training."""
        return self.versions[0].at(self.server_rank)

    @property
    def after(self) -> float | None:
        """Accuracy at the server's rank at the end."""
        return self.versions[-1].at(self.server_rank)

    def to_json(self) -> str:
        """The report for scripts."""
        document = dataclasses.asdict(self) | {"accuracy_before": self.before, "accuracy_after": self.after}
        return json.dumps(document, indent=2, ensure_ascii=False)


def version_accuracies(scores: Sequence[ScoreAnswer]) -> tuple[VersionAccuracy, ...]:
    """What evaluating devices measured, by version and rank, both rising."""
    by_version: dict[int, list[RankAccuracy]] = {}
    for score in sorted(scores, key=lambda score: (score.version_number, score.rank)):
        if score.phase == "version":
            found = RankAccuracy(rank=score.rank, accuracy=score.accuracy)
            by_version.setdefault(score.version_number, []).append(found)
    return tuple(VersionAccuracy(round=number, ranks=tuple(ranks)) for number, ranks in by_version.items())


def load_lines(model: Path, labels: int, adapter: Path) -> tuple[str, ...]:
    """Three lines of Python that give the trained model."""
    return (
        "from peft import PeftModel; from transformers import AutoModelForSequenceClassification as Model",
        f"base = Model.from_pretrained({str(model)!r}, num_labels={labels})",
        f"model = PeftModel.from_pretrained(base, {str(adapter)!r})",
    )


def report_page(report: Report) -> RenderableType:
    """The report for people."""
    parts: list[RenderableType] = [
        Text(""),
        Text(
            f"Held-out accuracy ({report.held_out_rows} rows that no device trained on; guessing gives "
            f"{share(1 / len(report.labels))})",
            style="bold",
        ),
        _accuracies(report),
        Text(""),
        Text(
            f"From {share(report.before)} to {share(report.after)} at the server's rank {report.server_rank}, with "
            f"{report.strategy}, in {span(report.seconds)}."
        ),
        Text(
            f"{size(report.traffic.down)} of adapters went down to devices, {size(report.traffic.up)} of updates came "
            "up. Their rows never left them: "
            + ", ".join(f"{device.name} (rank {device.rank}) {device.rows}" for device in report.devices)
            + "."
        ),
        Text(""),
        Text(f"The adapter, read out at rank {report.server_rank}, lies in {report.adapter}. Load it with:"),
        *(Text(f"  {line}", style="cyan", no_wrap=True, overflow="ignore") for line in report.load),
    ]
    if report.folder is not None:
        parts.append(Text(f"Everything else (run.toml, rows of every device, logs, database): {report.folder}"))
    return Group(*parts)


def _accuracies(report: Report) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("")
    ranks = [found.rank for found in report.versions[-1].ranks]
    for rank in ranks:
        table.add_column(f"rank {rank}", justify="right", style="bold" if rank == report.server_rank else "")
    for version in report.versions:
        name = "before" if version.round == 0 else f"round {version.round}"
        table.add_row(name, *(share(version.at(rank)) for rank in ranks))
    return table
