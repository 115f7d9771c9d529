r"""The leading R eigenvectors of K.

Few columns (n = Σc + Σr small): all of K in the coordinates of F = [U_T … E_1 … E_m], from FᵀF, which is float32
where F is so well-conditioned that this costs Σθ no more than 0.3 %, and else float64.
Many: block Krylov. From an orthonormal start V_0 (the last U_ref and K times random columns, or these alone)
:math:`V_{j+1} = \mathrm{orth}((I - VV^\top)KV_j)`, each K·V_j in reduced precision, until little is left to gain for
the sum of the R largest Ritz values :math:`\theta = \mathrm{eig}(V^\top KV)`; then one more step that ends in float32,
which damps what the reduced precision left outside of the devices' space and improves Σθ once more. For the same number
of products with K the Krylov space contains what subspace iteration finds.

What is left to gain is the smaller of two estimates. *From gains*, once there are two: they shrink by a steady factor.
Where many directions are about equally strong they can be small for a step and then grow, so they may not say less than
two thirds of the other one. *From residuals*: with r_i = ‖Kv_i − θ_iv_i‖, and nothing outside of the space larger than
θ_R, two directions that couple with r_i hold at most
:math:`\tfrac{\theta_i + \theta_R}{2} + \sqrt{\tfrac{(\theta_i - \theta_R)^2}{4} + r_i^2}`: about
r_i²/(θ_i − θ_R) more than θ_i where the gap is wide, and r_i where there is none.

Work: about 4·d·Σr·(R + 16) per step against d·n² and 9n³ for the Gram matrix, hence the crossover in `prefers_gram`.
Modules (M) come first in every shape; a column that a module does not have is zero. The columns of V are laid out as
rows, so that no product has to turn one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_server.aggregation.fast.cores import Beyond
from glora_server.aggregation.fast.intake import Group
from glora_server.aggregation.fast.operator import MeanOperator, Operator, VoteOperator, probed_sum
from glora_server.aggregation.fast.probes import gaussian
from glora_server.aggregation.product import times_transposed
from glora_server.aggregation.subspace import Subspace

_OVERSAMPLING = 16
_REMAINING = 8e-3
_FASTEST, _SLOWEST = 0.3, 0.9
"""Bounds of the factor by which gains are taken to shrink."""
_PESSIMISM = 1.5
"""By how much residuals may overstate what is left, at most."""
_MOST_STEPS = 12
_KEPT_VALUES = 5 << 18
"""Coefficients of a module that are kept from step to step; more of them are computed anew in the end."""
_SQUARED_ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-8}
"""Squared size, relative to the largest, below which a direction is dropped: 32 of them are worth 0.3 % in float64."""
_PLAIN = {torch.float32: 0.1, torch.float64: 1e-6}
"""Squared size of the smallest direction, relative to the largest, above which one pass leaves 1e-6 at most."""
_WELL_CONDITIONED = 1e-4
"""Squared size of the smallest direction of columns of norm one, of which rounding to float32 is a thousandth."""
_LOW_ROUNDING = 2.0**-12
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`basis` (M×d×R, float32: orthonormal columns, then zero ones where no more was found).

    `spectrum` (M×…): the falling eigenvalues found, one beyond R where K has it; `probed` (M×d×k): the mean of the
    uploads on the probes, Σp_if_iB_iA_iΩ, which rides along with the last product; `whole`: whether columns that are
    zero stand for directions that K has not, rather than for some that are too weak to be seen in float32 and less.
    """

    basis: Tensor
    spectrum: Tensor
    probed: Tensor
    whole: tuple[bool, ...]


def prefers_gram(groups: Sequence[Group], rank: int) -> bool:
    """Whether n is so small that the Gram matrix costs less than three steps."""
    d, n = groups[0].devices.shape.d, _columns(groups)
    return n <= rank + _OVERSAMPLING or n * (2 + 9 * n / d) <= 12 * (rank + _OVERSAMPLING)


def pays(groups: Sequence[Group], rank: int) -> bool:
    """Whether either method beats the exact one: a Krylov space of nearly d columns would not."""
    return prefers_gram(groups, rank) or groups[0].devices.shape.d >= 4 * (rank + _OVERSAMPLING)


