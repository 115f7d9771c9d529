"""The command: results that are kept, tables and plots of known numbers, and going on where it was cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_encoder import save_tiny_encoder, write_texts
from typer.testing import CliRunner

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from glora_cli import simulate
from glora_cli.main import SUBCOMMANDS, load
from glora_cli.simulate_plots import draw_all, require_matplotlib
from glora_cli.simulate_report import Spread, cells, columns, markdown_table, spread, summaries
from glora_cli.simulate_results import Result, append_results, read_results, wanted_rows
from glora_cli.simulate_spec import SimSpec, parse_sim_toml
from glora_wire.errors import GloraError, Reason

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

TOML = """\
name = "tiny"
seeds = [0, 1]
rounds = 1

[model]
path = "{model}"

[data]
train = "train.jsonl"
held_out = "held_out.jsonl"
min_rows = 8

[devices]
count = 2
ranks = [1, 2]

[lora]
max_rank = 2

[training]
steps = 1
batch_size = 4
max_length = 16

[[strategies]]
name = "glora"

[[strategies]]
name = "fedit"
"""


def _row(strategy: str, seed: int, rank: int, accuracy: float | None, *, number: int = 1) -> Result:
    return Result(
        settings=strategy,
        strategy=strategy,
        seed=seed,
        round=number,
        rank=rank,
        server_rank=2,
        devices=1,
        accuracy=accuracy,
        loss=None if accuracy is None else 1 - accuracy,
        training_loss=0.5,
        truncation_error=0.25,
        captured_energy=0.9,
        eigengap=0.1,
        mean_norm=1.0,
        sigma=(1.0, 0.5),
        coverage=(1.0, 0.5),
        updates=2,
        failed=1,
        rejected=0,
        bytes_up=1024,
        bytes_down=2048,
        seconds=3.0,
        aggregation_seconds=0.1,
    )


@pytest.fixture
def spec() -> SimSpec:
    return parse_sim_toml(TOML.format(model="demo"))


@pytest.fixture
def rows() -> tuple[Result, ...]:
    scores = {("glora", 0): (0.6, 0.8), ("glora", 1): (0.7, 0.9), ("fedit", 0): (0.4, 0.7), ("fedit", 1): (0.5, 0.6)}
    return tuple(_row(name, seed, rank, pair[rank - 1]) for (name, seed), pair in scores.items() for rank in (1, 2))


def test_a_summary_is_mean_and_deviation_over_seeds(spec: SimSpec, rows: tuple[Result, ...]) -> None:
    glora, fedit = summaries(spec, rows)
    _close(glora.server, mean=0.85, deviation=0.05 * 2**0.5)
    assert glora.own is not None
    assert glora.own.mean == pytest.approx((0.6 + 0.8 + 0.7 + 0.9) / 4)
    assert fedit.by_rank[1].mean == pytest.approx(0.45)
    # Seed by seed 0.7 - 0.8 and 0.6 - 0.9: the spread of the differences, not that of the scores.
    _close(fedit.ahead, mean=-0.2, deviation=0.1 * 2**0.5)
    assert (fedit.bytes_up, fedit.bytes_down, fedit.seconds, fedit.lost) == (1024, 2048, 3.0, 2)


def _close(found: Spread | None, *, mean: float, deviation: float) -> None:
    assert found is not None
    assert found.count == 2
    assert found.mean == pytest.approx(mean)
    assert found.deviation == pytest.approx(deviation)


def test_the_spread_of_nothing_and_of_one() -> None:
    assert spread([None]) is None
    assert spread([0.5, None]) == Spread(mean=0.5, deviation=None, count=1)


def test_tables_say_what_the_summaries_say(spec: SimSpec, rows: tuple[Result, ...]) -> None:
    found = summaries(spec, rows)
    table = dict(zip(columns(found), cells(found)[1], strict=True))
    assert table["strategy"] == "fedit (2 updates lost)"
    assert (table["at R"], table["r=1"], table["vs first"]) == ("65.0 ± 7.1", "45.0 ± 7.1", "-20.0 ± 14.1")
    lines = markdown_table(found).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


def test_plots_are_drawn_of_every_kind_of_row(spec: SimSpec, rows: tuple[Result, ...], tmp_path: Path) -> None:
    gap = replace(rows[0], accuracy=None, loss=None, truncation_error=None, sigma=())
    for found in (rows, (gap,)):
        plots = draw_all(spec, found, tmp_path)
        assert [path.name for _, path in plots] == ["accuracy.png", "ranks.png", "truncation.png", "spectra.png"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for _, path in plots)


def test_a_missing_matplotlib_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(GloraError, match=r"glora\[demo\].*--no-plots"):
        require_matplotlib()


def test_rows_come_back_from_the_file(rows: tuple[Result, ...], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_results(path, rows[:3])
    append_results(path, rows[3:])
    assert read_results(path) == rows


def test_a_pair_that_was_cut_off_is_made_again(spec: SimSpec, rows: tuple[Result, ...], tmp_path: Path) -> None:
    longer = spec.model_copy(update={"rounds": 2})
    finished = (*rows, *(replace(row, round=2) for row in rows if row.strategy == "glora"))
    kept = wanted_rows(finished, longer, {"glora": "glora", "fedit": "fedit"}, tmp_path)
    assert {row.strategy for row in kept} == {"glora"}


def test_results_of_other_settings_are_refused(spec: SimSpec, rows: tuple[Result, ...], tmp_path: Path) -> None:
    with pytest.raises(GloraError, match="fedit that were made with other settings") as caught:
        wanted_rows(rows, spec, {"glora": "glora", "fedit": "changed"}, tmp_path / "results.jsonl")
    assert caught.value.reason is Reason.SPEC_INVALID


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"accuracy": 1.0}\n')
    with pytest.raises(GloraError, match="line 1"):
        read_results(tmp_path / "results.jsonl")


def test_the_command_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    """Two processes make what is left; one process later finds the same numbers for a run that was lost."""
    model = save_tiny_encoder(tmp_path / "model")
    write_texts(tmp_path / "train.jsonl", 60, seed=1)
    write_texts(tmp_path / "held_out.jsonl", 12, seed=2)
    (tmp_path / "sim.toml").write_text(TOML.format(model=model))
    arguments = ["--spec", str(tmp_path / "sim.toml"), "--out", str(tmp_path / "out")]
    first = CliRunner().invoke(simulate.app, [*arguments, "--jobs", "2"], catch_exceptions=False)
    assert first.exit_code == 0
    assert "[4/4]" in first.output
    names = {"results.jsonl", "summary.json", "summary.md", "report.html", "accuracy.png"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png;base64,") == 4

    results = tmp_path / "out" / "results.jsonl"
    before = sorted(read_results(results), key=lambda row: (row.strategy, row.seed, row.rank))
    lost = [row for row in before if (row.strategy, row.seed) != ("fedit", 1)]
    results.write_text("".join(f"{row.to_json()}\n" for row in lost))
    again = CliRunner().invoke(simulate.app, [*arguments, "--json", "--no-plots"], catch_exceptions=False)
    assert [one["strategy"] for one in json.loads(again.output)] == ["glora", "fedit"]
    after = sorted(read_results(results), key=lambda row: (row.strategy, row.seed, row.rank))
    assert [_timeless(row) for row in after] == [_timeless(row) for row in before]


def test_a_run_that_fails_costs_nobody_elses_rows(
    spec: SimSpec, rows: tuple[Result, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train.jsonl", "held_out.jsonl"):
        write_texts(tmp_path / name, 3, seed=0)

    def made(*_: object) -> Iterator[simulate.Made]:
        yield rows[:2]
        yield "glora, seed 1: The layer could not be aggregated."
        yield rows[4:6]

    monkeypatch.setattr(simulate, "_made", made)
    said: list[str] = []
    found, problems = simulate.run_all(spec, tmp_path, tmp_path / "results.jsonl", jobs=1, say=said.append)
    assert found == read_results(tmp_path / "results.jsonl") == (*rows[:2], *rows[4:6])
    assert problems == ("glora, seed 1: The layer could not be aggregated.",)
    assert [line[:5] for line in said] == ["[1/4]", "[2/4]", "[3/4]"]


def _timeless(row: Result) -> Result:
    return replace(row, seconds=0.0, aggregation_seconds=0.0)


def test_the_command_is_reachable() -> None:
    found = next(item for item in SUBCOMMANDS if item.name == "simulate")
    assert load(found) is simulate.app
    assert found.extra == "demo"
