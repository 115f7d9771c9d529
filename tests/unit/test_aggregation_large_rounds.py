"""Strategies that average factors, in rounds so large that parts of their diagnostics are estimated.

The same numbers as float64 uploads are diagnosed exactly, which is what the estimates are compared with.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from dense_reference import dense_state
from lora_cases import randn, regauged
from strategy_cases import model, orthogonally_regauged
from strategy_reference import fedrot

from glora_server.aggregation import AggregationResult, ClientUpdate, aggregate

RANK, COUNT = 8, 40
OWN_A = ("fedit", "fedrot", "hetlora", "lora_fair")
COMMON_A = ("ffa", "rolora", "fedsvd")


def uploads(*, common_a: bool, ranks: Sequence[int] = (RANK,)) -> list[ClientUpdate]:
    """Devices that share most of their column space; float32."""
    g = torch.Generator().manual_seed(11)
    shared, rows = randn(g, 96, RANK), randn(g, RANK, 72)
    found = []
    for i in range(COUNT):
        r = ranks[i % len(ranks)]
        b = shared @ randn(g, RANK, r) / RANK**0.5 + 0.2 * randn(g, 96, r)
        a = rows[:r] if common_a else rows[:r] + 0.3 * randn(g, r, 72)
        found.append(ClientUpdate(b.float(), a.float(), 0.5, 1.0 + i % 3))
    return found


def folded(name: str, updates: Sequence[ClientUpdate]) -> AggregationResult:
    return aggregate(name, None, updates, rank=RANK)


def widened(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    return [replace(update, b=update.b.double(), a=update.a.double()) for update in updates]


@pytest.mark.parametrize("name", [*OWN_A, *COMMON_A])
def test_the_state_is_the_exact_one_and_diagnostics_are_near_it(name: str) -> None:
    updates = uploads(common_a=name in COMMON_A)
    estimated, exact = folded(name, updates), folded(name, widened(updates))
    torch.testing.assert_close(dense_state(estimated.state), dense_state(exact.state), rtol=1e-4, atol=1e-5)
    assert {key: tuple(value.shape) for key, value in estimated.state.extra.items()} == {
        key: tuple(value.shape) for key, value in exact.state.extra.items()
    }
    ours, theirs = estimated.diagnostics, exact.diagnostics
    assert ours.sigma == pytest.approx(theirs.sigma, rel=1e-5)
    assert ours.coverage == theirs.coverage
    assert ours.eigenvalues == ()
    assert ours.eigengap is None
    assert ours.mean_norm == pytest.approx(theirs.mean_norm, rel=0.05)
    assert ours.captured_energy == pytest.approx(theirs.captured_energy, rel=0.1)
    assert ours.truncation_error == pytest.approx(theirs.truncation_error, rel=0.15, abs=1e-6)
    for one, other in zip(ours.clients, theirs.clients, strict=True):
        assert (one.rank, one.votes) == (other.rank, None)
        assert one.share == pytest.approx(other.share)
        assert one.update_norm == pytest.approx(other.update_norm, rel=1e-5)
        assert one.change_norm == pytest.approx(other.change_norm, rel=1e-5)
        assert one.capture == pytest.approx(other.capture, abs=1e-5)
        assert abs(one.cosine - other.cosine) <= 0.35
        assert abs(one.change_cosine - other.change_cosine) <= 0.35


@pytest.mark.parametrize("name", [*OWN_A, *COMMON_A])
def test_cosines_are_right_on_average(name: str) -> None:
    updates = uploads(common_a=name in COMMON_A)
    estimated, exact = folded(name, updates).diagnostics.clients, folded(name, widened(updates)).diagnostics.clients
    mean = sum(client.cosine for client in exact) / COUNT
    assert mean > 0.1  # so that zeros would not do
    assert sum(client.cosine for client in estimated) / COUNT == pytest.approx(mean, abs=0.03)


def test_mixed_ranks_keep_their_places() -> None:
    updates = uploads(common_a=False, ranks=(8, 3, 7, 8))
    estimated, exact = folded("hetlora", updates), folded("hetlora", widened(updates))
    assert [client.rank for client in estimated.diagnostics.clients] == [update.rank for update in updates]
    norms = [client.update_norm for client in exact.diagnostics.clients]
    assert [client.update_norm for client in estimated.diagnostics.clients] == pytest.approx(norms, rel=1e-5)


def test_identical_devices_lose_nothing_and_agree() -> None:
    found = folded("fedit", uploads(common_a=False)[:1] * COUNT).diagnostics
    assert found.truncation_error == 0.0
    assert found.captured_energy == pytest.approx(1.0, abs=1e-5)
    assert [client.cosine for client in found.clients] == pytest.approx([1.0] * COUNT, abs=1e-5)


def test_zero_updates_are_a_zero_state() -> None:
    found = folded("fedit", [replace(u, b=torch.zeros_like(u.b)) for u in uploads(common_a=False)])
    assert found.state.rank == 0
    assert (found.diagnostics.mean_norm, found.diagnostics.truncation_error) == (0.0, 0.0)
    assert all(
        (client.update_norm, client.cosine, client.capture) == (0.0, 0.0, 1.0) for client in found.diagnostics.clients
    )


def test_bad_gauges_do_not_spoil_the_norms() -> None:
    updates = uploads(common_a=False)
    norms = [client.update_norm for client in folded("fedit", updates).diagnostics.clients]
    turned = regauged(updates, torch.Generator().manual_seed(5), 1e4)
    assert [client.update_norm for client in folded("fedit", turned).diagnostics.clients] == pytest.approx(
        norms, rel=1e-2
    )
    assert all(math.isfinite(client.cosine) for client in folded("fedit", turned).diagnostics.clients)


@pytest.mark.parametrize("kind", ["orthogonal", "special", "soft"])
def test_fedrot_rotates_a_large_round_as_the_dense_reference_does(kind: str) -> None:
    updates = uploads(common_a=False)
    state = folded("fedrot", updates).state
    turned = [
        replace(u, b=u.b.float(), a=u.a.float())
        for u in orthogonally_regauged(widened(updates), torch.Generator().manual_seed(5))
    ]
    result = aggregate("fedrot", state, turned, rank=RANK, round_index=1, rotation=kind)
    expected = fedrot(turned, (state.extra["b"].double(), state.extra["a"].double()), on_a=True, rotation=kind)
    torch.testing.assert_close(model(result.state).double(), expected, rtol=1e-4, atol=1e-4)
    plain = aggregate("fedit", None, turned, rank=RANK).state
    assert not torch.allclose(model(plain).double(), expected, atol=0.1)