def leading(
    groups: Sequence[Group],
    subspace: Subspace,
    rank: int,
    *,
    known: Sequence[Tensor | None],
) -> Span:
    """TopEig_R(K); `known` (d×k, orthonormal) is where each module's space was in the last round."""
    if prefers_gram(groups, rank):
        return _by_gram(groups, subspace, rank)
    bounded = subspace in {Subspace.PROJECTOR, Subspace.RIDGE}
    operator: Operator = MeanOperator(groups) if subspace is Subspace.MEAN else VoteOperator(groups, bounded=bounded)
    floor = _LOW_ROUNDING if bounded else _ROUNDING
    start = _start(operator if bounded else None, groups, rank, known)
    coefficients, values = _Krylov(operator, rank, floor=floor).run(start)
    image, probed = operator.finished(coefficients, [group.weighted_probes for group in groups])
    basis = _orthonormal_image(image)
    whole = tuple((basis.square().sum(dim=1) > 0).all(dim=1).tolist())
    return Span(basis=basis, spectrum=values * operator.unit[:, None], probed=probed, whole=whole)


def _columns(groups: Sequence[Group]) -> int:
    return sum(group.columns for group in groups)


def _start(operator: Operator | None, groups: Sequence[Group], rank: int, known: Sequence[Tensor | None]) -> Tensor:
    """What is known of each module's space, and random columns, times K where that is given: rows (M×(R + 16)×d).

    Nothing in it depends on a gauge or on the order of the devices. Energies range so far that K would leave nothing
    of the weaker directions in its image.
    """
    sizes = groups[0].devices.shape
    held = min(rank, *(0 if u is None else u.shape[1] for u in known))
    drawn = gaussian(rank + _OVERSAMPLING - held, sizes.d, seed=0)
    mixed = drawn.to(groups[0].vote.device).expand(sizes.modules, -1, -1)
    if operator is not None:
        mixed = operator.apply(mixed)
    if not held:
        return mixed
    # What orthonormalisation drops is relative to the largest column.
    mixed = mixed / torch.linalg.vector_norm(mixed, dim=2, keepdim=True).clamp(min=torch.finfo(mixed.dtype).tiny)
    return torch.cat([torch.stack([u[:, :held].float().mT for u in known if u is not None]), mixed], dim=1)


