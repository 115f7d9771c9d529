"""Leading eigenvectors refined from float32 against all of them in float64."""

import pytest
import torch
from torch import Tensor

from glora_server.aggregation import eigen
from glora_server.aggregation.eigen import gram_of_rows, leading_eigen

Q, COUNT = 320, 24


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def votes(spaces: int, copies: int, *, common: float = 0.0) -> Tensor:
    """√K: the votes of devices that have one of so many spaces, equally."""
    columns = (1 - common) * drawn(spaces, Q, 8) + common * drawn(Q, 8)
    basis = torch.linalg.qr(columns).Q.repeat(copies, 1, 1)
    stack: Tensor = basis.transpose(0, 1).reshape(Q, -1) / len(basis) ** 0.5
    return stack


CASES = {
    "flat": votes(60, 1),
    "shared": votes(60, 1, common=0.9),
    "low rank": votes(2, 20),
    "clusters": votes(4, 10),
    "exactly as many as wanted": votes(3, 10),
    "decaying": torch.linalg.qr(drawn(Q, Q)).Q * torch.logspace(0, -6, Q, dtype=torch.float64),
}


@pytest.mark.parametrize("columns", [1, 70, Q, 3 * Q])
@pytest.mark.parametrize("rows", [1, 63, 64, 130, Q])
def test_gram_of_rows(rows: int, columns: int) -> None:
    matrix = drawn(rows, columns)
    found = gram_of_rows(matrix)
    assert torch.allclose(found, matrix @ matrix.mT, rtol=0, atol=1e-12 * columns)
    assert torch.allclose(found, found.mT, rtol=0, atol=1e-12 * columns)


@pytest.mark.parametrize("stack", CASES.values(), ids=CASES.keys())
def test_as_good_as_float64(stack: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals are those of float64, and where there is a gap so is the space; with the float64 way shut off."""
    matrix = gram_of_rows(stack)
    expected, all_vectors = torch.linalg.eigh(matrix)
    expected, full = expected.flip(0), torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: full(m if len(m) < Q else m.float()))
    values, vectors = leading_eigen(matrix, COUNT)
    assert float((values[: COUNT + 1] - expected[: COUNT + 1]).abs().max()) <= 1e-13
    assert vectors.shape == (Q, COUNT)
    assert float((vectors.mT @ vectors - torch.eye(COUNT, dtype=torch.float64)).abs().max()) <= 1e-13
    assert float((matrix @ vectors - vectors * values[:COUNT]).norm()) <= 1e-12
    gap = float(expected[COUNT - 1] - expected[COUNT])
    if gap > 1e-9:
        leading = all_vectors.flip(1)[:, :COUNT]
        assert float((vectors - leading @ (leading.mT @ vectors)).norm()) <= 1e-12 / gap


def test_goes_back_to_float64_where_the_residuals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigen, "_MOST_STEPS", 1)
    matrix = gram_of_rows(CASES["flat"])
    values, _ = leading_eigen(matrix, COUNT)
    assert values.numel() == Q, "all of them are there"
    assert torch.allclose(values, torch.linalg.eigvalsh(matrix).flip(0), rtol=0, atol=1e-14)


def test_small_matrices_and_many_vectors_are_float64() -> None:
    for size, count in ((40, 5), (Q, Q // 3)):
        matrix = gram_of_rows(drawn(size, size))
        values, vectors = leading_eigen(matrix, count)
        assert values.numel() == size
        assert vectors.shape == (size, count)
