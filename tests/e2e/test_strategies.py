"""Strategies that ask something of devices, over real gRPC with real training: masks, frozen parts, smaller ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_data import manifest_of, run_toml
from federation import Federation, completed
from tiny_encoder import WORDS, save_tiny_encoder, write_texts

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RANKS = {"small": 2, "large": 4}
RUNS = {
    "tail": ('name = "glora"\noptions = { rule = "frozen_tail" }', "", 1),
    "fresh": ('name = "glora"\noptions = { rule = "accumulate" }', "", 1),
    "half": ('name = "ffa"', "", 1),
    "turns": ('name = "rolora"', "", 4),
    "pruned": ('name = "hetlora"', 'extra = { hetlora_gamma = "0.5", hetlora_lambda = "20" }', 1),
}
"""By name: the strategy, more of the training section, and the smallest rank."""
ROUNDS = 3


def described(name: str, model: Path) -> str:
    strategy, training, min_rank = RUNS[name]
    return run_toml(
        name,
        model,
        labelled=False,
        model_lines=f"labels = {json.dumps(sorted(WORDS))}",
        lora="max_rank = 4",
        strategy=strategy,
        training=f"steps = 3\nbatch_size = 8\nmax_length = 16\nlearning_rate = 1e-2\n{training}",
        policy=f"rounds = {ROUNDS}\nquorum = {1 if min_rank == 4 else 2}\nmin_rank = {min_rank}\n"
        "deadline_seconds = 1200.0",
        evaluation="ranks = [2, 4]\nbefore = false\nafter = true",
    )


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("strategies")
    model = save_tiny_encoder(folder / "model")
    with Federation(folder / "federation") as made:
        made.start_server()
        token = made.token(uses=2)
        for number, (name, rank) in enumerate(RANKS.items()):
            made.join(name, rank, token)
            rows = write_texts(folder / f"{name}.jsonl", 24, seed=number)
            # Nothing to evaluate with: what a device has of a version already, it does not download again.
            made.start_device(name, model, "--data", str(rows))
        for name in RUNS:
            toml = described(name, model)
            made.create_run(toml, manifest_of(toml))
        for name in RUNS:
            made.wait_run(name, completed, "its end", 600.0)
        yield made


@pytest.mark.parametrize("name", RUNS)
def test_every_round_took_the_update_of_every_device_that_may_take_part(federation: Federation, name: str) -> None:
    rounds = federation.rounds(name)
    assert [found.number for found in rounds] == [1, 2, 3]
    wanted = {device for device, rank in RANKS.items() if rank >= RUNS[name][2]}
    for found in rounds:
        assert {item.device for item in found.assignments} == wanted
        assert {item.phase for item in found.assignments} == {"accepted_update"}, found.assignments


def test_devices_that_prune_are_granted_what_they_kept(federation: Federation) -> None:
    """In the first round B starts as zero, so no tail can become smaller."""
    granted = [{item.device: item.rank for item in found.assignments} for found in federation.rounds("pruned")]
    assert granted == [RANKS, RANKS, {"small": 1, "large": 2}]


def test_half_an_update_is_sent_where_one_factor_is_trained(federation: Federation) -> None:
    sizes = {
        name: [sum(item.bytes_up for item in found.assignments if item.device == "large") for found in rounds]
        for name in ("half", "tail", "turns")
        if (rounds := federation.rounds(name))
    }
    assert max(sizes["half"]) < min(sizes["tail"])
    assert max(sizes["turns"]) < min(sizes["tail"])


def test_frozen_parts_are_downloaded_once_there_is_something_in_them(federation: Federation) -> None:
    def down(name: str, device: str) -> list[int]:
        found = federation.rounds(name)
        return [sum(item.bytes_down for item in one.assignments if item.device == device) for one in found]

    sizes = {(run, device): down(run, device) for run in ("tail", "fresh") for device in RANKS}
    for case in (("tail", "small"), ("fresh", "small"), ("fresh", "large")):
        first, *later = sizes[case]
        assert min(later) > 1.5 * first, sizes
    assert len(set(sizes["tail", "large"])) == 1, "a device of the largest rank has no tail"
