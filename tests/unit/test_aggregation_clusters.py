"""`accuracy="fast"` where an iteration has it hard: many directions of nearly equal votes, from devices in clusters.

The devices of a cluster share one column space, so K has as many (nearly) equal eigenvalues as clusters have columns.
Where those are more than the iteration has columns, its steps gain little for a while.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from glora_server.aggregation import AggregationResult, ClientUpdate, LayerState, aggregate
from glora_server.aggregation.fast import span
from glora_server.aggregation.fast.intake import VoteRule, module_round, read_groups
from glora_server.aggregation.fast.span import pays, prefers_gram
from glora_server.aggregation.rules import Rule
from glora_server.aggregation.subspace import Subspace, Voting

WIDTH, RANK, DEVICES = 16, 32, 120


def clustered(d: int, clusters: int, noise: float, *, tilt: float = 0.0, seed: int = 1) -> list[ClientUpdate]:
    """Devices of `clusters` orthogonal spaces, each with noise of its own; `tilt`: how much more the next weighs."""
    g = torch.Generator().manual_seed(seed)
    spaces = torch.linalg.qr(torch.randn(d, clusters * WIDTH, generator=g)).Q.split(WIDTH, dim=1)
    found = []
    for i in range(DEVICES):
        own = 4 * noise * torch.randn(d, WIDTH, generator=g) / d**0.5
        b = spaces[i % clusters] @ torch.randn(WIDTH, WIDTH, generator=g) + own
        found.append(ClientUpdate(b, torch.randn(WIDTH, 64, generator=g), 1.0, 1.0 + tilt * (i % clusters)))
    return found


def folded(updates: Sequence[ClientUpdate], state: LayerState | None = None) -> AggregationResult:
    return aggregate("glora", state, updates, rank=RANK, rule="replace", accuracy="fast")


def dense_votes(updates: Sequence[ClientUpdate]) -> Tensor:
    """K (d×d), float64."""
    total = sum(u.weight for u in updates)
    units = [torch.linalg.qr(u.b.double()).Q for u in updates]
    return sum(
        (u.weight / total * unit @ unit.mT for u, unit in zip(updates, units, strict=True)),
        torch.zeros(len(updates[0].b), len(updates[0].b), dtype=torch.float64),
    )


def check(result: AggregationResult, updates: Sequence[ClientUpdate]) -> None:
    votes = dense_votes(updates)
    best, u = torch.linalg.eigvalsh(votes).flip(0), result.state.u.double()
    assert float((u.mT @ votes @ u).trace()) >= 0.99 * float(best[:RANK].sum())
    seen = torch.tensor(result.diagnostics.eigenvalues)
    assert bool((seen <= best[:RANK] * 1.005).all()), "no Ritz value is larger than its eigenvalue"
    assert float(seen.sum()) == pytest.approx(float(best[:RANK].sum()), rel=0.02)


def test_these_rounds_iterate() -> None:
    rule = VoteRule(rule=Rule.REPLACE, eta=1.0, rank_tol=1e-5, voting=Voting(subspace=Subspace.PROJECTOR))
    updates = clustered(512, 8, 0.05)
    groups = read_groups(rule, [module_round(rule, None, updates, [1 / DEVICES] * DEVICES)], stack=False)
    assert pays(groups, RANK)
    assert not prefers_gram(groups, RANK)


@pytest.mark.parametrize("tilt", [0.0, 0.02])
@pytest.mark.parametrize(("clusters", "noise"), [(4, 0.0), (8, 0.05), (14, 0.01), (20, 0.01), (28, 0.01)])
def test_the_first_round_of_clusters(clusters: int, noise: float, tilt: float) -> None:
    updates = clustered(512, clusters, noise, tilt=tilt)
    check(folded(updates), updates)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("before", [2, 20])
def test_a_round_that_has_nothing_to_do_with_the_one_before(before: int, seed: int) -> None:
    """Steps that find little that is new once lost orthogonality, and then found the same directions again."""
    state = folded(clustered(512, before, 0.05, seed=9)).state
    updates = clustered(512, 8, 0.05, seed=seed)
    check(folded(updates, state), updates)


@pytest.mark.parametrize(("subspace", "least"), [("projector", 0.99), ("energy", 1 - 1e-6), ("mean", 1 - 1e-6)])
def test_coefficients_that_took_too_much_memory_are_computed_anew(
    monkeypatch: pytest.MonkeyPatch, subspace: str, least: float
) -> None:
    updates = clustered(512, 8, 0.05)
    kept = aggregate("glora", None, updates, rank=RANK, rule="replace", subspace=subspace, accuracy="fast").state
    monkeypatch.setattr(span, "_KEPT_VALUES", 0)
    anew = aggregate("glora", None, updates, rank=RANK, rule="replace", subspace=subspace, accuracy="fast")
    cosines = torch.linalg.svdvals(kept.u.double().mT @ anew.state.u.double())
    assert float(cosines.square().mean()) > least
    if subspace == "projector":
        check(anew, updates)
