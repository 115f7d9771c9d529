"""`accuracy="fast"`: the objective against dense float64 matrices, and the invariants at the tolerances of float32.

LARGE goes the way of many columns (block Krylov), SMALL the way of few (Gram matrix); which is checked, not assumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from dense_reference import dense_round, dense_state, product, said, vote
from lora_cases import randn, regauged
from torch import Tensor

from glora_server.aggregation import (
    AggregationResult,
    ClientUpdate,
    LayerState,
    OptionValue,
    aggregate,
    aggregate_with_options,
    canonical_state,
    readout,
)
from glora_server.aggregation.fast.intake import VoteRule, module_round, read_groups
from glora_server.aggregation.fast.span import pays, prefers_gram
from glora_server.aggregation.rules import Rule
from glora_server.aggregation.subspace import Subspace, Voting

SUBSPACES = ("projector", "ridge", "energy", "normalised_energy", "mean")
RULES = ("replace", "delta", "frozen_tail", "accumulate")
RANK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How many devices and how large a module."""

    d: int
    n: int
    count: int


LARGE = Size(d=112, n=48, count=40)
SMALL = Size(d=64, n=40, count=4)
sizes = pytest.mark.parametrize("size", [LARGE, SMALL], ids=["large", "small"])


def start_state(size: Size, *, decay: float = -1.0) -> LayerState:
    g = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(randn(g, rows, RANK)).Q for rows in (size.d, size.n))
    sigma = torch.logspace(0, decay, RANK, dtype=torch.float64)
    return canonical_state((left * sigma).float(), right.T.float(), rank=RANK)


def rendered(state: LayerState, rank: int, wire: torch.dtype, *, version: int = 0) -> tuple[Tensor, Tensor]:
    """What a device of that rank is sent."""
    b, a = readout(state, rank, 0.5, version=version)
    return b.to(wire), a.to(wire)


def trained(
    size: Size, state: LayerState, *, noise: float = 0.3, ranks: Sequence[int] = (4,), wire: torch.dtype = torch.float32
) -> list[ClientUpdate]:
    """Readouts with Gaussian changes of that relative size."""
    g = torch.Generator().manual_seed(4)
    updates = []
    sent = {rank: rendered(state, rank, wire) for rank in set(ranks)}
    for i in range(size.count):
        b0, a0 = sent[ranks[i % len(ranks)]]
        b = (b0.double() + noise * float(b0.double().std()) * randn(g, *b0.shape)).to(wire)
        a = (a0.double() + noise * float(a0.double().std()) * randn(g, *a0.shape)).to(wire)
        updates.append(ClientUpdate(b, a, 0.5, float(1 + i % 3), sent=(b0, a0)))
    return updates


def fast(state: LayerState | None, updates: Sequence[ClientUpdate], **options: OptionValue) -> AggregationResult:
    return aggregate_with_options("glora", state, updates, rank=RANK, options={"accuracy": "fast", **options})


def dense_votes(state: LayerState, updates: Sequence[ClientUpdate], rule: str, subspace: str) -> tuple[Tensor, Tensor]:
    """K and M, dense."""
    total = sum(update.weight for update in updates)
    s = dense_state(state)
    xs = [said(rule, s, update) for update in updates]
    mean = sum((u.weight / total * x for u, x in zip(updates, xs, strict=True)), torch.zeros_like(s))
    if subspace == "mean":
        return mean @ mean.T, mean
    k = torch.zeros(s.shape[0], s.shape[0], dtype=torch.float64)
    for update, x in zip(updates, xs, strict=True):
        size = max(float(torch.linalg.matrix_norm(part, ord=2)) for part in (x, s))
        unit = x / torch.linalg.matrix_norm(x) if subspace == "normalised_energy" else x
        scale = float(torch.linalg.matrix_norm(x)) if subspace == "normalised_energy" else 1.0
        rule_name = "energy" if subspace == "normalised_energy" else subspace
        k += update.weight / total * vote(unit, rule_name, threshold=1e-5 * size / scale, tau=0.1)
    return k, mean


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(actual - expected) / torch.linalg.matrix_norm(expected))


def test_the_two_sizes_go_the_two_ways() -> None:
    for size, gram in ((LARGE, False), (SMALL, True)):
        state = start_state(size)
        rule = VoteRule(rule=Rule.DELTA, eta=1.0, rank_tol=1e-5, voting=Voting(subspace=Subspace.PROJECTOR))
        updates = trained(size, state)
        module = module_round(rule, state, updates, [1 / size.count] * size.count)
        groups = read_groups(rule, [module], stack=False)
        assert prefers_gram(groups, RANK) is gram
        assert pays(groups, RANK)


