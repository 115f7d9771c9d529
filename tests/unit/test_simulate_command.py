"""The command: going on where it was cut off, and what is said before anything runs when it could not end well."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_rows import TOML, scored_rows
from tiny_encoder import save_tiny_encoder, write_texts
from typer.testing import CliRunner

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from glora_cli import simulate
from glora_cli.failures import exit_code_of
from glora_cli.main import SUBCOMMANDS, load
from glora_cli.simulate_results import Result, read_results
from glora_cli.simulate_spec import SimSpec, parse_sim_toml
from glora_wire.errors import GloraError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture
def spec() -> SimSpec:
    return parse_sim_toml(TOML.format(model="demo"))


@pytest.fixture
def rows() -> tuple[Result, ...]:
    return scored_rows()


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
    names = {"results.jsonl", "summary.json", "summary.md", "report.html", "accuracy.png", "consensus.png"}
    assert names <= {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png;base64,") == 5

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
        write_texts(tmp_path / name, 16, seed=0)

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


def _failure(folder: Path, *, out: Path, spec: str = TOML.format(model="demo"), more: Sequence[str] = ()) -> GloraError:
    """What the command says of a description, with 60 rows to train on."""
    write_texts(folder / "train.jsonl", 60, seed=1)
    write_texts(folder / "held_out.jsonl", 12, seed=2)
    (folder / "sim.toml").write_text(spec)
    result = CliRunner().invoke(simulate.app, ["--spec", str(folder / "sim.toml"), "--out", str(out), *more])
    assert isinstance(result.exception, GloraError), result.output
    return result.exception


def _nobody_works(*_: object) -> Iterator[simulate.Made]:
    pytest.fail("nothing may run before what all runs need is there")


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("file", "is not a folder"),
        ("file/deeper", "cannot be made"),
        ("/proc/foo", "cannot be made"),
        ("/proc", "cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, what: str
) -> None:
    monkeypatch.setattr(simulate, "_made", _nobody_works)
    (tmp_path / "file").write_text("")
    out = tmp_path / place
    error = _failure(tmp_path, out=out)
    assert error.message.startswith(f"{out} {what}")
    assert "--out" in error.message
    assert "\n" not in error.message
    assert exit_code_of(error) == 2


@pytest.mark.parametrize(("name", "what"), [("results.jsonl", "cannot be read"), ("summary.json", "cannot be written")])
def test_a_file_in_the_way_is_named(
    rows: tuple[Result, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.setattr(simulate, "_made", lambda *_: iter([rows]))
    (tmp_path / "out" / name).mkdir(parents=True)
    error = _failure(tmp_path, out=tmp_path / "out", more=["--no-plots"])
    assert f"{tmp_path / 'out'}" in error.message
    assert name in error.message
    assert what in error.message
    assert exit_code_of(error) == 2


def test_too_few_rows_for_all_devices_are_told_once_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "_made", _nobody_works)
    text = TOML.format(model="demo").replace("min_rows = 8", "train_rows = 20\nmin_rows = 16")
    error = _failure(tmp_path, out=tmp_path / "out", spec=text)
    assert error.message == (
        "20 rows are too few for 2 devices with data.min_rows = 16; simulate fewer devices, or lower data.min_rows."
    )
    assert exit_code_of(error) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_model_that_is_not_there_is_wrong_input_and_no_refusal_of_a_server(tmp_path: Path, jobs: str) -> None:
    text = TOML.format(model=tmp_path / "nowhere")
    error = _failure(tmp_path, out=tmp_path / "out", spec=text, more=["--jobs", jobs])
    assert error.message == (
        f"{tmp_path / 'sim.toml'}, model.path: The model folder {tmp_path / 'nowhere'} does not exist."
    )
    assert exit_code_of(error) == 2


def test_no_report_is_made_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "_made", lambda *_: iter([f"glora, seed {seed}: It failed." for seed in (0, 1)]))
    error = _failure(tmp_path, out=tmp_path / "out")
    assert error.message.startswith("2 runs failed")
    assert exit_code_of(error) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_is_reachable() -> None:
    found = next(item for item in SUBCOMMANDS if item.name == "simulate")
    assert load(found) is simulate.app
    assert found.extra == "demo"
