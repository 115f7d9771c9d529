"""`aggregate_many`: modules computed in one batch against one by one; CPU tensors, so that it runs everywhere."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from dense_reference import dense_state
from lora_cases import randn, regauged
from torch import Tensor

from glora_server.aggregation import (
    AggregationError,
    AggregationResult,
    ClientUpdate,
    Diagnostics,
    LayerState,
    OptionValue,
    aggregate_many,
    aggregate_with_options,
    canonical_state,
    readout,
)
from glora_server.aggregation.fast import fold
from glora_server.aggregation.fast.intake import ModuleRound, VoteRule

RANK = 8
FAST: dict[str, OptionValue] = {"accuracy": "fast"}


def start_state(seed: int, d: int, n: int, rank: int = RANK) -> LayerState:
    g = torch.Generator().manual_seed(seed)
    return canonical_state(randn(g, d, rank).float(), 0.1 * randn(g, rank, n).float(), rank=rank)


def uploads(
    seed: int, d: int, n: int, state: LayerState | None, *, count: int = 40, ranks: Sequence[int] = (2, 4)
) -> list[ClientUpdate]:
    """Readouts with changes, or unrelated factors where there is no state; every module with a scale of its own."""
    g = torch.Generator().manual_seed(100 + seed)
    scale = 0.5 + 0.1 * seed
    sent = {}
    for r in ranks:
        zero = torch.zeros(d, r), randn(g, r, n).float()
        sent[r] = zero if state is None else readout(state, r, scale)
    updates = []
    for i in range(count):
        b0, a0 = sent[ranks[i % len(ranks)]]
        b, a = b0 + 0.3 * randn(g, *b0.shape).float(), a0 + 0.3 * randn(g, *a0.shape).float()
        updates.append(ClientUpdate(b, a, scale, float(1 + i % 3), sent=(b0, a0)))
    return updates


def both(
    states: Sequence[LayerState | None], updates: Sequence[Sequence[ClientUpdate]], options: dict[str, OptionValue]
) -> tuple[Sequence[AggregationResult], Sequence[AggregationResult]]:
    together = aggregate_many("glora", states, updates, rank=RANK, options=options, batched=True)
    alone = [
        aggregate_with_options("glora", state, of_module, rank=RANK, options=options)
        for state, of_module in zip(states, updates, strict=True)
    ]
    return together, alone


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(actual - expected) / torch.linalg.matrix_norm(expected))


def close_reports(one: Diagnostics, other: Diagnostics) -> None:
    assert one.eigenvalues == pytest.approx(other.eigenvalues, rel=2e-2, abs=1e-6)
    assert one.mean_norm == pytest.approx(other.mean_norm, rel=1e-3)
    assert one.captured_energy == pytest.approx(other.captured_energy, abs=1e-2)
    assert one.coverage == other.coverage
    for first, second in zip(one.clients, other.clients, strict=True):
        assert (first.rank, first.votes, first.share) == (second.rank, second.votes, second.share)
        assert first.update_norm == pytest.approx(second.update_norm, rel=1e-4)
        assert first.change_norm == pytest.approx(second.change_norm, rel=1e-3, abs=1e-6)
        assert first.capture == pytest.approx(second.capture, abs=1e-2)
        assert first.cosine == pytest.approx(second.cosine, abs=2e-2)
        assert first.change_cosine == pytest.approx(second.change_cosine, abs=2e-2)


@pytest.mark.parametrize("count", [3, 40], ids=["gram", "krylov"])
@pytest.mark.parametrize("rule", ["replace", "delta", "accumulate"])
@pytest.mark.parametrize("subspace", ["projector", "ridge", "energy", "mean"])
def test_a_batch_gives_what_single_calls_give(count: int, rule: str, subspace: str) -> None:
    """Modules of two shapes, mixed ranks, scales that differ from module to module.

    A batch goes on until its last module has converged, so the others are nearer to the optimum than alone.
    """
    tolerance = 1e-5 if count == 3 else 2e-2
    shapes = [(112, 48), (112, 48), (128, 40), (112, 48)]
    states = [start_state(seed, *shape) for seed, shape in enumerate(shapes)]
    updates = [
        uploads(seed, *shape, state, count=count)
        for seed, (shape, state) in enumerate(zip(shapes, states, strict=True))
    ]
    together, alone = both(states, updates, {**FAST, "rule": rule, "subspace": subspace})
    for one, other in zip(together, alone, strict=True):
        assert relative(dense_state(one.state), dense_state(other.state)) <= tolerance
        close_reports(one.diagnostics, other.diagnostics)


@pytest.mark.parametrize("subspace", ["projector", "ridge", "energy", "mean"])
def test_a_batch_of_one_differs_by_rounding_only(subspace: str) -> None:
    state = start_state(0, 112, 48)
    together, alone = both([state], [uploads(0, 112, 48, state)], {**FAST, "subspace": subspace})
    assert relative(dense_state(together[0].state), dense_state(alone[0].state)) <= 1e-3
    close_reports(together[0].diagnostics, alone[0].diagnostics)


def test_modules_of_one_layout_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    computed = fold._computed

    def counted(
        rule: VoteRule, modules: Sequence[ModuleRound], *, rank: int, stack: bool
    ) -> list[AggregationResult | None]:
        sizes.append((len(modules), stack))
        return computed(rule, modules, rank=rank, stack=stack)

    monkeypatch.setattr(fold, "_computed", counted)
    shapes = [(112, 48), (128, 40), (112, 48)]
    updates = [uploads(seed, *shape, None) for seed, shape in enumerate(shapes)]
    aggregate_many("glora", [None] * 3, updates, rank=RANK, options=FAST, batched=True)
    assert sizes == [(2, True), (1, True)]
    sizes.clear()
    aggregate_many("glora", [None] * 3, updates, rank=RANK, options=FAST)
    assert sizes == [(1, False)] * 3


def test_states_of_different_ranks_and_degenerate_modules_share_a_batch() -> None:
    """One module starts, one holds a state of lower rank, one has idle devices, one bad gauges, one identical ones."""
    d, n = 112, 48
    states = [None, start_state(1, d, n, rank=3), start_state(2, d, n), start_state(3, d, n), start_state(4, d, n)]
    updates = [uploads(seed, d, n, state, ranks=(4,)) for seed, state in enumerate(states)]
    updates[2] = [replace(u, b=torch.zeros_like(u.b)) if i % 2 else u for i, u in enumerate(updates[2])]
    updates[3] = regauged(updates[3], torch.Generator().manual_seed(5), 1e6)
    updates[4] = [replace(updates[4][0], weight=1.0)] * len(updates[4])
    for rule in ("replace", "delta"):
        together, alone = both(states, updates, {**FAST, "rule": rule})
        for one, other in zip(together, alone, strict=True):
            assert one.state.rank == other.state.rank
            assert relative(dense_state(one.state), dense_state(other.state)) <= 2e-2
            assert bool(torch.isfinite(one.state.u).all())


def test_a_module_that_says_nothing_stays_zero_beside_others() -> None:
    updates = [uploads(seed, 112, 48, None) for seed in range(2)]
    updates[0] = [replace(u, b=torch.zeros_like(u.b)) for u in updates[0]]
    together = aggregate_many(
        "glora", [None, None], updates, rank=RANK, options={**FAST, "rule": "replace"}, batched=True
    )
    assert together[0].state.rank == 0
    assert together[0].diagnostics.captured_energy == 1.0
    assert together[1].state.rank == RANK


@pytest.mark.parametrize("strategy", ["glora", "fedit", "flexlora"])
def test_what_has_no_batches_is_computed_one_by_one_to_the_same_bits(strategy: str) -> None:
    updates = [uploads(seed, 30, 20, None, count=3, ranks=(4,)) for seed in range(3)]
    together = aggregate_many(strategy, [None] * 3, updates, rank=RANK, options={}, batched=True)
    for result, of_module in zip(together, updates, strict=True):
        alone = aggregate_with_options(strategy, None, of_module, rank=RANK, options={})
        assert torch.equal(result.state.u, alone.state.u)
        assert result.diagnostics == alone.diagnostics


def test_the_same_bits_twice() -> None:
    states = [start_state(seed, 112, 48) for seed in range(2)]
    updates = [uploads(seed, 112, 48, state) for seed, state in enumerate(states)]
    first, second = (aggregate_many("glora", states, updates, rank=RANK, options=FAST, batched=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.state.u, other.state.u)
        assert torch.equal(one.state.a, other.state.a)
        assert one.diagnostics == other.diagnostics


def test_a_wrong_module_is_named_by_its_error_and_no_modules_give_no_results() -> None:
    good, bad = uploads(0, 30, 20, None, count=2), uploads(1, 30, 20, None, count=2)
    bad[1] = replace(bad[1], b=bad[1].b * float("nan"))
    with pytest.raises(AggregationError, match="Update 1 has NaN"):
        aggregate_many("glora", [None, None], [good, bad], rank=RANK, options=FAST)
    assert aggregate_many("glora", [], [], rank=RANK, options=FAST) == ()
