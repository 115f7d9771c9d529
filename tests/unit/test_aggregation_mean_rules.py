"""Strategies on the mean of the true updates, against dense references: flexlora, florist, raflora, flora, fedex."""

from dataclasses import replace

import pytest
import torch
from dense_reference import truncated
from lora_cases import regauged
from strategy_cases import D, N, contract_round, fold, model
from strategy_reference import delta_w, florist_rank, mean_update, padded_average, raflora, shares

from glora_server.aggregation import STRATEGIES, ClientUpdate, LayerState, MergeInstruction, empty_state, readout
from glora_server.aggregation import errors as e


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def instruction(name: str, state: LayerState, *, joining: bool = False) -> MergeInstruction:
    found = STRATEGIES[name].merge(state, joining=joining)
    assert found is not None
    return found


@pytest.mark.parametrize("rank", [1, 3, 5, 12])
def test_flexlora_is_the_best_part_of_the_mean_in_slices_with_orthonormal_a(rank: int) -> None:
    updates = contract_round("flexlora", ranks=(2, 4, 3))
    state = fold("flexlora", updates, rank=rank).state
    assert torch.allclose(model(state), truncated(mean_update(updates), rank), atol=1e-10)
    r = min(rank, 2)
    b, a = readout(state, r, 0.5, style="balanced")
    assert torch.allclose(0.5 * b @ a, truncated(mean_update(updates), r), atol=1e-10)
    assert torch.allclose(a @ a.T, torch.eye(r, dtype=a.dtype), atol=1e-12)


def test_flexlora_and_glora_with_subspace_mean_are_the_same_state() -> None:
    updates = contract_round("flexlora")
    one, two = fold("flexlora", updates, rank=5), fold("glora", updates, rank=5, subspace="mean")
    assert torch.allclose(one.state.u, two.state.u, atol=1e-9)
    assert torch.allclose(one.state.a, two.state.a, atol=1e-9)
    assert one.diagnostics.truncation_error == pytest.approx(two.diagnostics.truncation_error)
    assert one.diagnostics.captured_energy == pytest.approx(two.diagnostics.captured_energy)
    assert [c.capture for c in one.diagnostics.clients] == pytest.approx([c.capture for c in two.diagnostics.clients])


def test_flexlora_loses_the_tail_by_the_coverage_and_raflora_does_not() -> None:
    """Nobody trains: direction j of flexlora is multiplied by w_j each round (§1.7); raflora keeps it."""
    start = fold("flexlora", contract_round("flexlora", ranks=(4,)), rank=4).state
    for name in ("flexlora", "raflora"):
        state = replace(start, strategy=name)
        back = [ClientUpdate(*readout(state, r, 1.0), 1.0, w) for r, w in ((2, 3.0), (4, 1.0))]
        sigma = fold(name, back, state=state, rank=4).state.sigma
        kept = torch.tensor([1.0, 1.0, 0.25, 0.25]) if name == "flexlora" else torch.ones(4)
        assert torch.allclose(sigma.sort().values, (start.sigma * kept).sort().values, atol=1e-10)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_florist_keeps_as_few_directions_as_hold_the_energy(energy: float) -> None:
    updates = contract_round("florist", ranks=(4, 4, 4))
    mean = mean_update(updates)
    p = florist_rank(mean, energy) if energy < 1 else 12
    state = fold("florist", updates, rank=12, energy=energy).state
    assert state.rank == p
    assert torch.allclose(model(state), truncated(mean, p), atol=1e-10)
    assert fold("florist", updates, rank=2, energy=energy).state.rank == min(p, 2)


@pytest.mark.parametrize("levels", ["2,4,8", "2, 3, 4, 8", "1,2,3,4,5,6,7,8"])
def test_raflora_agrees_with_the_dense_reference(levels: str) -> None:
    updates = contract_round("raflora", ranks=(2, 4, 8))
    expected = raflora(updates, [int(level) for level in levels.split(",")])
    result = fold("raflora", updates, rank=14, levels=levels)
    assert torch.allclose(model(result.state), expected, atol=1e-10)
    cut = fold("raflora", updates, rank=3, levels=levels).state
    assert torch.allclose(model(cut), truncated(expected, 3), atol=1e-10)
    by_default = fold("raflora", updates, rank=14)
    assert torch.allclose(model(by_default.state), expected, atol=1e-10), "lists with all ranks agree with every rank"


def test_raflora_levels_come_from_the_run_not_from_the_round() -> None:
    """A device of rank 3 between levels 2 and 4 counts with two columns, whoever else takes part."""
    updates = contract_round("raflora", ranks=(2, 3))
    state = fold("raflora", updates, levels="2,4,8").state
    assert torch.allclose(model(state), raflora(updates, [2, 4, 8]), atol=1e-10)
    assert not torch.allclose(model(state), raflora(updates, [2, 3]), atol=1e-3)


