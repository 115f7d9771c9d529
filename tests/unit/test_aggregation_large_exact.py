"""Exact rounds so large that diagnostics are tried in float32: right to what is promised, or float64 after all."""

import pytest
import torch
from torch import Tensor

from glora_server.aggregation import AggregationResult, ClientUpdate, LayerState, aggregate
from glora_server.aggregation.factors import normalised_weights
from glora_server.aggregation.frame import JointFrame
from glora_server.aggregation.rules import Rule, round_terms

D, N, RANK, COUNT = 320, 330, 16, 42


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int, *, common: float = 0.8) -> tuple[Tensor, Tensor]:
    """A space that all devices share, and one of their own."""
    b = common * normal(D, RANK, seed=1) + (1 - common) * normal(D, RANK, seed=100 + seed)
    return b, normal(RANK, N, seed=200 + seed)


def replaced(*, common: float = 0.8) -> list[ClientUpdate]:
    return [ClientUpdate(*factors(i, common=common), 0.5, 1.0 + i % 3) for i in range(COUNT)]


def moved(by: float) -> tuple[LayerState, list[ClientUpdate]]:
    """Devices that start from one readout and move every factor by this part of it."""
    b0, a0 = factors(0)
    state = aggregate("glora", None, [ClientUpdate(b0, a0, 0.5, 1.0)], rank=RANK, rule="replace").state
    updates = [
        ClientUpdate(
            b0 + by * normal(D, RANK, seed=300 + i), a0 + by * normal(RANK, N, seed=400 + i), 0.5, 1.0, sent=(b0, a0)
        )
        for i in range(COUNT)
    ]
    return state, updates


def dense(update: ClientUpdate) -> Tensor:
    return update.scale * update.b.double() @ update.a.double()


def change(update: ClientUpdate) -> Tensor:
    if update.sent is None:
        return dense(update)
    return dense(update) - update.scale * update.sent[0].double() @ update.sent[1].double()


def cosine(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum() / one.norm() / other.norm())


def check(result: AggregationResult, state: LayerState | None, updates: list[ClientUpdate], *, digits: float) -> None:
    """Against dense float64 matrices; the new state is the projection that its own columns define."""
    seen, new = result.diagnostics, result.state
    weights = normalised_weights([update.weight for update in updates])
    own, changes = [dense(u) for u in updates], [change(u) for u in updates]
    mean_own = sum((w * x for w, x in zip(weights, own, strict=True)), torch.zeros(D, N, dtype=torch.float64))
    mean_change = sum((w * x for w, x in zip(weights, changes, strict=True)), torch.zeros(D, N, dtype=torch.float64))
    held = 0 if state is None else state.u.double() @ state.a.double()
    mean = mean_change + held
    outside = mean - new.u.double() @ (new.u.double().mT @ mean)
    assert seen.mean_norm == pytest.approx(float(mean.norm()), rel=digits)
    assert seen.truncation_error == pytest.approx(float(outside.norm() / mean.norm()), rel=digits, abs=1e-6)
    for found, x, c in zip(seen.clients, own, changes, strict=True):
        assert found.update_norm == pytest.approx(float(x.norm()), rel=1e-6)
        assert found.change_norm == pytest.approx(float(c.norm()), rel=1e-6)
        assert found.cosine == pytest.approx(cosine(x, mean_own), abs=digits)
        assert found.change_cosine == pytest.approx(cosine(c, mean_change), abs=digits)
        assert found.capture == pytest.approx(float((new.u.double().mT @ x).norm() / x.norm()), rel=1e-5)


def is_large(updates: list[ClientUpdate], state: LayerState | None, rule: Rule) -> bool:
    weights = normalised_weights([update.weight for update in updates])
    return round_terms(rule, state, updates, weights, eta=1.0).frame.large


def attempts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled with `rough` of every product with a mean that is made."""
    made: list[bool] = []
    plain = JointFrame.inner_products

    def counted(frame: JointFrame, combination: object, *, rough: bool = False) -> Tensor:
        made.append(rough)
        return plain(frame, combination, rough=rough)  # type: ignore[arg-type]

    monkeypatch.setattr(JointFrame, "inner_products", counted)
    return made


@pytest.mark.parametrize("common", [0.0, 0.8, 0.99])
def test_replace(common: float, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = replaced(common=common)
    assert is_large(updates, None, Rule.REPLACE)
    made = attempts(monkeypatch)
    result = aggregate("glora", None, updates, rank=24, rule="replace", accuracy="exact")
    assert made == [True], "float32 was enough"
    check(result, None, updates, digits=2e-5)


@pytest.mark.parametrize(("by", "made"), [(0.3, [True, True]), (1e-4, [True, True, False])])
def test_delta(by: float, made: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small changes are differences of large terms, for which float32 is not enough."""
    state, updates = moved(by)
    assert is_large(updates, state, Rule.DELTA)
    seen = attempts(monkeypatch)
    result = aggregate("glora", state, updates, rank=24, rule="delta", eta=1.0, accuracy="exact")
    assert seen == made
    check(result, state, updates, digits=1e-4)


def test_bad_gauges_go_back_to_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """(BQ, Q⁻¹A) with cond(Q) = 1e6: the columns are balanced, but what they say cancels."""
    u, _, v = torch.linalg.svd(normal(RANK, RANK, seed=9).double())
    turn = u @ torch.diag(torch.logspace(0, -6, RANK, dtype=torch.float64)) @ v
    updates = [
        ClientUpdate(x.b.double() @ turn, torch.linalg.solve(turn, x.a.double()), x.scale, x.weight) for x in replaced()
    ]
    made = attempts(monkeypatch)
    result = aggregate("glora", None, updates, rank=24, rule="replace", accuracy="exact")
    assert made == [True, False]
    check(result, None, updates, digits=1e-6)


def test_what_is_not_lost_is_not_invented() -> None:
    one = factors(1)
    updates = [ClientUpdate(*one, 0.5, 1.0) for _ in range(COUNT)]
    assert is_large(updates, None, Rule.REPLACE)
    seen = aggregate("glora", None, updates, rank=RANK, rule="replace", accuracy="exact").diagnostics
    assert seen.truncation_error < 1e-12
    assert [client.cosine for client in seen.clients] == pytest.approx([1.0] * COUNT, abs=1e-6)


@pytest.mark.parametrize(("on_b", "on_a"), [(1e200, 1e-190), (1e20, 1e5), (1e-40, 1e2)])
def test_numbers_beyond_float32_do_not_overflow(on_b: float, on_a: float) -> None:
    updates = [ClientUpdate(x.b.double() * on_b, x.a.double() * on_a, x.scale, x.weight) for x in replaced()]
    seen = aggregate("glora", None, updates, rank=24, rule="replace", accuracy="exact").diagnostics
    plain = aggregate("glora", None, replaced(), rank=24, rule="replace", accuracy="exact").diagnostics
    assert seen.mean_norm == pytest.approx(on_b * on_a * plain.mean_norm, rel=1e-4)
    assert seen.truncation_error == pytest.approx(plain.truncation_error, rel=1e-3)
    assert [c.cosine for c in seen.clients] == pytest.approx([c.cosine for c in plain.clients], abs=1e-4)
