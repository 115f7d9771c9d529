"""Where `accuracy="fast"` changes its way of computing: cheap bounds or eigenvectors, uploads as they are or remade."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from dense_reference import dense_state
from lora_cases import randn, regauged
from torch import Tensor

from glora_server.aggregation import ClientUpdate, LayerState, aggregate
from glora_server.aggregation.fast.cores import Beyond
from glora_server.aggregation.fast.intake import Group, VoteRule, module_round, read_groups
from glora_server.aggregation.rules import Rule
from glora_server.aggregation.subspace import Subspace, Voting

D, N, COUNT, RANK = 112, 48, 40, 8
PROJECTOR = VoteRule(rule=Rule.REPLACE, eta=1.0, rank_tol=1e-5, voting=Voting(subspace=Subspace.PROJECTOR))


def with_spectrum(seed: int, sigma: Sequence[float]) -> ClientUpdate:
    """ΔW with these singular values, from balanced float32 factors."""
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor(sigma, dtype=torch.float64)
    left, right = (torch.linalg.qr(randn(g, rows, len(sigma))).Q for rows in (D, N))
    return ClientUpdate((left * values.sqrt()).float(), (right * values.sqrt()).mT.float(), 1.0, 1.0)


def groups_of(updates: Sequence[ClientUpdate]) -> tuple[Group, ...]:
    module = module_round(PROJECTOR, None, updates, [1 / len(updates)] * len(updates))
    return read_groups(PROJECTOR, [module], stack=False)


def alike(g: torch.Generator) -> list[ClientUpdate]:
    """Orthonormal B near a common space of four dimensions, so that K has a gap there."""
    common = randn(g, D, 4)
    return [
        ClientUpdate(torch.linalg.qr(common + 0.5 * randn(g, D, 4)).Q.float(), randn(g, 4, N).float(), 1.0, 1.0)
        for _ in range(COUNT)
    ]


def fast(updates: Sequence[ClientUpdate]) -> LayerState:
    """A round at the rank of the common space."""
    return aggregate("glora", None, updates, rank=4, rule="replace", accuracy="fast").state


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(actual - expected) / torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize(("smallest", "votes"), [(1e-4, 4), (2e-5, 4), (5e-6, 3), (1e-7, 3), (0.0, 3)])
def test_a_direction_below_the_tolerance_has_no_vote_and_one_above_has(smallest: float, votes: int) -> None:
    """τ = 1e-5; bounds may call for eigenvectors but must never count a direction that these would not."""
    updates = [with_spectrum(seed, (1.0, 0.5, 0.2, smallest)) for seed in range(COUNT)]
    result = aggregate("glora", None, updates, rank=RANK, rule="replace", accuracy="fast")
    assert {client.votes for client in result.diagnostics.clients} == {votes}
    exact = aggregate("glora", None, updates, rank=RANK, rule="replace")
    assert {client.votes for client in exact.diagnostics.clients} == {votes}


def test_one_device_that_needs_eigenvectors_changes_nothing_for_the_others() -> None:
    plain = [with_spectrum(seed, (1.0, 0.8, 0.6, 0.4)) for seed in range(COUNT)]
    odd = [replace(plain[0], b=torch.zeros_like(plain[0].b), weight=1e-12), *plain[1:]]
    first, second = groups_of(plain)[0], groups_of(odd)[0]
    assert torch.allclose(first.core()[:, 1:], second.core()[:, 1:], rtol=1e-5, atol=1e-7)
    assert first.votes[0].tolist() == [4] * COUNT
    assert second.votes[0].tolist() == [0] + [4] * (COUNT - 1)


@pytest.mark.parametrize("condition", [1.0, 3.0, 30.0, 1e3, 1e5])
def test_uploads_are_used_as_they_are_only_where_that_is_safe(condition: float) -> None:
    """Both kinds in one round: half of the devices keep orthogonal columns, the others have a gauge of `condition`.

    From a condition of about 1e3 on, products cancel and devices are refactored, after which they are plain again.
    """
    g = torch.Generator().manual_seed(1)
    updates = alike(g)
    mixed = [*updates[: COUNT // 2], *regauged(updates[COUNT // 2 :], g, condition)]
    plain = groups_of(mixed)[0].units.plain[0]
    assert bool(plain[: COUNT // 2].all())
    assert bool(plain.all()) is (condition != 30.0)
    assert relative(dense_state(fast(mixed)), dense_state(fast(updates))) <= 2e-3


def test_columns_of_extreme_size_are_remade() -> None:
    """Their squares would overflow the float32 cores; the product is ordinary."""
    updates = alike(torch.Generator().manual_seed(3))
    for size in (1e-15, 1e15):
        scaled = [replace(u, b=u.b * size, a=u.a / size) for u in updates]
        assert not bool(groups_of(scaled)[0].units.plain.any())
        assert relative(dense_state(fast(scaled)), dense_state(fast(updates))) <= 2e-3


def test_both_factorisations_say_the_same() -> None:
    g = torch.Generator().manual_seed(2)
    columns = randn(g, 1, 5, D, 4)
    gram = columns.mT @ columns / D
    singular = gram.clone()
    singular[0, 0] = 0.0
    by_cholesky, by_eigenvectors = Beyond.of(gram), Beyond.of(singular)
    for found, others in ((by_cholesky, slice(0, 5)), (by_eigenvectors, slice(1, 5))):
        fold, lift = found.fold[:, others], found.lift[:, others]
        assert torch.allclose(fold.mT @ fold, gram[:, others], atol=1e-12)
        assert torch.allclose(fold @ lift, torch.eye(4, dtype=torch.float64).expand_as(fold), atol=1e-10)
        smallest = torch.linalg.eigvalsh(gram[:, others])[..., 0]
        assert bool((found.least[:, others] <= smallest * (1 + 1e-9)).all())
        assert bool((found.least[:, others] >= smallest / 2).all())
    assert float(by_eigenvectors.least[0, 0]) == 0.0
    assert bool((by_eigenvectors.fold[0, 0] == 0).all())
    assert bool((by_eigenvectors.lift[0, 0] == 0).all())


@pytest.mark.parametrize("subspace", ["projector", "ridge"])
def test_a_direction_that_all_share_does_not_hide_the_weak_ones(subspace: str) -> None:
    """One eigenvalue near 1 and a flat rest of 0.02, which is near bfloat16's rounding and a third of the optimum."""
    g = torch.Generator().manual_seed(4)
    common, updates = randn(g, 1536, 1), []
    for _ in range(128):
        b = torch.cat([common + 0.05 * randn(g, 1536, 1), randn(g, 1536, 3)], dim=1)
        a = torch.linalg.qr(randn(g, 64, 4)).Q.mT  # equal singular values, so that ridge weighs all alike
        updates.append(ClientUpdate(torch.linalg.qr(b).Q.float(), a.float(), 1.0, 1.0))
    z = torch.cat([u.b.double() for u in updates], dim=1) / 128**0.5
    eigenvalues = torch.linalg.eigvalsh(z.mT @ z).flip(0)
    assert float(eigenvalues[0]) > 0.95
    assert 0.01 < float(eigenvalues[31]) < 0.03
    found = aggregate("glora", None, updates, rank=32, rule="replace", subspace=subspace, accuracy="fast").state
    assert found.rank == 32
    assert float((z.mT @ found.u.double()).square().sum()) >= 0.99 * float(eigenvalues[:32].sum())
