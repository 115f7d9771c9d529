r"""The leading R eigenvectors of K.

Few columns (n = Σc + Σr small): all of K in the coordinates of F = [U_T … N_1 … N_m], from FᵀF in float64; exact.
Many: block Krylov. From an orthonormal start V_0 (the last U_ref and some random columns, or random ones alone)
:math:`V_{j+1} = \mathrm{orth}((I - VV^\top)KV_j)`, each K·V_j in reduced precision, until the sum of the R largest Ritz
values :math:`\theta = \mathrm{eig}(V^\top KV)` has, by the way its gains shrink, less than 0.6 % left to gain; then one
multiplication by K in float32, which damps what the reduced precision left outside of the span and improves Σθ once
more. For the same number of products with K the Krylov space contains what subspace iteration finds.

Work: about 4·d·Σr·(R + 16) per step against d·n² and 9n³ for the Gram matrix, hence the crossover in `prefers_gram`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_server.aggregation.fast.cores import stacked
from glora_server.aggregation.fast.intake import Group
from glora_server.aggregation.fast.operator import MeanOperator, Operator, VoteOperator, unit_rows
from glora_server.aggregation.subspace import Subspace

_OVERSAMPLING = 16
_GAIN = 1e-2
_REMAINING = 6e-3
_SLOWEST = 0.9
_MOST_STEPS = 12
_SQUARED_ROUNDING = 1e-6
_LOW_ROUNDING = 2.0**-8
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`basis` (d×m, m ≤ R, orthonormal, float64) and the falling eigenvalues found, one beyond R where K has it."""

    basis: Tensor
    spectrum: Tensor


def prefers_gram(groups: Sequence[Group], rank: int) -> bool:
    """Whether n is so small that the Gram matrix costs less than three steps."""
    d = groups[0].batch.b[0].shape[0]
    n = _columns(groups)
    return n <= rank + _OVERSAMPLING or n * (2 + 9 * n / d) <= 12 * (rank + _OVERSAMPLING)


def pays(groups: Sequence[Group], rank: int) -> bool:
    """Whether either method beats the exact one: a Krylov space of nearly d columns would not."""
    return prefers_gram(groups, rank) or groups[0].batch.b[0].shape[0] >= 4 * (rank + _OVERSAMPLING)


def leading(groups: Sequence[Group], subspace: Subspace, rank: int, *, start: Tensor | None) -> Span:
    """TopEig_R(K); `start` (d×k, orthonormal) is where the space was in the last round."""
    if prefers_gram(groups, rank):
        return _by_gram(groups, subspace, rank)
    bounded = subspace in {Subspace.PROJECTOR, Subspace.RIDGE}
    operator: Operator = MeanOperator(groups) if subspace is Subspace.MEAN else VoteOperator(groups, bounded=bounded)
    floor = _LOW_ROUNDING if bounded else _ROUNDING
    return _by_krylov(operator, _start(groups, rank, start), rank, floor=floor)


def _columns(groups: Sequence[Group]) -> int:
    return sum(group.tail.width + len(group.batch.b) * group.rank for group in groups)


def _start(groups: Sequence[Group], rank: int, known: Tensor | None) -> Tensor:
    like = groups[0].batch.b[0]
    held = 0 if known is None else min(known.shape[1], rank)
    # Drawn on the CPU whatever the device, so that every machine starts from the same columns.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((like.shape[0], rank + _OVERSAMPLING - held), generator=generator).to(like.device)
    return drawn if known is None else torch.cat([known[:, :held].float(), drawn], dim=1)


def _by_krylov(operator: Operator, start: Tensor, rank: int, *, floor: float) -> Span:
    block = orthonormal(start)
    basis = start[:, :0]
    core = torch.zeros((0, 0), dtype=torch.float64, device=start.device)
    converged = _Convergence(rank)
    while True:
        basis = torch.cat([basis, block], dim=1)
        image = operator.apply(block, reduced=True)
        core = _bordered(core, (basis.mT @ image).double())
        values, vectors = torch.linalg.eigh(core)
        if converged(values.flip(0)) or basis.shape[1] + block.shape[1] > basis.shape[0]:
            break
        block = _next_block(basis, image, floor=floor * float(values[-1]))
        if block.shape[1] == 0:
            break
    rough = basis @ vectors.flip(1)[:, :rank].float()
    return _polished(operator, rough, beyond=values.flip(0)[rank : rank + 1].clamp(min=0))


