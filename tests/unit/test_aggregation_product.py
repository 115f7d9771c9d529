"""Narrow products: right in every layout, and the same where torch comes without oneDNN."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glora_server.aggregation import product
from glora_server.aggregation.product import times_transposed

Layout = Callable[[Tensor], Tensor]

LAYOUTS: dict[str, Layout] = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.mT.contiguous().mT,
    "part of wider rows": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every other row": lambda x: torch.stack([x, -x], dim=1).flatten(0, 1)[::2],
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_every_layout_gives_the_product(left: str, right: str) -> None:
    one, other = LAYOUTS[left](normal(48, 300, seed=1)), LAYOUTS[right](normal(16, 300, seed=2))
    expected = one.double() @ other.double().mT
    torch.testing.assert_close(times_transposed(one, other).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("modules", [1, 3])
def test_modules_come_first(modules: int) -> None:
    one, other = normal(modules, 5, 40, seed=3), normal(modules, 7, 40, seed=4)
    found = times_transposed(one, other)
    assert found.shape == (modules, 5, 7)
    torch.testing.assert_close(found, torch.einsum("mik,mjk->mij", one, other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("p", "k", "q"), [(0, 4, 3), (3, 0, 2), (3, 4, 0), (1, 1, 1)])
def test_empty_and_single_numbers(p: int, k: int, q: int) -> None:
    one, other = normal(p, k, seed=5), normal(q, k, seed=6)
    torch.testing.assert_close(times_transposed(one, other), one @ other.mT)


def test_other_precisions_stay_what_they_are() -> None:
    wide = normal(4, 9, seed=7).double()
    assert torch.equal(times_transposed(wide, wide), wide @ wide.mT)
    low = wide.bfloat16()
    assert times_transposed(low, low).dtype == torch.bfloat16


@pytest.mark.parametrize("error", [AttributeError("no such operator"), RuntimeError("could not create a primitive")])
def test_without_onednn_torch_multiplies(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(left: Tensor, right: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(product, "_by_onednn", missing)
    product._on_cpu.cache_clear()
    try:
        one, other = normal(3, 8, seed=8), normal(5, 8, seed=9)
        assert torch.equal(times_transposed(one, other), one @ other.mT)
    finally:
        monkeypatch.undo()
        product._on_cpu.cache_clear()


def test_a_wrong_operator_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_by_onednn", lambda left, right: left @ right.mT + 1)
    product._on_cpu.cache_clear()
    try:
        one = normal(3, 8, seed=10)
        assert torch.equal(times_transposed(one, one), one @ one.mT)
    finally:
        monkeypatch.undo()
        product._on_cpu.cache_clear()
