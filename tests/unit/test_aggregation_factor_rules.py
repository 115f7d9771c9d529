"""Strategies that average factors, against dense references: fedrot, hetlora, lora_fair."""

from dataclasses import replace

import pytest
import torch
from lora_cases import invertible, randn
from strategy_cases import contract_round, fold, model, orthogonally_regauged
from strategy_reference import (
    fedrot,
    hetlora,
    lora_fair_closed,
    lora_fair_objective,
    mean_update,
    padded_average,
    shares,
)
from torch import Tensor

from glora_server.aggregation import STRATEGIES, ClientUpdate, LayerState, check_options, readout
from glora_server.aggregation.strategies.fedrot import Rotation, rotation


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def started(name: str) -> tuple[LayerState, list[ClientUpdate]]:
    state = fold(name, contract_round(name, ranks=(4, 4, 4))).state
    return state, contract_round(name, seed=8, ranks=(4, 4, 4), state=state, round_index=1)


@pytest.mark.parametrize("kind", ["orthogonal", "special", "soft"])
@pytest.mark.parametrize(("round_index", "initial", "on_a"), [(1, "a", True), (2, "a", False), (1, "b", False)])
def test_fedrot_agrees_with_the_dense_reference(kind: str, round_index: int, initial: str, on_a: bool) -> None:
    state, updates = started("fedrot")
    result = fold("fedrot", updates, state=state, round_index=round_index, rotation=kind, initial_share=initial)
    expected = fedrot(updates, (state.extra["b"], state.extra["a"]), on_a=on_a, rotation=kind)
    assert torch.allclose(model(result.state), expected, atol=1e-10)
    fedit, _ = padded_average(updates, shares(updates), 4)
    assert not torch.allclose(result.state.extra["b"], fedit, atol=1e-3)


def test_fedrot_does_not_rotate_the_first_round_nor_without_a_reference() -> None:
    state, updates = started("fedrot")
    b, a = padded_average(updates, shares(updates), 4)
    assert torch.allclose(model(fold("fedrot", updates, state=state, round_index=0).state), b @ a)
    assert torch.allclose(model(fold("fedrot", updates, round_index=3).state), b @ a)


def test_fedrot_with_a_tiny_lambda_is_fedit_and_with_lambda_one_is_special() -> None:
    state, updates = started("fedrot")
    fedit = model(fold("fedit", updates).state)
    tiny = model(fold("fedrot", updates, state=state, round_index=1, rotate_lambda=1e-12).state)
    assert torch.allclose(tiny, fedit, atol=1e-9)
    whole = model(fold("fedrot", updates, state=state, round_index=1, rotate_lambda=1.0).state)
    special = model(fold("fedrot", updates, state=state, round_index=1, rotation="special").state)
    assert torch.allclose(whole, special, atol=1e-10)


@pytest.mark.parametrize(("kind", "survives"), [("orthogonal", True), ("special", False), ("soft", False)])
def test_fedrot_survives_orthogonal_gauges_only_when_hard(kind: str, survives: bool) -> None:
    state, updates = started("fedrot")
    flip = torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))
    other = [replace(u, b=u.b @ flip, a=flip @ u.a) for u in orthogonally_regauged(updates[:1], generator())]
    one, two = (
        model(fold("fedrot", given, state=state, round_index=1, rotation=kind).state)
        for given in (updates, [*other, *orthogonally_regauged(updates[1:], generator(5))])
    )
    assert torch.allclose(one, two, atol=1e-9) is survives


def test_fedrot_recovers_clients_that_differ_by_a_rotation_only() -> None:
    state, updates = started("fedrot")
    same = [replace(updates[0], weight=float(k + 1)) for k in range(4)]
    other = orthogonally_regauged(same, generator())
    result = fold("fedrot", other, state=state, round_index=1, rotation="orthogonal")
    assert torch.allclose(model(result.state), mean_update(other), atol=1e-10)
    assert not torch.allclose(model(fold("fedit", other).state), mean_update(other), atol=0.1)