def test_raflora_with_equal_ranks_is_flexlora() -> None:
    updates = contract_round("raflora", ranks=(4, 4, 4))
    one, two = fold("raflora", updates), fold("flexlora", regauged(updates, generator(), 10.0))
    assert torch.allclose(model(one.state), model(two.state), atol=1e-9)


@pytest.mark.parametrize("levels", ["", "4,2", "2,2", "0,4", "2;4", "two", "2,,4"])
def test_levels_are_checked(levels: str) -> None:
    with pytest.raises(e.OptionError, match="rising ranks"):
        fold("raflora", contract_round("raflora"), levels=levels)


def test_raflora_refuses_a_round_below_its_first_level() -> None:
    with pytest.raises(e.WeightError, match="first level"):
        fold("raflora", contract_round("raflora", ranks=(2, 3)), levels="4,8")


def test_flora_stacks_and_devices_that_merge_hold_the_sum_of_all_means() -> None:
    base = torch.zeros(D, N, dtype=torch.float64)
    state: LayerState | None = None
    for t in range(5):
        updates = contract_round("flora", seed=t, ranks=(2, 4, 3), state=state, round_index=t)
        state = fold("flora", updates, state=state, rank=6, round_index=t).state
        step = instruction("flora", state)
        assert step.left.shape == (D, 9)
        assert torch.allclose(step.left @ step.right, mean_update(updates), atol=1e-10)
        assert torch.equal(step.left[:, :2], updates[0].b), "B travels as it came; weights and scales are on A only"
        base = base + mean_update(updates)
        assert torch.allclose(model(state), base, atol=1e-9), "beyond rank R the tail holds the rest"
        assert torch.allclose(state.u @ state.a, truncated(base, 6), atol=1e-9)
    assert state is not None
    everything = instruction("flora", state, joining=True)
    assert torch.allclose(everything.left @ everything.right, base, atol=1e-9)
    assert instruction("flora", state).digest != everything.digest
    b, a = readout(state, 3, 1.0, version=2)
    assert not bool(b.any())
    assert not torch.equal(a, readout(state, 3, 1.0, version=3)[1])
    assert STRATEGIES["flora"].contract({}).merges


def test_fedex_residual_and_adapter_are_the_mean_round_after_round() -> None:
    base = torch.zeros(D, N, dtype=torch.float64)
    state: LayerState | None = None
    for t in range(5):
        updates = contract_round("fedex", seed=t, state=state, round_index=t)
        state = fold("fedex", updates, state=state, rank=6, round_index=t).state
        b, a = padded_average(updates, shares(updates), 4)
        step = instruction("fedex", state)
        assert torch.allclose(step.left @ step.right, mean_update(updates) - b @ a, atol=1e-10)
        assert step.left.shape[1] <= sum(u.rank for u in updates)
        assert torch.allclose(state.extra["b"] @ state.extra["a"], b @ a, atol=1e-10)
        base = base + step.left @ step.right
        assert torch.allclose(model(state), base + b @ a, atol=1e-9)
    assert state is not None
    everything = instruction("fedex", state, joining=True)
    assert torch.allclose(everything.left @ everything.right, base, atol=1e-9)


def test_the_model_of_fedex_is_gauge_invariant_though_its_adapters_are_not() -> None:
    first = fold("fedex", contract_round("fedex"))
    updates = contract_round("fedex", seed=4, state=first.state, round_index=1)
    one, two = (
        fold("fedex", given, state=first.state, round_index=1).state
        for given in (updates, regauged(updates, generator(), 100.0))
    )
    assert torch.allclose(model(one), model(two), atol=1e-8)
    assert not torch.allclose(one.extra["b"] @ one.extra["a"], two.extra["b"] @ two.extra["a"], atol=0.1)


def test_fedex_with_a_cut_residual_says_what_devices_then_hold() -> None:
    updates = contract_round("fedex")
    state = fold("fedex", updates, residual_rank=2).state
    b, a = padded_average(updates, shares(updates), 4)
    step = instruction("fedex", state)
    assert step.left.shape[1] == 2
    assert torch.allclose(model(state), b @ a + truncated(mean_update(updates) - b @ a, 2), atol=1e-10)


def test_one_client_leaves_fedex_no_residual() -> None:
    state = fold("fedex", contract_round("fedex", ranks=(4,))).state
    assert instruction("fedex", state).left.shape == (D, 0)


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_merges_are_named_by_their_numbers(name: str) -> None:
    states = [fold(name, contract_round(name, seed=seed)).state for seed in (0, 0, 1)]
    digests = [instruction(name, state).digest for state in states]
    assert digests[0] == digests[1] != digests[2]
    assert STRATEGIES[name].merge(empty_state(D, N, strategy=name)) is None


def test_single_updates_agree_everywhere() -> None:
    u = contract_round("flexlora", ranks=(4,))[0]
    assert all(
        torch.allclose(model(fold(name, [u]).state), delta_w(u), atol=1e-9)
        for name in ("flexlora", "raflora", "flora", "fedex", "fedit", "hetlora")
    )