@sizes
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_objective_is_within_one_percent_of_the_optimum(size: Size, subspace: str, rule: str) -> None:
    """Σ of the eigenvalues of K that the space holds; noise so strong that the spectrum beyond R is flat."""
    state = start_state(size)
    updates = trained(size, state, noise=1.0)
    reference_rule = "delta" if rule == "frozen_tail" else rule
    k, mean = dense_votes(state, updates, reference_rule, subspace)
    result = fast(state, updates, rule=rule, subspace=subspace).state
    u = result.u.double()
    assert torch.allclose(u.T @ u, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-6)
    best = float(torch.linalg.eigvalsh(k)[-RANK:].sum())
    assert float(torch.trace(u.T @ k @ u)) >= 0.99 * best
    assert relative(dense_state(result), u @ (u.T @ mean)) <= 2e-6


@sizes
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_error_is_within_one_percent_of_the_exact_one(size: Size, subspace: str, wire: torch.dtype) -> None:
    state = start_state(size)
    updates = trained(size, state, noise=0.5, ranks=(2, 4, 8), wire=wire)
    _, mean = dense_votes(state, updates, "delta", "mean")
    exact = aggregate("glora", state, updates, rank=RANK, subspace=subspace)
    result = fast(state, updates, subspace=subspace)
    assert relative(dense_state(result.state), mean) <= 1.01 * relative(dense_state(exact.state), mean)


@sizes
@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("condition", [100.0, 1e6])
def test_gauges_do_not_matter(size: Size, subspace: str, condition: float) -> None:
    """The factors are float32 in a new gauge, so they differ from the old ones by 6e-8·condition before we see them."""
    state = start_state(size)
    updates = trained(size, state, noise=0.3)
    other = regauged(updates, torch.Generator().manual_seed(9), condition)
    expected = dense_state(aggregate("glora", state, other, rank=RANK, subspace=subspace).state)
    assert relative(dense_state(fast(state, other, subspace=subspace).state), expected) <= 5e-3
    if condition < 1e3:
        plain = dense_state(fast(state, updates, subspace=subspace).state)
        assert relative(dense_state(fast(state, other, subspace=subspace).state), plain) <= 1e-3


@sizes
@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_i12_untouched_readouts_leave_the_state_untouched(size: Size, wire: torch.dtype, subspace: str) -> None:
    """Five rounds; the spectrum of S reaches far below the rounding of the coarse wire."""
    start = start_state(size, decay=-3.0)
    state = start
    for version in range(5):
        sent = [rendered(state, r, wire, version=version) for r in (2, 4, 8)]
        updates = [ClientUpdate(*sent[i % 3], 0.5, 1.0, sent=sent[i % 3]) for i in range(size.count)]
        state = fast(state, updates, subspace=subspace).state
    assert state.rank == RANK
    assert relative(dense_state(state), dense_state(start)) <= 1e-5
    assert torch.allclose(start.sigma, state.sigma, rtol=2e-3)


@sizes
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_identical_devices_give_their_update_and_idle_ones_dilute_it(size: Size, subspace: str) -> None:
    g = torch.Generator().manual_seed(5)
    update = ClientUpdate(randn(g, size.d, 4).float(), randn(g, 4, size.n).float(), 0.7, 1.0)
    same = [replace(u, weight=1.0) for u in regauged([update] * size.count, g, 20.0)]
    expected = product(update.b, update.a, update.scale)
    assert relative(dense_state(fast(None, same, rule="replace", subspace=subspace).state), expected) <= 1e-5
    idle = [replace(u, b=torch.zeros_like(u.b)) for u in same]
    result = fast(None, [*same, *idle], rule="replace", subspace=subspace)
    assert relative(dense_state(result.state), expected / 2) <= 1e-5
    assert {client.votes for client in result.diagnostics.clients[size.count :]} == {0}
    nothing = fast(None, idle, rule="replace", subspace=subspace)
    assert nothing.state.rank == 0
    assert nothing.diagnostics.captured_energy == 1.0