class _Convergence:
    """Whether Σθ over the leading R is within about `_REMAINING` of its limit, from how its gains shrink."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._steps = 0
        self._found = 0.0
        self._gain = math.inf

    def __call__(self, values: Tensor) -> bool:
        """Take in the falling Ritz values of one more step."""
        self._steps += 1
        found = float(values[: self._rank].clamp(min=0).sum())
        gain = found - self._found
        ratio = min(max(gain, 0.0) / self._gain, _SLOWEST) if self._gain > 0 else 0.0
        self._found, self._gain = found, gain
        if self._steps == _MOST_STEPS or gain <= _REMAINING * found:
            return True
        return gain <= _GAIN * found and gain * ratio / (1 - ratio) <= _REMAINING * found


def _bordered(core: Tensor, last: Tensor) -> Tensor:
    """VᵀKV (symmetric) from that of the earlier columns and its last columns."""
    old, width = core.shape[0], last.shape[0]
    grown = core.new_zeros((width, width))
    grown[:old, :old] = core
    grown[:, old:] = last
    grown[old:, :old] = last[:old].mT
    grown[old:, old:] = (last[old:] + last[old:].mT) / 2
    return grown


def _next_block(basis: Tensor, image: Tensor, *, floor: float) -> Tensor:
    """Orthonormal columns of what K's image has outside of the basis, beyond rounding; may have none."""
    rest = image - basis @ (basis.mT @ image)
    return orthonormal(rest, floor=floor, outside=basis)


def orthonormal(columns: Tensor, *, floor: float = 0.0, outside: Tensor | None = None) -> Tensor:
    """Orthonormal basis (float32) of the directions of `columns` (d×k) above `floor` and above rounding.

    By Gram matrices, twice, so that the second one is well-conditioned; in between, what rounding left of `outside`
    is taken away.
    """
    for step in range(2):
        values, vectors = torch.linalg.eigh((columns.mT @ columns).double())
        least = max(_SQUARED_ROUNDING * float(values[-1]), floor**2) if step == 0 else 0.0
        alive = values > least
        columns = columns @ (vectors[:, alive] / values[alive].sqrt()).float()
        if outside is not None and step == 0:
            columns = columns - outside @ (outside.mT @ columns)
    return columns


def _polished(operator: Operator, rough: Tensor, *, beyond: Tensor) -> Span:
    """One power step in float32, and the Ritz values of `rough`, to which the step is an upper refinement."""
    image = operator.apply(rough)
    core = rough.double().mT @ image.double()
    values = torch.linalg.eigvalsh((core + core.mT) / 2).flip(0).clamp(min=0)
    wide = image.double()
    squares, vectors = torch.linalg.eigh(wide.mT @ wide)
    alive = squares > 1e-13 * squares[-1]
    basis = wide @ (vectors[:, alive] / squares[alive].sqrt())
    return Span(basis=basis.flip(1), spectrum=torch.cat([values, beyond.double()]))


def _by_gram(groups: Sequence[Group], subspace: Subspace, rank: int) -> Span:
    frame = _frame(groups)
    core = _mean_core(groups) if subspace is Subspace.MEAN else _vote_core(groups)
    squares, vectors = torch.linalg.eigh(frame @ frame.mT)
    alive = squares > 1e-13 * squares[-1]
    root, turn = squares[alive].sqrt(), vectors[:, alive]
    inside = root[:, None] * (turn.mT @ core @ turn) * root
    values, ritz = torch.linalg.eigh((inside + inside.mT) / 2)
    values, ritz = values.flip(0).clamp(min=0), ritz.flip(1)
    keep = min(rank, int((values > 1e-13 * values[:1]).sum()))
    basis = frame.mT @ (turn @ (ritz[:, :keep] / root[:, None]))
    return Span(basis=basis, spectrum=values)


def _frame(groups: Sequence[Group]) -> Tensor:
    """Fᵀ (n×d), float64, group by group: U_Tᵀ, then the N_iᵀ."""
    parts = []
    for group in groups:
        parts += [group.tail.u.mT, unit_rows(group, slice(0, len(group.batch.b)), torch.float64)]
    return torch.cat(parts)


def _vote_core(groups: Sequence[Group]) -> Tensor:
    """Σ_i of the votes in coordinates of F (n×n)."""
    core = groups[0].vote.new_zeros((_columns(groups),) * 2)
    at = 0
    for group in groups:
        c, r = group.tail.width, group.rank
        shared = slice(at, at + c)
        for j, vote in enumerate(group.vote):
            own = slice(at + c + j * r, at + c + (j + 1) * r)
            core[shared, shared] += vote[:c, :c]
            core[shared, own] = vote[:c, c:]
            core[own, shared] = vote[c:, :c]
            core[own, own] = vote[c:, c:]
        at += c + len(group.batch.b) * r
    return core


def _mean_core(groups: Sequence[Group]) -> Tensor:
    """YYᵀ (n×n) with M = F·Y."""
    parts = []
    for group in groups:
        weighted = (group.batch.share * group.batch.gain)[:, None, None] * stacked(group.batch.a, torch.float64)
        on_tail = (group.tail.v * group.tail.sigma).mT * group.batch.share.sum() + (group.cross @ weighted).sum(dim=0)
        parts += [on_tail, (group.fold @ weighted).flatten(0, 1)]
    right = torch.cat(parts)
    core: Tensor = right @ right.mT
    return core
