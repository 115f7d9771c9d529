"""Simulated runs on a tiny encoder: every strategy, the same numbers twice, and what becomes of a lost device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from simulated_world import LONG, World, entry, make_world

from glora_cli.simulate_devices import Bench
from glora_cli.simulate_results import Result
from glora_client.training import FitReport
from glora_server.aggregation import STRATEGIES
from glora_wire.errors import GloraError, Reason

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_world(tmp_path_factory.mktemp("simulate"))
    torch.set_num_threads(before)


def _numbers(rows: tuple[Result, ...]) -> list[Result]:
    """All but the label and the seconds, which no two runs have in common."""
    return [replace(row, strategy="", seconds=0.0, aggregation_seconds=0.0) for row in rows]


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_runs_to_the_end(world: World, name: str) -> None:
    mixed = STRATEGIES[name].properties.mixed_ranks
    rows = world.run(entry(name, "" if mixed else "ranks = [2]"))
    assert [(row.round, row.rank) for row in rows] == [(1, 4), *((2, r) for r in ((1, 2, 4) if mixed else (2, 4)))]
    assert all(row.updates == 3 and row.failed == row.rejected == 0 for row in rows)
    assert all(row.accuracy is not None and row.loss is not None and row.truncation_error is not None for row in rows)
    assert all(row.bytes_up > 0 and row.bytes_down > 0 for row in rows)
    assert sum(row.devices for row in rows if row.round == 2) == 3


@pytest.mark.parametrize("rule", ["frozen_tail", "accumulate"])
def test_the_same_run_gives_the_same_numbers(world: World, rule: str) -> None:
    first, again = (world.run(entry("glora", f'options = {{ rule = "{rule}" }}')) for _ in range(2))
    assert _numbers(first) == _numbers(again)


def test_strategies_of_one_seed_start_alike_and_see_the_same_batches(world: World) -> None:
    """With one rank r = R the rules replace and delta are the same matrix, so any difference would be the pairing."""
    replaced, delta = (
        world.run(entry("glora", f'ranks = [4]\noptions = {{ rule = "{rule}" }}')) for rule in ("replace", "delta")
    )
    for one, other in zip(replaced, delta, strict=True):
        assert one.accuracy == other.accuracy
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.training_loss == pytest.approx(other.training_loss, rel=1e-4)
    other_seed = world.run(entry("glora", "ranks = [4]"), seed=1)
    assert other_seed[-1].loss != pytest.approx(delta[-1].loss, rel=1e-4)


def test_a_run_learns(world: World) -> None:
    rows = world.run(entry("glora"), LONG)
    assert rows[-1].accuracy is not None
    assert rows[-1].accuracy > 0.8


def test_participation_limits_the_round(world: World) -> None:
    rows = world.run(entry("fedit"), {"[devices]": "[devices]\nparticipation = 0.6"})
    assert {row.updates for row in rows} == {2}


def test_a_device_that_diverges_is_counted_and_the_round_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    train: Callable[..., FitReport] = Bench.train
    calls: list[int] = []

    def sometimes(bench: Bench, *arguments: object, **options: object) -> FitReport:
        calls.append(1)
        if len(calls) in {1, 4, 5, 6}:
            raise GloraError(Reason.TRAINING_DIVERGED, "Training diverged.")
        return train(bench, *arguments, **options)

    monkeypatch.setattr(Bench, "train", sometimes)
    rows = world.run(entry("glora"))
    assert [(row.updates, row.failed) for row in rows if row.rank == 4] == [(2, 1), (0, 3)]
    # Nobody is left in the second round, so that the model stays what it was.
    assert rows[-1].accuracy == rows[0].accuracy
    assert rows[-1].truncation_error is None


def test_a_round_tells_how_far_devices_agree_and_what_each_of_them_sent(world: World) -> None:
    first, *last = world.run(entry("glora"))
    assert [row.consensus is not None for row in last] == [row.rank == row.server_rank for row in last]
    assert first.consensus is not None
    spectrum = first.consensus.eigenvalues
    assert len(spectrum) == 4
    assert list(spectrum) == sorted(spectrum, reverse=True)
    assert 0 < spectrum[0] <= 1 + 1e-9
    assert first.consensus.mean_angle is first.consensus.largest_angle is None, "there is no state before the first"
    assert [device.device for device in first.consensus.devices] == [f"device-{number:05d}" for number in range(3)]
    for device in first.consensus.devices:
        assert device.update_norm is not None
        assert device.update_norm > 0
        assert device.cosine is not None
        assert -1 <= device.cosine <= 1
        assert device.capture is not None
        assert 0 <= device.capture <= 1
        assert device.influence is not None
        assert device.influence > 0
    second = last[-1].consensus
    assert second is not None
    assert second.mean_angle is not None
    assert second.largest_angle is not None
    assert 0 <= second.mean_angle <= second.largest_angle <= 1.6


def test_what_no_rank_mends_is_told_apart_from_what_a_larger_one_would(world: World) -> None:
    for row in world.run(entry("glora")) + world.run(entry("fedit")):
        assert row.aggregation_bias is not None
        assert row.truncation_error is not None
        assert 0 <= row.aggregation_bias <= row.truncation_error + 1e-6
    assert world.run(entry("flexlora"))[0].aggregation_bias == pytest.approx(0.0, abs=1e-6)
    assert (world.run(entry("fedit"))[0].aggregation_bias or 0.0) > 1e-3


def test_a_strategy_without_votes_tells_of_its_devices_only(world: World) -> None:
    found = world.run(entry("fedit"))[0].consensus
    assert found is not None
    assert found.eigenvalues == ()
    assert len(found.devices) == 3


def test_an_update_over_the_norm_limit_is_rejected(world: World) -> None:
    rows = world.run(entry("glora"), {"[lora]": "[limits]\nmax_update_norm = 1e-9\n\n[lora]"})
    assert all(row.rejected == 3 and row.updates == 0 for row in rows)
    assert all(row.consensus is None for row in rows)
