"""Random LoRA updates for aggregation tests, every draw from a seed, condition numbers stated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from glora_server.aggregation import ClientUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A round of one module: shape, ranks, server rank, and the seed of all numbers."""

    seed: int
    d: int
    n: int
    ranks: tuple[int, ...]
    rank: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def updates(self, dtype: torch.dtype = torch.float64) -> list[ClientUpdate]:
        g = self.generator()
        return [random_update(g, self.d, self.n, r, dtype=dtype) for r in self.ranks]


def cases(*, max_rank: int = 5, most: int = 5) -> st.SearchStrategy[Case]:
    """Rounds of 1 to `most` clients, d and n from 6 to 24, mixed ranks, server rank below and above the union."""
    return st.builds(
        Case,
        seed=st.integers(0, 2**31 - 1),
        d=st.integers(6, 24),
        n=st.integers(6, 24),
        ranks=st.lists(st.integers(1, max_rank), min_size=1, max_size=most).map(tuple),
        rank=st.integers(1, 16),
    )


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_update(g: torch.Generator, d: int, n: int, r: int, *, dtype: torch.dtype = torch.float64) -> ClientUpdate:
    """Gaussian factors, scale in [0.5, 2.5), weight in 1 … 100."""
    scale = 0.5 + 2 * float(torch.rand(1, generator=g))
    weight = float(torch.randint(1, 101, (1,), generator=g))
    return ClientUpdate(randn(g, d, r).to(dtype), randn(g, r, n).to(dtype), scale, weight)


def invertible(g: torch.Generator, r: int, condition: float) -> Tensor:
    """Random r×r matrix with singular values from 1 to `condition`, log spaced."""
    left, right = (torch.linalg.qr(randn(g, r, r)).Q for _ in range(2))
    sigma = torch.logspace(0, float(torch.log10(torch.tensor(condition))), r, dtype=torch.float64)
    q: Tensor = left @ torch.diag(sigma) @ right
    return q


def regauged(updates: Sequence[ClientUpdate], g: torch.Generator, condition: float) -> list[ClientUpdate]:
    """The same ΔW from other factors: (B·Q, Q⁻¹·A), in the updates' dtype, another Q for each client."""
    changed = []
    for update in updates:
        q = invertible(g, update.rank, condition)
        b, a = update.b.double() @ q, torch.linalg.solve(q, update.a.double())
        changed.append(replace(update, b=b.to(update.b.dtype), a=a.to(update.a.dtype)))
    return changed