def test_a_client_that_moved_to_nothing_in_common_is_not_rotated() -> None:
    """M = A_iA_refᵀ is rounding and nothing else: R is the identity, not what an SVD makes of noise."""
    frame = torch.linalg.qr(randn(generator(3), 8, 8)).Q
    a_ref, a_i = frame[:3], frame[3:6]
    assert 0 < float((a_i @ a_ref.T).abs().max()) < 1e-14
    start = ClientUpdate(randn(generator(), 6, 3), a_ref, 1.0, 1.0)
    state = fold("fedrot", [start]).state
    b = randn(generator(2), 6, 3)
    result = fold("fedrot", [ClientUpdate(b, a_i, 1.0, 1.0)], state=state, round_index=1, rotation="orthogonal")
    assert torch.allclose(result.state.extra["b"], b)


def test_rotations_are_orthogonal_and_of_the_asked_determinant() -> None:
    for seed in range(6):
        overlap = randn(generator(seed), 5, 5)
        for kind in Rotation:
            turn = rotation(overlap, kind, 0.5)
            assert torch.allclose(turn @ turn.T, torch.eye(5, dtype=turn.dtype), atol=1e-12)
            if kind is not Rotation.ORTHOGONAL:
                assert float(torch.linalg.det(turn)) == pytest.approx(1.0)


@pytest.mark.parametrize("condition", [1.0, 100.0, 1e6])
def test_the_hard_rotation_is_the_procrustes_optimum(condition: float) -> None:
    overlap = invertible(generator(), 4, condition)
    best = float((rotation(overlap, Rotation.ORTHOGONAL, 1.0) * overlap).sum())
    for seed in range(20):
        q = invertible(generator(seed), 4, 1.0)
        assert float((q * overlap).sum()) <= best * (1 + 1e-12)


def test_a_half_turn_at_lambda_one_half_has_a_way_out() -> None:
    """R = −1 on a plane: (I + R)/2 is zero there, to rounding, and has no polar factor; the identity is nearest."""
    frame = torch.linalg.qr(randn(generator(4), 5, 5)).Q
    half_turn = frame @ torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0], dtype=torch.float64)) @ frame.T
    stretch = frame @ torch.diag(torch.arange(5.0, 0.0, -1.0, dtype=torch.float64)) @ frame.T
    turn = rotation(half_turn @ stretch, Rotation.SOFT, 0.5)
    assert torch.allclose(rotation(half_turn @ stretch, Rotation.SPECIAL, 1.0), half_turn, atol=1e-12)
    assert torch.allclose(turn, torch.eye(5, dtype=turn.dtype), atol=1e-6)


def test_hetlora_agrees_with_the_dense_reference_and_truncates() -> None:
    updates = contract_round("hetlora", ranks=(2, 4, 3))
    state = fold("hetlora", updates, rank=6).state
    assert torch.allclose(model(state), hetlora(updates, 6), atol=1e-10)
    b, a = readout(state, 3, 4.0)
    assert torch.allclose(b, state.extra["b"][:, :3] / 2)
    assert torch.allclose(a, state.extra["a"][:3] / 2)
    by_rows = model(fold("hetlora", updates, rank=6, weights="rows").state)
    assert torch.allclose(by_rows, model(fold("fedit", updates, rank=6).state))


def test_hetlora_weights_are_norms_of_the_products_whatever_the_gauge() -> None:
    """The weights survive a gauge that blows one factor up, though the averaged factors do not."""
    one, two = contract_round("hetlora", ranks=(3, 3))
    loud = replace(one, b=one.b * 1e4, a=one.a / 1e4)
    before, after = (fold("hetlora", [first, two]).diagnostics.clients for first in (one, loud))
    assert [c.share for c in after] == pytest.approx([c.share for c in before])


def test_hetlora_falls_back_to_rows_when_every_update_is_zero() -> None:
    updates = [replace(u, b=torch.zeros_like(u.b)) for u in contract_round("hetlora")]
    seen = fold("hetlora", updates).diagnostics.clients
    assert [c.share for c in seen] == pytest.approx(shares(updates))


