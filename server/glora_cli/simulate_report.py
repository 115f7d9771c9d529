"""What people read of a simulation: the table of the last round, for the terminal, for documents and as a page."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from rich.table import Table

from glora_cli.output import size
from glora_cli.simulate_folder import writing
from glora_cli.simulate_results import Result
from glora_cli.simulate_spec import SimSpec, StrategyEntry

PAGE: Final = "report.html"
SUMMARY: Final = "summary.json"
_MISSING: Final = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean and standard deviation (n − 1; null for one value) over seeds."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A strategy after the last round; accuracies are shares of one.

    `own` is the mean over the devices, each measured at its own rank; `by_rank` has every rank that was read out.
    `ahead` is `server` less that of the first strategy, seed by seed (its spread is that of the differences).
    `seconds` and bytes are those of a whole run with one seed.
    """

    strategy: str
    server_rank: int
    server: Spread | None
    own: Spread | None
    by_rank: Mapping[int, Spread]
    ahead: Spread | None
    loss: Spread | None
    truncation_error: Spread | None
    bytes_up: int
    bytes_down: int
    seconds: float
    lost: int
    """Updates that diverged or were refused, in all seeds."""


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and deviation of the values that are there; None when there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(mean=fmean(known), deviation=stdev(known) if len(known) > 1 else None, count=len(known))


def summaries(spec: SimSpec, rows: Sequence[Result]) -> tuple[Summary, ...]:
    """One summary for each strategy, in the order of the description."""
    first = _by_seed(spec, rows, spec.strategies[0])
    return tuple(_summary(spec, rows, entry, first) for entry in spec.strategies)


def _summary(spec: SimSpec, rows: Sequence[Result], entry: StrategyEntry, first: Mapping[int, float]) -> Summary:
    ours = [row for row in rows if row.strategy == entry.title]
    last = [row for row in ours if row.round == spec.rounds]
    top = [row for row in last if row.rank == row.server_rank]
    own = _by_seed(spec, rows, entry)
    rounds = list({(row.seed, row.round): row for row in ours}.values())
    seeds = max(1, len({row.seed for row in ours}))
    return Summary(
        strategy=entry.title,
        server_rank=spec.server_rank(entry),
        server=spread(row.accuracy for row in top),
        own=spread(_own_rank_accuracy([row for row in last if row.seed == seed]) for seed in spec.seeds),
        by_rank={
            rank: found
            for rank in sorted({row.rank for row in last})
            if (found := spread(row.accuracy for row in last if row.rank == rank)) is not None
        },
        ahead=spread(own[seed] - first[seed] for seed in own if seed in first),
        loss=spread(row.loss for row in top),
        truncation_error=spread(row.truncation_error for row in top),
        bytes_up=sum(row.bytes_up for row in rounds) // seeds,
        bytes_down=sum(row.bytes_down for row in rounds) // seeds,
        seconds=sum(row.seconds for row in rounds) / seeds,
        lost=sum(row.failed + row.rejected for row in rounds),
    )


def _by_seed(spec: SimSpec, rows: Sequence[Result], entry: StrategyEntry) -> dict[int, float]:
    """Accuracy at the server's rank after the last round, by seed."""
    return {
        row.seed: row.accuracy
        for row in rows
        if row.strategy == entry.title
        and row.round == spec.rounds
        and row.rank == row.server_rank
        and row.accuracy is not None
    }


def _own_rank_accuracy(rows: Sequence[Result]) -> float | None:
    measured = [(row.devices, row.accuracy) for row in rows if row.devices and row.accuracy is not None]
    total = sum(devices for devices, _ in measured)
    return sum(devices * accuracy for devices, accuracy in measured) / total if total else None


def columns(found: Sequence[Summary]) -> list[str]:
    """Headings of the table."""
    return [
        "strategy",
        "at R",
        "at own rank",
        *(f"r={rank}" for rank in _ranks(found)),
        "vs first",
        "loss",
        "truncation",
        "up",
        "down",
        "seconds",
    ]