class _Krylov:
    """The block Krylov iteration; `floor`: rounding of the operator relative to its largest eigenvalue."""

    def __init__(self, operator: Operator, rank: int, *, floor: float) -> None:
        self._operator = operator
        self._rank = rank
        self._floor = floor

    def run(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """The operator's coefficients of the Ritz vectors (M×R×…), and the falling Ritz values, R + 1 of them."""
        # In float64: one direction that all devices share may be a thousand times as strong as those that follow.
        basis, answers = [orthonormal(start.double())], list[Tensor]()
        modules, width, d = start.shape
        # In float64: LAPACK's float32 version of `eigh` has returned NaN for cores of low rank.
        core, converged = start.new_zeros((modules, 0, 0), dtype=torch.float64), _Convergence(self._rank)
        while True:
            rest = self._applied(basis, answers)
            inside = _seen(rest, basis)
            core = _bordered(core, inside.mT)
            values, vectors = torch.linalg.eigh(core)
            values, vectors = values.flip(1).clamp(min=0), vectors[..., -self._rank :].flip(2)
            rest -= _combined(inside, basis)
            if converged(values, _lengths(rest, vectors[:, -width:])) or (len(basis) + 1) * width > d:
                break
            block = orthonormal(rest, floor=self._floor * values[:, 0])
            # Twice: what is left of the earlier blocks may be as large as what is new, and would grow in every step.
            block = orthonormal(block - _combined(_seen(block, basis), basis))
            if not bool(block.any()):
                break
            basis.append(block)
        turn, found = vectors.float().mT, values[:, : self._rank + 1]
        if len(answers) == len(basis):
            return _combined(turn, answers), found
        ritz, coefficients = _combined(turn, basis), start.new_empty((modules, turn.shape[1], self._operator.size))
        basis.clear()
        self._operator.apply(ritz, coefficients)
        return coefficients, found

    def _applied(self, basis: Sequence[Tensor], answers: list[Tensor]) -> Tensor:
        """The operator's image of the newest block; its coefficients join `answers` unless these grow too large."""
        newest, coefficients = basis[-1], None
        modules, width, _ = newest.shape
        if len(basis) * width * self._operator.size <= _KEPT_VALUES:
            coefficients = newest.new_empty((modules, width, self._operator.size))
            answers.append(coefficients)
        else:
            answers.clear()
        return self._operator.apply(newest, coefficients)


def _seen(rows: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """Coordinates (M×k×…) of rows (M×k×d) in the blocks of rows of the basis."""
    return torch.cat([times_transposed(rows, block) for block in basis], dim=2)


def _combined(coordinates: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """The sum of the rows of all blocks, by coordinates (M×k×…)."""
    parts = torch.split(coordinates, [block.shape[1] for block in blocks], dim=2)
    total = times_transposed(parts[0], blocks[0].mT)
    for part, block in zip(parts[1:], blocks[1:], strict=True):
        total += times_transposed(part, block.mT)
    return total


def _lengths(rest: Tensor, coupled: Tensor) -> Tensor:
    """‖restᵀ·coupled‖ of each column (M×R), from the Gram matrix of the rows of `rest`."""
    gram = times_transposed(rest, rest).double()
    return (coupled * (gram @ coupled)).sum(dim=1).clamp(min=0).sqrt()


class _Convergence:
    """Whether Σθ over the leading R is within about `_REMAINING` of its limit in every module."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._steps = 0
        self._found: Tensor | None = None
        self._gain: Tensor | None = None

    def __call__(self, values: Tensor, residuals: Tensor) -> bool:
        """Take in the falling Ritz values (M×…) and the residuals (M×R) of one more step."""
        self._steps += 1
        leading = values[:, : self._rank]
        found = leading.sum(dim=1)
        left = _by_residuals(leading, residuals[:, : leading.shape[1]])
        if self._found is not None:
            gain = (found - self._found).clamp(min=0)
            if self._gain is not None:
                ratio = (gain / self._gain.clamp(min=torch.finfo(gain.dtype).tiny)).clamp(_FASTEST, _SLOWEST)
                left = torch.minimum(left, torch.maximum(gain * ratio / (1 - ratio), left / _PESSIMISM))
            self._gain = gain
        self._found = found
        return self._steps == _MOST_STEPS or bool((left <= _REMAINING * found).all())


def _by_residuals(values: Tensor, residuals: Tensor) -> Tensor:
    """The second estimate of the module's head (M)."""
    half = (values - values[:, -1:]) / 2
    return (torch.hypot(half, residuals) - half).sum(dim=1)


def _bordered(core: Tensor, last: Tensor) -> Tensor:
    """VᵀKV (symmetric) from that of the earlier columns and its last columns."""
    old, width = core.shape[1], last.shape[1]
    grown = core.new_zeros((core.shape[0], width, width))
    grown[:, :old, :old] = core
    grown[:, :, old:] = last
    grown[:, old:, :old] = last[:, :old].mT
    grown[:, old:, old:] = (last[:, old:] + last[:, old:].mT) / 2
    return grown


def orthonormal(rows: Tensor, *, floor: Tensor | None = None) -> Tensor:
    """Orthonormal basis (float32) of the directions of `rows` (M×k×d) above `floor` (M) and above rounding.

    By Gram matrices, twice unless the first one, in the dtype of `rows`, is so well-conditioned that rounding it cannot
    be seen. Other directions leave zero rows, first.
    """
    values, vectors = torch.linalg.eigh(times_transposed(rows, rows).double())
    least = _SQUARED_ROUNDING[rows.dtype] * values[:, -1:]
    if floor is not None:
        least = torch.maximum(least, floor.square()[:, None])
    once = times_transposed(_inverse_roots(values, vectors, least).mT.to(rows.dtype), rows.mT).float()
    if bool((values[:, :1] > _PLAIN[rows.dtype] * values[:, -1:]).all()):
        return once
    values, vectors = torch.linalg.eigh(times_transposed(once, once).double())
    roots = _inverse_roots(values, vectors, _SQUARED_ROUNDING[once.dtype] * values[:, -1:])
    return times_transposed(roots.mT.float(), once.mT)


def _inverse_roots(values: Tensor, vectors: Tensor, least: Tensor) -> Tensor:
    """vectors/√values, zero where the value is not above `least`."""
    alive = values > least
    return vectors * torch.where(alive, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)[:, None]


def _orthonormal_image(image: Tensor) -> Tensor:
    """Orthonormal basis (M×d×R, float32) of the columns, zero columns last; its rounding is that of float32."""
    wide = image.double()
    values, vectors = torch.linalg.eigh(wide.mT @ wide)
    basis: Tensor = wide @ _inverse_roots(values, vectors, 1e-13 * values[:, -1:]).flip(2)
    return basis.float()


def _by_gram(groups: Sequence[Group], subspace: Subspace, rank: int) -> Span:
    core = _mean_core(groups) if subspace is Subspace.MEAN else _vote_core(groups)
    frame, norms, coordinates = _decomposed(groups)
    inside = coordinates.fold @ (core * (norms[..., None] * norms[:, None])) @ coordinates.fold.mT
    values, ritz = torch.linalg.eigh((inside + inside.mT) / 2)
    values, ritz = values.flip(1).clamp(min=0), ritz.flip(2)[..., :rank]
    ritz = ritz * (values[:, :rank] > 1e-13 * values[:, :1])[:, None]
    found = frame @ (coordinates.lift @ ritz / norms[..., None]).to(frame.dtype)
    whole = (True,) * groups[0].devices.shape.modules
    return Span(basis=_polished(found), spectrum=values, probed=probed_sum(groups), whole=whole)


def _decomposed(groups: Sequence[Group]) -> tuple[Tensor, Tensor, Beyond]:
    """F, its columns' norms, and the coordinates of F's columns over these."""
    for dtype in (torch.float32, torch.float64):
        frame = _frame(groups, dtype)
        gram = times_transposed(frame.mT, frame.mT).double()
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        norms = torch.where(norms > 0, norms, 1.0)
        coordinates = Beyond.of(gram / (norms[..., None] * norms[:, None]))
        if bool((coordinates.least > _WELL_CONDITIONED).all()):
            break
    return frame, norms, coordinates


def _polished(basis: Tensor) -> Tensor:
    """The columns, which are nearly orthonormal, or zero, orthonormal in float32.

    By one step of the iteration of Björck and Bowie, from a float64 Gram matrix.
    """
    wide = basis.double()
    gram = wide.mT @ wide
    polished: Tensor = basis.float() @ (1.5 * torch.eye(gram.shape[1], device=gram.device) - 0.5 * gram).float()
    return polished


def _frame(groups: Sequence[Group], dtype: torch.dtype) -> Tensor:
    """F (M×d×n), group by group: U_T, then the E_i."""
    parts = []
    for group in groups:
        columns = group.devices.columns(group.units, dtype, keep=True)
        parts += [group.tail.u.to(dtype), *(block for _, block in columns.blocks())]
    parts = [part for part in parts if part.shape[2]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _vote_core(groups: Sequence[Group]) -> Tensor:
    """C (M×n×n) with K = F·C·Fᵀ, the sum of the votes."""
    size = _columns(groups)
    core = groups[0].vote.new_zeros((groups[0].vote.shape[0], size, size))
    at = 0
    for group in groups:
        c, r = group.tail.width, group.rank
        shared = slice(at, at + c)
        for j, vote in enumerate(group.core().unbind(dim=1)):
            own = slice(at + c + j * r, at + c + (j + 1) * r)
            core[:, shared, shared] += vote[:, :c, :c]
            core[:, shared, own] = vote[:, :c, c:]
            core[:, own, shared] = vote[:, c:, :c]
            core[:, own, own] = vote[:, c:, c:]
        at += c + group.vote.shape[1] * r
    return core


def _mean_core(groups: Sequence[Group]) -> Tensor:
    """YYᵀ (M×n×n) with M = F·Y."""
    parts = []
    for group in groups:
        tail, share, plain = group.tail, group.batch.share.sum(dim=1)[:, None, None], group.units.plain[..., None, None]
        weighted = group.weights * _right_factors(group)
        on_tail = torch.where(plain, 0.0, group.cross @ weighted).sum(dim=1)
        own = torch.where(plain, weighted, group.fold() @ weighted)
        parts += [tail.vt * (tail.sigma[..., None] * share) + on_tail, own.flatten(1, 2)]
    right = torch.cat(parts, dim=1)
    core: Tensor = right @ right.mT
    return core


def _right_factors(group: Group) -> Tensor:
    """All A_i (M×m×r×n), float64, copied."""
    sizes = group.devices.shape
    modules, devices = torch.cartesian_prod(torch.arange(sizes.modules), torch.arange(sizes.devices)).mT.tolist()
    _, a = group.devices.picked(modules, devices)
    return a.view(sizes.modules, sizes.devices, sizes.rank, sizes.n).double()