def test_hetlora_lets_devices_shrink() -> None:
    assert STRATEGIES["hetlora"].contract(check_options("hetlora", {})).may_shrink


@pytest.mark.parametrize("strength", [1e-6, 0.01, 1.0, 1e6])
def test_lora_fair_closed_form_agrees_with_the_dense_reference(strength: float) -> None:
    updates = contract_round("lora_fair")
    state = fold("lora_fair", updates, fair_lambda=strength).state
    assert torch.allclose(model(state), lora_fair_closed(updates, strength), atol=1e-9)


def test_lora_fair_goes_from_fedit_to_the_best_b_for_the_averaged_a() -> None:
    updates = contract_round("lora_fair")
    mean = mean_update(updates)
    rigid, free = (model(fold("lora_fair", updates, fair_lambda=value).state) for value in (1e12, 1e-12))
    assert torch.allclose(rigid, model(fold("fedit", updates).state), atol=1e-8)
    _, a = padded_average(updates, shares(updates), 4)
    best: Tensor = mean @ torch.linalg.pinv(a) @ a
    assert torch.allclose(free, best, atol=1e-8)


def test_lora_fair_takes_a_rank_deficient_mean_of_a() -> None:
    u = contract_round("lora_fair", ranks=(4,))[0]
    twin = replace(u, a=torch.cat([u.a[:1], u.a[:1], u.a[2:]]))
    state = fold("lora_fair", [twin], fair_lambda=1e-9).state
    assert torch.allclose(model(state), mean_update([twin]), atol=1e-6)


def test_lora_fair_sgd_descends_the_papers_objective() -> None:
    updates = contract_round("lora_fair")
    b, _ = padded_average(updates, shares(updates), 4)
    values = []
    for steps in (1, 30, 300):
        state = fold("lora_fair", updates, solver="sgd", steps=steps).state
        values.append(float(lora_fair_objective(updates, state.extra["b"] - b, 0.01)))
    start = float(lora_fair_objective(updates, torch.zeros_like(b), 0.01))
    assert start > values[0] > values[1] >= values[2]
    optimum = _minimised(updates, b)
    assert values[2] < optimum + 0.01 * (start - optimum)


def test_lora_fair_sgd_stays_where_the_penalty_is_too_high() -> None:
    updates = contract_round("lora_fair")
    state = fold("lora_fair", updates, solver="sgd", fair_lambda=1e6).state
    assert torch.allclose(model(state), model(fold("fedit", updates).state))


@pytest.mark.parametrize("left", [0.0, 1e-9])
def test_lora_fair_sgd_finds_an_update_that_the_averaged_factors_have_lost(left: float) -> None:
    """Two devices whose B cancel (all but `left` of it) while their products do not: B̄ points nowhere, M does."""
    first, second = contract_round("lora_fair", ranks=(4, 4))
    second = replace(second, b=(left - 1.0) * first.b, weight=first.weight, scale=first.scale)
    state = fold("lora_fair", [first, second], solver="sgd", fair_lambda=1e-6, steps=300).state
    closed = fold("lora_fair", [first, second], fair_lambda=1e-6).state
    mean = mean_update([first, second])

    def cosine(found: Tensor) -> float:
        return float((found * mean).sum() / found.norm() / mean.norm())

    assert cosine(model(closed)) > 0.5
    assert cosine(model(state)) > 0.95 * cosine(model(closed))


def _minimised(updates: list[ClientUpdate], b: Tensor) -> float:
    """The objective's minimum by autograd and a backtracking descent on the dense matrices."""
    here, step = 1e-3 * randn(generator(), *b.shape), 1.0
    for _ in range(150):
        point = here.clone().requires_grad_()
        value = lora_fair_objective(updates, point, 0.01)
        (slope,) = torch.autograd.grad(value, point)
        step *= 2
        while step > 1e-9 and float(lora_fair_objective(updates, here - step * slope, 0.01)) >= float(value.detach()):
            step /= 2
        here = here - step * slope
    return float(lora_fair_objective(updates, here, 0.01))
