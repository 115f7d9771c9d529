"""The file of results: kept from one start to the next, whole or not at all, and refused where it does not fit."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_rows import CONSENSUS, TOML, scored_rows

from glora_cli.failures import exit_code_of
from glora_cli.simulate_results import Result, append_results, read_results, wanted_rows
from glora_cli.simulate_spec import SimSpec, parse_sim_toml
from glora_wire.errors import GloraError, Reason


@pytest.fixture
def spec() -> SimSpec:
    return parse_sim_toml(TOML.format(model="demo"))


@pytest.fixture
def rows() -> tuple[Result, ...]:
    return scored_rows()


def test_rows_come_back_from_the_file(rows: tuple[Result, ...], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_results(path, rows[:3])
    append_results(path, rows[3:])
    assert read_results(path) == rows


def test_what_devices_sent_comes_back_from_the_file(rows: tuple[Result, ...], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_results(path, [replace(rows[0], consensus=CONSENSUS)])
    assert read_results(path) == (replace(rows[0], consensus=CONSENSUS),)


def test_files_from_before_there_was_a_consensus_can_be_read(rows: tuple[Result, ...], tmp_path: Path) -> None:
    values = json.loads(rows[0].to_json())
    del values["consensus"]
    (tmp_path / "results.jsonl").write_text(json.dumps(values) + "\n")
    assert read_results(tmp_path / "results.jsonl") == (rows[0],)


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


@pytest.mark.parametrize(("content", "reason"), [(b"\xff", Reason.DATA_INVALID), (None, Reason.REQUEST_INVALID)])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, reason: Reason) -> None:
    path = tmp_path / "results.jsonl"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(GloraError, match=f"{path} .*--out") as caught:
        read_results(path)
    assert caught.value.reason is reason
    assert exit_code_of(caught.value) == 2


def test_results_that_do_not_fit_leave_the_earlier_ones_readable(rows: tuple[Result, ...], tmp_path: Path) -> None:
    """A line that was half written would make the whole file unreadable."""
    path = tmp_path / "results.jsonl"
    append_results(path, rows[:3])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(GloraError, match=f"{tmp_path} cannot be written .results.jsonl: File too large") as caught:
            append_results(path, rows[3:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit_code_of(caught.value) == 2
    assert read_results(path) == rows[:3]


def test_results_on_a_full_disk_are_told_with_the_folder(rows: tuple[Result, ...], tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").symlink_to("/dev/full")
    with pytest.raises(GloraError, match=f"{tmp_path} cannot be written.*No space left.*--out"):
        append_results(tmp_path / "results.jsonl", rows)
