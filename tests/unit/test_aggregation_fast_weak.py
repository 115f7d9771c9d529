"""`accuracy="fast"` beside what is weak: votes at a coarse wire, directions below float32's sight, any magnitude."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from dense_reference import dense_state
from lora_cases import randn
from torch import Tensor

from glora_server.aggregation import (
    ClientUpdate,
    LayerState,
    OptionValue,
    aggregate,
    aggregate_with_options,
    canonical_state,
    readout,
)

D, N, COUNT, R = 160, 96, 30, 12
SUBSPACES = ("projector", "ridge", "energy", "normalised_energy", "mean")


def state_of(sigma: Sequence[float], seed: int = 3) -> LayerState:
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(randn(g, rows, len(sigma))).Q for rows in (D, N))
    values = torch.tensor(sigma, dtype=torch.float64)
    return canonical_state((left * values).float(), right.T.float(), rank=R)


def moved(state: LayerState, wire: torch.dtype, *, ranks: Sequence[int], by: float) -> list[ClientUpdate]:
    """Readouts of these ranks in turn, with Gaussian changes."""
    g, updates = torch.Generator().manual_seed(8), []
    sent = {rank: tuple(part.to(wire) for part in readout(state, rank, 0.5)) for rank in ranks}
    for i in range(COUNT):
        b0, a0 = sent[ranks[i % len(ranks)]]
        b, a = ((part.double() + by * float(part.double().std()) * randn(g, *part.shape)).to(wire) for part in (b0, a0))
        updates.append(ClientUpdate(b, a, 0.5, 1.0 + i % 3, sent=(b0, a0)))
    return updates


def fast(state: LayerState | None, updates: Sequence[ClientUpdate], **options: OptionValue) -> LayerState:
    given = {"accuracy": "fast", **options}
    return aggregate_with_options("glora", state, updates, rank=R, options=given).state


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(actual - expected) / torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize("rule", ["delta", "accumulate"])
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("by", [0.3, 0.05])
def test_as_many_directions_vote_as_in_an_exact_round(wire: torch.dtype, rule: str, by: float) -> None:
    """The tolerance of a coarse wire is relative to σ_1, not to the Frobenius norm, which is up to √r larger."""
    state = state_of([1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15])
    updates = moved(state, wire, ranks=(4, 8), by=by)
    tolerance = 4e-2
    found, exact = (
        aggregate("glora", state, updates, rank=R, rule=rule, rank_tol=tolerance, accuracy=accuracy).diagnostics
        for accuracy in ("fast", "exact")
    )
    votes = [client.votes for client in found.clients]
    assert votes == [client.votes for client in exact.clients]
    assert sum(found.eigenvalues) >= 0.99 * sum(exact.eigenvalues)


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_direction_that_grows_slowly_gets_into_a_state_that_has_room(subspace: str) -> None:
    """Every device adds the same new direction of 5e-4 each round: after five it must be there with five times that."""
    state, step = state_of([1.0, 0.8, 0.6, 0.5]), 5e-4
    g = torch.Generator().manual_seed(9)
    left = randn(g, D, 1)
    left = left - state.u.double() @ (state.u.double().T @ left)
    left, right = left / left.norm(), torch.nn.functional.normalize(randn(g, 1, N))
    for _ in range(5):
        b0, a0 = readout(state, 5, 1.0)
        sent = b0[:, :4], a0[:4]
        grown = torch.cat([sent[0], left.float()], dim=1), torch.cat([sent[1], step * right.float()])
        updates = [ClientUpdate(*grown, 1.0, 1.0, sent=sent, sent_scale=1.0) for _ in range(COUNT)]
        state = fast(state, updates, subspace=subspace)
    assert float(left.T @ dense_state(state) @ right.T) == pytest.approx(5 * step, rel=1e-2)


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_weak_directions_of_untouched_readouts_stay(subspace: str) -> None:
    """Spectrum down to 1e-5 of σ_1, which squares to less than float32 can tell from zero."""
    start = state_of(torch.logspace(0, -5, R, dtype=torch.float64).tolist())
    state = start
    for _ in range(3):
        sent = readout(state, R, 0.5)
        state = fast(state, [ClientUpdate(*sent, 0.5, 1.0, sent=sent) for _ in range(COUNT)], subspace=subspace)
    assert state.rank == R
    assert torch.allclose(state.sigma, start.sigma, rtol=0.05)
    assert relative(dense_state(state), dense_state(start)) <= 1e-5


@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e6, 1e9])
def test_the_size_of_updates_does_not_matter(subspace: str, size: float) -> None:
    """Squares of energies leave float32's range at sizes that float32 uploads may well have."""
    g = torch.Generator().manual_seed(5)
    common = randn(g, D, R)
    plain = [
        ClientUpdate((common @ randn(g, R, 4) + randn(g, D, 4)).float(), randn(g, 4, N).float(), 1.0, 1.0)
        for _ in range(COUNT)
    ]
    scaled = [replace(u, b=u.b * size, a=u.a * size) for u in plain]
    expected = dense_state(fast(None, plain, rule="replace", subspace=subspace))
    found = dense_state(fast(None, scaled, rule="replace", subspace=subspace)) / size**2
    assert relative(found, expected) <= 1e-3
