"""State, canonical gauge, readout and the refill of dead directions."""

import math
from typing import Literal

import pytest
import torch
from lora_cases import randn

from glora_server.aggregation import canonical_state, empty_state, readout
from glora_server.aggregation.diagnostics import principal_angles
from glora_server.aggregation.errors import OptionError, RankError, ScaleError
from glora_server.aggregation.state import LayerState


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state_with(sigma: list[float], *, d: int = 12, n: int = 10) -> LayerState:
    g = generator(5)
    k = len(sigma)
    left, right = (torch.linalg.qr(randn(g, rows, k)).Q for rows in (d, n))
    return canonical_state(left * torch.tensor(sigma, dtype=torch.float64), right.T, rank=k)


def test_first_round_readout_is_zero_with_nested_seeded_rows() -> None:
    state = empty_state(9, 8)
    b16, a16 = readout(state, 6, 2.0, seed=4, module="q", version=0)
    b4, a4 = readout(state, 3, 7.0, seed=4, module="q", version=0)
    assert b16.dtype == torch.float32
    assert not bool(b16.any())
    assert b4.shape == (9, 3)
    assert torch.equal(a4, a16[:3])
    assert torch.allclose(a16 @ a16.T, torch.eye(6) / 3, atol=1e-6)


@pytest.mark.parametrize("other", [{"seed": 1}, {"module": "v"}, {"version": 3}])
def test_refilled_rows_follow_seed_module_and_version(other: dict[str, int | str]) -> None:
    state = empty_state(5, 8)
    base: dict[str, int | str] = {"seed": 0, "module": "q", "version": 2}

    def rows(named: dict[str, int | str]) -> torch.Tensor:
        return readout(
            state, 2, 1.0, seed=int(named["seed"]), module=str(named["module"]), version=int(named["version"])
        )[1]

    assert torch.equal(rows(base), rows(base))
    assert not torch.allclose(rows(base), rows(base | other))


def test_dead_directions_have_zero_column_and_a_fresh_orthogonal_row() -> None:
    state = state_with([2.0, 1.0, 1e-7])
    b, a = readout(state, 6, 0.5, seed=1)
    assert not bool(b[:, 2:].any())
    gram = a @ a.T
    assert torch.allclose(gram - torch.diag(gram.diagonal()), torch.zeros(6, 6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(gram.diagonal()[2:], torch.full((4,), 1 / 3, dtype=torch.float64))
    assert torch.allclose(0.5 * b @ a, state.u[:, :2] @ state.a[:2], atol=1e-12)


def test_more_rows_than_in_features_are_still_rows_of_the_right_norm() -> None:
    b, a = readout(state_with([1.0], n=3), 6, 1.0)
    assert b.shape == (12, 6)
    norms = torch.linalg.vector_norm(a[1:], dim=1)
    assert torch.allclose(norms, torch.full((5,), 1 / math.sqrt(3), dtype=torch.float64))


@pytest.mark.parametrize("style", ["balanced", "a_orthonormal"])
def test_styles_split_sigma_as_promised(style: Literal["balanced", "a_orthonormal"]) -> None:
    state = state_with([4.0, 1.0, 0.25])
    b, a = readout(state, 3, 2.0, style=style)
    sigma = state.sigma
    on_b = sigma / 2 if style == "balanced" else (sigma / 2) ** 2
    on_a = sigma / 2 if style == "balanced" else torch.ones(3, dtype=torch.float64)
    assert torch.allclose(b.T @ b, torch.diag(on_b), atol=1e-12)
    assert torch.allclose(a @ a.T, torch.diag(on_a), atol=1e-12)


def test_canonical_state_does_not_depend_on_the_factors_it_came_from() -> None:
    g = generator(2)
    u, a = randn(g, 9, 4), randn(g, 4, 7)
    q = randn(g, 4, 4)
    first, second = canonical_state(u, a, rank=3), canonical_state(u @ q, torch.linalg.solve(q, a), rank=3)
    assert first.rank == 3
    assert torch.allclose(first.u, second.u, atol=1e-9)
    assert torch.allclose(first.a, second.a, atol=1e-9)


def test_numerical_rank_bounds_the_state() -> None:
    g = generator(3)
    u = randn(g, 9, 2)
    state = canonical_state(torch.cat([u, u], dim=1), randn(g, 4, 7), rank=4)
    assert state.rank == 2


@pytest.mark.parametrize(
    ("rank", "scale", "error"), [(0, 1.0, RankError), (2, 0.0, ScaleError), (2, math.nan, ScaleError)]
)
def test_impossible_readouts_are_refused(rank: int, scale: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        readout(empty_state(4, 4), rank, scale)


def test_unknown_style_is_refused() -> None:
    with pytest.raises(OptionError, match="balanced"):
        readout(state_with([1.0]), 1, 1.0, style="other")  # type: ignore[arg-type]  # that is the point


def test_small_principal_angles_are_seen_beside_a_large_one() -> None:
    d, rank, g = 512, 8, torch.Generator().manual_seed(0)
    both = torch.linalg.qr(randn(g, d, 2 * rank)).Q
    true = torch.tensor([1.0, *[1e-5] * (rank - 1)], dtype=torch.float64)
    turned = both[:, :rank] * true.cos() + both[:, rank:] * true.sin()
    turned = turned @ torch.linalg.qr(randn(g, rank, rank)).Q
    right = torch.linalg.qr(randn(g, 64, rank)).Q.mT * torch.arange(rank, 0, -1)[:, None]
    first, second = (canonical_state(u.float(), right.float(), rank=rank) for u in (both[:, :rank], turned))
    found = principal_angles(first, second)
    assert found is not None
    assert found.largest == pytest.approx(1.0, abs=1e-6)
    assert found.mean == pytest.approx(float(true.mean()), abs=2e-6)
