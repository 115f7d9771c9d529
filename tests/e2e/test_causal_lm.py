"""A causal model learns from instructions: the same rounds, another task."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_data import manifest_of, run_toml, tiny_llama, write_json_lines
from federation import Federation, completed

pytestmark = pytest.mark.e2e

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"}


def answers(countries: list[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {"instruction": "Name the capital.", "input": country, "response": CAPITALS[country]} for country in countries
    ]
    return rows * 4


def test_instructions_are_learned_in_two_rounds(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "llama")
    toml = run_toml(
        "instructions",
        model,
        labelled=False,
        model_lines='task = "causal_lm"\ntarget_modules = ["q_proj", "v_proj", "down_proj"]',
        lora="max_rank = 8",
        training="steps = 20\nbatch_size = 4\nmax_length = 48\nlearning_rate = 1e-2",
        policy="rounds = 2\ntarget_devices = 2\nquorum = 2\ndeadline_seconds = 1200.0",
        evaluation="ranks = [8]\nafter = false",
    )
    with Federation(tmp_path / "federation") as federation:
        federation.start_server()
        token = federation.token(uses=2)
        for name, rank, countries in (("one", 4, ["France", "Italy", "Spain"]), ("two", 8, ["Japan", "Egypt", "Peru"])):
            federation.join(name, rank, token)
            rows = write_json_lines(tmp_path / f"{name}.jsonl", answers(countries))
            federation.start_device(name, model, "--data", str(rows), "--eval-data", str(rows))
        federation.create_run(toml, manifest_of(toml))
        federation.wait_run(
            "instructions",
            lambda run: completed(run) and 2 in {s.version_number for s in run.scores if s.phase == "version"},
            "its end, measured",
            900.0,
        )
        # What both received at the start, and the last version, which devices that train measure once all is done.
        measured = [item for item in federation.measurements("instructions") if item.phase in {"before", "version"}]
        # By the uploads, too: what the devices reported while training fell.
        trained = federation.rows(
            "SELECT r.number, avg(u.training_loss) FROM uploads u JOIN rounds r ON r.id = u.round_id "
            "GROUP BY r.number ORDER BY r.number"
        )
    loss = {number: mean([item.loss for item in measured if item.version_number == number]) for number in (0, 2)}
    right = {number: mean([item.accuracy for item in measured if item.version_number == number]) for number in (0, 2)}
    assert loss[2] < 0.75 * loss[0], loss
    assert right[0] < 0.1, right
    assert right[2] > 0.5, right
    (first, early), (second, late) = trained
    assert (first, second) == (1, 2)
    assert isinstance(early, float)
    assert isinstance(late, float)
    assert late < early


def mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    assert known, "nothing was measured"
    return sum(known) / len(known)