def cells(found: Sequence[Summary]) -> list[list[str]]:
    """The table's rows: accuracies in per cent, mean ± sd over seeds."""
    return [
        [
            one.strategy + (f" ({one.lost} updates lost)" if one.lost else ""),
            _percent(one.server),
            _percent(one.own),
            *(_percent(one.by_rank.get(rank)) for rank in _ranks(found)),
            _MISSING if number == 0 else _percent(one.ahead, signed=True),
            _number(one.loss),
            _number(one.truncation_error),
            size(one.bytes_up),
            size(one.bytes_down),
            f"{one.seconds:.0f}",
        ]
        for number, one in enumerate(found)
    ]


def final_table(spec: SimSpec, found: Sequence[Summary]) -> Table:
    """The last round for the terminal."""
    title = f"{spec.name}: after {spec.rounds} rounds, accuracy in % as mean ± sd over {_seeds(spec)}"
    table = Table(*columns(found), title=title, box=None, header_style="bold", pad_edge=False)
    for row in cells(found):
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def markdown_table(found: Sequence[Summary]) -> str:
    """The last round for a document."""
    heads = columns(found)
    lines = [heads, ["---"] * len(heads), *cells(found)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary_json(found: Sequence[Summary]) -> str:
    """The summaries for scripts."""
    return json.dumps([asdict(one) for one in found], indent=2)


def write_report(spec: SimSpec, rows: Sequence[Result], folder: Path, *, plots: bool) -> None:
    """Write summary.json, summary.md and, with `plots`, PNG files and one page that holds everything.

    Raises REQUEST_INVALID when the folder cannot be written.
    """
    found = summaries(spec, rows)
    _write(folder / SUMMARY, summary_json(found) + "\n")
    _write(folder / "summary.md", markdown_table(found))
    if plots:
        from glora_cli.simulate_plots import draw_all

        pictures = draw_all(spec, rows, folder)
        _write(folder / PAGE, _page(spec, found, pictures))


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.write_text(text, encoding="utf-8")


def _page(spec: SimSpec, found: Sequence[Summary], pictures: Sequence[tuple[str, Path]]) -> str:
    name = html.escape(spec.name)
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in columns(found))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in cells(found)
    )
    images = "".join(
        f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"><figcaption>{html.escape(title)}</figcaption></figure>\n'
        for title, path in pictures
    )
    settings = html.escape(json.dumps(spec.model_dump(mode="json", exclude={"strategies"}), indent=2))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1c2430 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ padding: .3rem .8rem; border-bottom: 1px solid #dde3ea; text-align: right; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left }}
figure {{ margin: 2rem 0 }} img {{ max-width: 100% }} figcaption {{ color: #5a6675 }} pre {{ color: #5a6675 }}
</style>
<h1>{name}</h1>
<p>After {spec.rounds} rounds; accuracy in per cent on held-out rows, mean ± standard deviation over
{_seeds(spec)}. "At own rank": mean over the devices, each measured at its own rank. "vs first": difference
to the first strategy, seed by seed.</p>
<table><thead><tr>{heads}</tr></thead><tbody>
{body}</tbody></table>
{images}<details><summary>Settings</summary><pre>{settings}</pre></details>
</html>
"""


def _seeds(spec: SimSpec) -> str:
    return "1 seed" if len(spec.seeds) == 1 else f"{len(spec.seeds)} seeds"


def _ranks(found: Sequence[Summary]) -> list[int]:
    return sorted({rank for one in found for rank in one.by_rank})


def _percent(value: Spread | None, *, signed: bool = False) -> str:
    if value is None:
        return _MISSING
    mean = f"{100 * value.mean:+.1f}" if signed else f"{100 * value.mean:.1f}"
    return mean if value.deviation is None else f"{mean} ± {100 * value.deviation:.1f}"


def _number(value: Spread | None) -> str:
    return _MISSING if value is None or not math.isfinite(value.mean) else f"{value.mean:.3g}"
