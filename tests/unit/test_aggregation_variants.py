"""Variants of glora against plain dense formulas: normalised energy, votes by rank, the anchor, rank by energy."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from dense_reference import dense_round, dense_state
from lora_cases import randn, random_update, regauged
from strategy_reference import delta_w, florist_rank, mean_update, shares
from torch import Tensor

from glora_server.aggregation import (
    ClientUpdate,
    aggregate,
    aggregate_with_options,
    canonical_state,
    check_options,
    readout,
)
from glora_server.aggregation import errors as e
from glora_server.aggregation.subspace import energy_rank

D, N = 18, 15


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def updates_of(ranks: tuple[int, ...], seed: int = 0) -> list[ClientUpdate]:
    g = generator(seed)
    return [random_update(g, D, N, r) for r in ranks]


def projected(k: Tensor, mean: Tensor, rank: int) -> Tensor:
    """P·M with P on the top eigenvectors of K."""
    basis = torch.linalg.eigh(k).eigenvectors[:, -rank:]
    inside: Tensor = basis @ (basis.T @ mean)
    return inside


def column_projector(x: Tensor) -> Tensor:
    u, sigma, _ = torch.linalg.svd(x, full_matrices=False)
    u = u[:, sigma > 1e-10 * sigma[0]]
    projector: Tensor = u @ u.T
    return projector


def weighted(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(0)


def folded(updates: Sequence[ClientUpdate], rank: int, **options: str | float | None) -> Tensor:
    given = {"rule": "replace", **options}
    return dense_state(aggregate_with_options("glora", None, updates, rank=rank, options=given).state)


def test_normalised_energy_agrees_with_the_dense_reference() -> None:
    updates = updates_of((2, 4, 3))
    units = [delta_w(u) / delta_w(u).norm() for u in updates]
    k = weighted([x @ x.T for x in units], shares(updates))
    found = folded(updates, 5, subspace="normalised_energy")
    assert torch.allclose(found, projected(k, mean_update(updates), 5), atol=1e-9)
    other = regauged(updates, generator(), 100.0)
    assert torch.allclose(found, folded(other, 5, subspace="normalised_energy"), atol=1e-8)


def test_normalised_energy_bounds_what_a_loud_client_can_do() -> None:
    updates = updates_of((2, 2, 2))
    loud = [replace(updates[0], b=1e4 * updates[0].b), *updates[1:]]
    spaces = {}
    for subspace in ("normalised_energy", "energy"):
        quiet, shouted = (
            aggregate("glora", None, given, rank=3, rule="replace", subspace=subspace).state.u
            for given in (updates, loud)
        )
        spaces[subspace] = float((quiet @ quiet.T - shouted @ shouted.T).norm())
    assert spaces["normalised_energy"] < 1e-8
    assert spaces["energy"] > 0.1


@pytest.mark.parametrize("subspace", ["projector", "ridge", "energy", "normalised_energy"])
def test_votes_by_rank_agree_with_the_dense_reference(subspace: str) -> None:
    """R = 3: what the client of rank 5 has outside the others is one eigenvalue, 2-fold, and R = 4 would cut it."""
    updates = updates_of((1, 5, 2))
    p, ranks = shares(updates), [u.rank for u in updates]
    mean_rank = sum(w * r for w, r in zip(p, ranks, strict=True))
    parts = []
    for u in updates:
        left, sigma, _ = torch.linalg.svd(delta_w(u), full_matrices=False)
        left, sigma = left[:, : u.rank], sigma[: u.rank]
        votes = {
            "projector": torch.ones_like(sigma),
            "ridge": sigma**2 / (sigma**2 + 0.01 * sigma[0] ** 2),
            "energy": sigma**2,
            "normalised_energy": sigma**2 / (sigma**2).sum(),
        }[subspace]
        parts.append(left @ torch.diag(votes) @ left.T)
    k = weighted(parts, [w * mean_rank / r for w, r in zip(p, ranks, strict=True)])
    found = aggregate("glora", None, updates, rank=3, rule="replace", subspace=subspace, votes="by_rank")
    assert torch.allclose(dense_state(found.state), projected(k, mean_update(updates), 3), atol=1e-9)
    assert found.diagnostics.eigenvalues == pytest.approx(torch.linalg.eigvalsh(k).flip(0)[:3].tolist())


def test_votes_by_rank_change_nothing_when_ranks_are_equal_and_skip_zero_updates() -> None:
    updates = updates_of((3, 3, 3))
    assert torch.allclose(folded(updates, 4, votes="by_rank"), folded(updates, 4), atol=1e-10)
    idle = replace(updates[0], b=torch.zeros_like(updates[0].b))
    assert torch.allclose(folded([idle, *updates[1:]], 4, votes="by_rank"), folded([idle, *updates[1:]], 4), atol=1e-10)


def test_a_client_of_high_rank_loses_its_extra_votes() -> None:
    """Rank inflation: noise columns buy votes in the projector; with votes by rank they dilute each other."""
    g = generator(4)
    honest, attacker = randn(g, D, 2), randn(g, D, 12)
    clients = [ClientUpdate(honest, randn(g, 2, N), 1.0, 1.0), ClientUpdate(attacker, randn(g, 12, N), 1.0, 1.1)]
    frame = torch.linalg.qr(honest).Q
    kept = {}
    for votes in ("equal", "by_rank"):
        u = aggregate("glora", None, clients, rank=6, rule="replace", votes=votes).state.u
        kept[votes] = float((u.T @ frame).norm() ** 2) / 2
    assert kept["by_rank"] > 0.99 > kept["equal"]


@pytest.mark.parametrize("rule", ["replace", "delta"])
@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_the_anchor_agrees_with_the_dense_reference(rule: str, beta: float) -> None:
    g = generator(3)
    state = canonical_state(randn(g, D, 4), randn(g, 4, N), rank=4)
    s = dense_state(state)
    updates = [replace(u, sent=readout(state, u.rank, u.scale)) for u in updates_of((2, 4, 3), seed=2)]
    said = [delta_w(u) if rule == "replace" else s + delta_w(u) - delta_w(_sent(u)) for u in updates]
    k = (1 - beta) * weighted([column_projector(x) for x in said], shares(updates)) + beta * state.u @ state.u.T
    expected = projected(k, weighted(said, shares(updates)), 5)
    found = aggregate("glora", state, updates, rank=5, rule=rule, anchor=beta)
    assert torch.allclose(dense_state(found.state), expected, atol=1e-9)
    other = aggregate("glora", state, regauged(updates, g, 50.0), rank=5, rule=rule, anchor=beta)
    assert torch.allclose(dense_state(other.state), expected, atol=1e-8)


def _sent(update: ClientUpdate) -> ClientUpdate:
    assert update.sent is not None
    return replace(update, b=update.sent[0], a=update.sent[1])


def test_the_anchor_steadies_the_space_and_does_nothing_at_the_start() -> None:
    g = generator(5)
    state = canonical_state(randn(g, D, 4), randn(g, 4, N), rank=4)
    updates = updates_of((4, 4), seed=3)
    turned = {
        beta: aggregate("glora", state, updates, rank=4, rule="replace", anchor=beta).diagnostics.angles
        for beta in (None, 0.3, 0.95)
    }
    free, some, firm = (angles.mean for angles in turned.values() if angles is not None)
    assert free > some > firm
    assert firm < 0.05 * free
    assert torch.allclose(folded(updates, 4, anchor=0.9), folded(updates, 4), atol=1e-10)


def test_untouched_readouts_leave_an_anchored_state_as_it_is() -> None:
    g = generator(6)
    state = canonical_state(randn(g, D, 5), randn(g, 5, N), rank=5)
    idle = [ClientUpdate(*readout(state, r, 1.0), 1.0, 1.0, sent=readout(state, r, 1.0)) for r in (2, 5, 3)]
    new = aggregate("glora", state, idle, rank=6, anchor=0.5, votes="by_rank").state
    assert torch.allclose(dense_state(new), dense_state(state), atol=1e-9)


@pytest.mark.parametrize("subspace", ["energy", "normalised_energy", "mean"])
def test_the_anchor_is_refused_where_votes_are_energies(subspace: str) -> None:
    with pytest.raises(e.OptionError, match="anchor"):
        check_options("glora", {"subspace": subspace, "anchor": 0.5})


@pytest.mark.parametrize("subspace", ["projector", "ridge", "energy", "normalised_energy", "mean"])
@pytest.mark.parametrize("energy", [0.6, 0.95, 1.0])
def test_the_rank_follows_the_energy_of_the_mean(subspace: str, energy: float) -> None:
    updates = updates_of((2, 4, 3))
    wanted = florist_rank(mean_update(updates), energy) if energy < 1 else 9
    state = aggregate("glora", None, updates, rank=12, rule="replace", subspace=subspace, energy=energy).state
    assert state.rank == wanted
    if subspace in {"projector", "ridge", "energy"}:
        dense = dense_round(updates, rank=wanted, subspace=subspace)
        assert torch.allclose(dense_state(state), dense.s, atol=1e-9)
    assert aggregate("glora", None, updates, rank=2, rule="replace", energy=energy).state.rank <= 2


@pytest.mark.parametrize(
    ("sigma", "energy", "rank"),
    [([1.0, 1.0], 0.5, 1), ([1.0, 1.0], 0.51, 2), ([2.0, 1.0, 0.0], 1.0, 2), ([0.0, 0.0], 0.5, 1), ([3.0], 1e-9, 1)],
)
def test_the_fewest_directions_with_the_energy(sigma: list[float], energy: float, rank: int) -> None:
    assert energy_rank(torch.tensor(sigma, dtype=torch.float64), energy) == rank


def test_a_round_of_zeros_has_no_energy_to_share_out() -> None:
    zero = [replace(u, b=torch.zeros_like(u.b)) for u in updates_of((2, 3))]
    for options in ({"energy": 0.9}, {"votes": "by_rank"}, {"subspace": "normalised_energy"}, {"anchor": 0.5}):
        assert float(folded(zero, 4, **options).norm()) == 0.0
