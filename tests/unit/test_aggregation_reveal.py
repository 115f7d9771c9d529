"""Exact rounds of many devices over a state, wide and narrow frames, against dense float64 matrices."""

from dataclasses import dataclass, replace

import pytest
import torch
from dense_reference import dense_round, dense_state
from lora_cases import regauged
from torch import Tensor

from glora_server.aggregation import ClientUpdate, LayerState, aggregate, canonical_state, readout
from glora_server.aggregation.factors import normalised_weights
from glora_server.aggregation.reveal import reveal
from glora_server.aggregation.rules import Rule, round_terms

RANK, COMMON = 24, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of the module, and how many devices; `wide` modules have fewer rows than there are columns in the round."""

    d: int
    n: int
    count: int


WIDE, NARROW = Size(d=300, n=310, count=30), Size(d=500, n=400, count=6)
sizes = pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])


@pytest.fixture(autouse=True)
def _in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices of one rank take several batches."""
    monkeypatch.setattr("glora_server.aggregation.reveal._AT_A_TIME", 4)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def started(size: Size, dtype: torch.dtype) -> LayerState:
    g = torch.Generator().manual_seed(1)
    u, v = torch.linalg.qr(normal(g, size.d, RANK)).Q, torch.linalg.qr(normal(g, size.n, RANK)).Q
    return canonical_state(u, (v * torch.logspace(0, -2, RANK)).mT, rank=RANK, dtype=dtype)


def trained(size: Size, state: LayerState, by: float, *, wire: torch.dtype) -> list[ClientUpdate]:
    """Devices of three ranks that all learn much of the same thing, so that K has a gap at R."""
    g, same = torch.Generator().manual_seed(2), torch.Generator().manual_seed(3)
    learnt = normal(same, size.d, COMMON), normal(same, COMMON, size.n)
    updates = []
    for i in range(size.count):
        rank = (4, 8, 16)[i % 3]
        sent = tuple(factor.to(wire) for factor in readout(state, rank, 0.5))
        b0, a0 = sent[0].double(), sent[1].double()
        b = b0 + by * b0.std() * (learnt[0][:, :rank] + 0.05 * normal(g, size.d, rank))
        a = a0 + by * a0.std() * (learnt[1][:rank] + 0.05 * normal(g, rank, size.n))
        updates.append(ClientUpdate(b.to(wire), a.to(wire), 0.5, 1.0 + i % 5, sent=(sent[0], sent[1])))
    return updates


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@sizes
@pytest.mark.parametrize("subspace", ["projector", "ridge", "energy"])
@pytest.mark.parametrize("rule", ["delta", "frozen_tail", "accumulate"])
@pytest.mark.parametrize("condition", [1.0, 1e6])
def test_the_state_is_the_dense_one(size: Size, rule: str, subspace: str, condition: float) -> None:
    state = started(size, torch.float64)
    updates = regauged(trained(size, state, 0.3, wire=torch.float64), torch.Generator().manual_seed(7), condition)
    result = aggregate("glora", state, updates, rank=RANK, rule=rule, subspace=subspace, rank_tol=1e-7)
    expected = dense_round(updates, rank=RANK, rule=rule, subspace=subspace, state=state, rank_tol=1e-7)
    assert expected.gap > 1e-5
    assert relative(dense_state(result.state), expected.s) <= 1e-8 / expected.gap
    assert relative(torch.tensor(result.diagnostics.eigenvalues), expected.eigenvalues[:RANK]) <= 1e-7


@sizes
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_what_comes_back_untouched_leaves_the_state(size: Size, wire: torch.dtype) -> None:
    """What was sent cancels against the upload, whose rounding must get no vote."""
    state = started(size, torch.float32)
    updates = [replace(u, b=u.sent[0], a=u.sent[1]) for u in trained(size, state, 0.1, wire=wire) if u.sent]
    result = aggregate("glora", state, updates, rank=RANK, rule="delta", accuracy="exact")
    assert relative(dense_state(result.state), dense_state(state)) <= 1e-6
    assert {client.votes for client in result.diagnostics.clients} == {RANK}
    assert {client.change_norm for client in result.diagnostics.clients} == {0.0}


@sizes
@pytest.mark.parametrize("by", [0.3, 1e-3])
def test_bases_are_orthonormal_and_norms_are_those_of_dense_matrices(size: Size, by: float) -> None:
    state = started(size, torch.float32)
    updates = trained(size, state, by, wire=torch.float32)
    weights = normalised_weights([update.weight for update in updates])
    terms = round_terms(Rule.DELTA, state, updates, weights, eta=0.5)
    for found, update in zip(reveal(terms, 1e-5), updates, strict=True):
        u = torch.cat([found.shared, found.own], dim=1) @ found.inner
        assert float((u.mT @ u - torch.eye(u.shape[1], dtype=torch.float64)).abs().max()) <= 1e-11
        own = 0.5 * update.b.double() @ update.a.double()
        assert update.sent is not None
        change = 0.5 * (own - 0.5 * update.sent[0].double() @ update.sent[1].double())
        assert found.norms.update == pytest.approx(float(own.norm()), rel=1e-10)
        assert found.norms.change == pytest.approx(float(change.norm()), rel=1e-8)
        values = torch.linalg.svdvals(dense_state(state) + change)[: found.sigma.numel()]
        assert relative(found.sigma, values) <= 1e-10