@sizes
@pytest.mark.parametrize("rule", RULES)
def test_diagnostics_agree_with_the_exact_ones(size: Size, rule: str) -> None:
    """Cores to float32; what is estimated from 16 probes within about three of its deviations."""
    state = start_state(size)
    updates = trained(size, state, noise=0.3, ranks=(2, 4, 8))
    exact = aggregate("glora", state, updates, rank=RANK, rule=rule).diagnostics
    found = fast(state, updates, rule=rule).diagnostics
    assert found.eigenvalues == pytest.approx(exact.eigenvalues, rel=0.02)
    assert found.coverage == exact.coverage
    assert found.sigma == pytest.approx(exact.sigma, rel=0.02)
    assert found.mean_norm == pytest.approx(exact.mean_norm, rel=0.1)
    assert found.captured_energy == pytest.approx(exact.captured_energy, abs=0.1)
    for one, other in zip(found.clients, exact.clients, strict=True):
        assert (one.rank, one.votes, one.share) == (other.rank, other.votes, other.share)
        assert one.update_norm == pytest.approx(other.update_norm, rel=1e-4)
        assert one.change_norm == pytest.approx(other.change_norm, rel=2e-3)
        assert one.capture == pytest.approx(other.capture, abs=5e-3)
        assert abs(one.cosine - other.cosine) <= 0.35
        assert abs(one.change_cosine - other.change_cosine) <= 0.35


@sizes
def test_small_changes_are_measured_although_float32_sums_would_lose_them(size: Size) -> None:
    state = start_state(size)
    updates = trained(size, state, noise=1e-4)
    exact = aggregate("glora", state, updates, rank=RANK).diagnostics
    found = fast(state, updates).diagnostics
    for one, other in zip(found.clients, exact.clients, strict=True):
        assert one.change_norm == pytest.approx(other.change_norm, rel=1e-2)


@sizes
def test_same_bits_twice_and_order_does_not_matter(size: Size) -> None:
    state = start_state(size)
    updates = trained(size, state, noise=0.3, ranks=(2, 4, 8))
    first, second = fast(state, updates), fast(state, updates)
    assert torch.equal(first.state.u, second.state.u)
    assert torch.equal(first.state.a, second.state.a)
    assert first.diagnostics == second.diagnostics
    turned = fast(state, updates[::-1])
    assert relative(dense_state(turned.state), dense_state(first.state)) <= 1e-3
    assert [c.votes for c in turned.diagnostics.clients] == [c.votes for c in first.diagnostics.clients[::-1]]


@pytest.mark.parametrize("options", [{"anchor": 0.3}, {"votes": "by_rank"}, {"energy": 0.9}, {"rank_tol": 1e-8}])
def test_what_fast_does_not_do_is_computed_exactly(options: dict[str, OptionValue]) -> None:
    state = start_state(LARGE)
    updates = trained(LARGE, state, ranks=(2, 4))
    expected = aggregate_with_options("glora", state, updates, rank=RANK, options=options)
    assert torch.equal(fast(state, updates, **options).state.a, expected.state.a)


def test_float64_uploads_are_computed_exactly() -> None:
    state = start_state(LARGE)
    updates = trained(LARGE, state, wire=torch.float64)
    found = fast(state, updates).state
    assert found.a.dtype == torch.float64
    assert torch.equal(found.a, aggregate("glora", state, updates, rank=RANK).state.a)


def test_a_server_step_other_than_one_is_honoured() -> None:
    """With η ≠ 1 all of S stays in the tail and the uploads lie almost inside of it."""
    state = start_state(LARGE)
    updates = trained(LARGE, state, noise=1e-3)
    for eta in (0.3, 1.5):
        exact = dense_state(aggregate("glora", state, updates, rank=RANK, eta=eta, subspace="energy").state)
        assert relative(dense_state(fast(state, updates, eta=eta, subspace="energy").state), exact) <= 1e-5


@pytest.mark.parametrize("subspace", ["projector", "ridge"])
def test_exact_agrees_with_the_dense_reference_where_it_uses_k_in_coordinates(subspace: str) -> None:
    """So many directions that `subspace` takes eigenvectors of ZZᵀ in place of an SVD of Z; float64 throughout."""
    g = torch.Generator().manual_seed(6)
    common = randn(g, 150, 8)
    updates = [
        ClientUpdate(torch.cat([common @ randn(g, 8, 3), 0.3 * randn(g, 150, 1)], dim=1), randn(g, 4, 60), 1.0, 1.0)
        for _ in range(40)
    ]
    dense = dense_round(updates, rank=RANK, subspace=subspace)
    assert dense.gap > 0.05
    found = aggregate("glora", None, updates, rank=RANK, rule="replace", subspace=subspace)
    assert relative(dense_state(found.state), dense.s) <= 1e-10
    assert found.diagnostics.eigenvalues == pytest.approx(dense.eigenvalues[:RANK].tolist(), rel=1e-10)
