r"""One orthonormal frame for everything that a round says about a module.

All matrices of a round are combinations of a few low-rank *blocks* (the state, the uploads, the adapters that were
sent):
:math:`X = \sum_k c_k L_kR_k^\top`. One Householder QR of all lefts and one of all rights,

.. math:: [L_1 \dots L_m] = Q_L T_L, \qquad [R_1 \dots R_m] = Q_R T_R,

turn each X into :math:`Q_L (T_L\,\mathrm{diag}(c)\,T_R^\top) Q_R^\top`, so that norms, inner products, singular
vectors and projections are computed in coordinates of at most `cols` = Σ ranks numbers. Q_L and Q_R stay
Householder reflectors and are only applied to the few columns that are wanted. Each column's rounding error is
relative to its own norm, so an ill-conditioned gauge costs eps·‖b_k‖‖a_k‖ and no more. Coordinates never outgrow
the stack that came in: q_L = min(d, cols), q_R = min(n, cols). A side with as many columns as rows or more is its own
frame (Q = I): a QR would turn it and save nothing. Cost 2(d + n)·cols² for the frame of narrow stacks and nothing for
wide ones, 4(d + n)·cols·R to come back; inner products are linear in cols beyond d and n.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glora_server.aggregation.factors import COMPUTE_DTYPE, EPS, CompactSvd, core_left, core_svd, singular_values
from glora_server.aggregation.product import times_transposed

_ROWS_AT_A_TIME = 512
_LEAST, _MOST = 1e-12, 1e12
"""Norms of columns that float32 holds, and whose products it holds as well."""
_LARGE = 1 << 26
"""Multiplications from which a product for diagnostics is tried in float32."""
_VAST = 1 << 20
"""Numbers of a matrix that is formed no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One low-rank term: left (d×k) times right (k×n), any floating dtype."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """`coefficient` times the block at position `block` of the frame."""

    block: int
    coefficient: float


Combination = tuple[Term, ...]
"""A matrix as a sum of terms; the empty combination is zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """left (q_L×k) and right (q_R×k) with X = Q_L · left · rightᵀ · Q_Rᵀ; coefficients are folded into `left`."""

    left: Tensor
    right: Tensor

    def magnitude(self) -> float:
        """Σ_k ‖l_k‖‖r_k‖: what rounding errors of any arithmetic on X are relative to."""
        return float(_column_magnitudes(self.left, self.right).sum())

    def norm(self) -> float:
        """‖X‖_F; a wide stack goes some rows at a time, so that no d×n matrix is needed."""
        right = self.right
        if right.shape[1] < min(right.shape[0], self.left.shape[0]):
            right = torch.linalg.qr(right, mode="r").R
        return _product_norm(self.left, right)

    def rough_norm(self) -> float:
        """The same in float32, which costs it up to 6e-8 of the magnitude."""
        rough = self.in_float32()
        return _product_norm(rough.left, rough.right)

    def in_float32(self) -> "Coordinates":
        """All columns in float32.

        Rounding is relative to each number, so a gauge takes no part in it; one that could leave float32's range is
        balanced first, so that columns of the right have norm 1.
        """
        left, right = self.left, self.right
        if not (_is_moderate(left) and _is_moderate(right)):
            norms = torch.linalg.vector_norm(right, dim=0)
            norms = torch.where(norms > 0, norms, 1.0)
            left, right = left * norms, right / norms
        return Coordinates(left=left.float().contiguous(), right=right.float())

    def norms(self) -> tuple[float, float]:
        """Largest singular value of X, and ‖X‖_F."""
        values = singular_values(self._core())
        return (float(values[0]), float(torch.linalg.vector_norm(values))) if values.numel() else (0.0, 0.0)

    def svd(self) -> CompactSvd:
        """SVD of X in coordinates of the frame."""
        return core_svd(self.left, self.right)

    def left_svd(self) -> tuple[Tensor, Tensor]:
        """Left singular vectors, in coordinates of the frame, and singular values."""
        return core_left(self.left, self.right)

    def _core(self) -> Tensor:
        t_left = torch.linalg.qr(self.left, mode="r").R
        t_right = torch.linalg.qr(self.right, mode="r").R
        core: Tensor = t_left @ t_right.mT
        return core


def _product_norm(left: Tensor, right: Tensor) -> float:
    parts = [torch.linalg.vector_norm(times_transposed(rows, right), dtype=COMPUTE_DTYPE) for rows in _some_rows(left)]
    return math.hypot(*torch.stack(parts).tolist())


def _column_magnitudes(left: Tensor, right: Tensor) -> Tensor:
    """‖l_k‖‖r_k‖ of the columns; in units of their largest entries where squares overflow."""
    found: Tensor = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=0)
    if bool(torch.isfinite(found).all()):
        return found
    tops = [side.abs().amax(dim=0) for side in (left, right)]
    units = [torch.where(top > 0, top, 1.0) for top in tops]
    found = units[0] * units[1]
    for side, unit in zip((left, right), units, strict=True):
        found = found * torch.linalg.vector_norm(side / unit, dim=0)
    return found


def rounding_floor(magnitude: float) -> float:
    """Size below which a singular value of X may be float64 rounding; larger when terms cancel or gauges are bad."""
    return 32 * EPS * magnitude


class JointFrame:
    """The frame of some blocks. Blocks must agree in d, n and device; nothing is changed in place."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._left = _Side([block.left for block in blocks])
        self._right = _Side([block.right.mT for block in blocks])
        ends = torch.tensor([block.left.shape[1] for block in blocks]).cumsum(0).tolist()
        self._spans = [slice(end - block.left.shape[1], end) for end, block in zip(ends, blocks, strict=True)]
        self._formed: tuple[Combination, Tensor] | None = None

    def columns(self, block: int) -> tuple[Tensor, Tensor]:
        """Left (q_L×k) and right (q_R×k) columns of a block in coordinates; not to be written to."""
        span = self._spans[block]
        return self._left.columns[:, span], self._right.columns[:, span]

    def coordinates(self, combination: Combination) -> Coordinates:
        """The combination in coordinates; O(q) per column."""
        return self._of(Coordinates(left=self._left.columns, right=self._right.columns), combination)

    def inner_products(self, combination: Combination, *, rough: bool = False) -> Tensor:
        """⟨block_i, X⟩ = Σ L_i∘(XR_i) for every block, float64: inner products of combinations with X follow from it.

        XR, all columns of R at once, some rows of X at a time: 4q_Lq_R·cols flops where X is as wide as it is high,
        else 2(q_L + q_R)·cols·(columns of X). `rough`: in float32, which costs a combination Y up to 6e-8 of
        ‖Y‖·magnitude(X) + magnitude(Y)·‖X‖, for X is formed before it meets a block.
        """
        whole = self._rough if rough else Coordinates(left=self._left.columns, right=self._right.columns)
        found = self._of(whole, combination)
        if found.left.shape[1] < min(found.left.shape[0], found.right.shape[0]):
            seen = times_transposed(found.right.mT, whole.right.mT)
            return self._by_block(whole, (times_transposed(some, seen.mT) for some in _some_rows(found.left)))
        rows: Iterable[Tensor] = (times_transposed(some, found.right) for some in _some_rows(found.left))
        if rough and not self.vast:
            rows = _some_rows(self.rough_matrix(combination))
        return self._by_block(whole, (times_transposed(some, whole.right.mT) for some in rows))

    def rough_matrix(self, combination: Combination) -> Tensor:
        """X (q_L×q_R) in float32, the last one of which is kept; for frames that are not `vast`."""
        if self._formed is None or self._formed[0] != combination:
            found = self._of(self._rough, combination)
            self._formed = combination, times_transposed(found.left, found.right)
        return self._formed[1]

    def _by_block(self, whole: Coordinates, images: Iterable[Tensor]) -> Tensor:
        """Σ L_i∘Y_i for every block, from Y some rows at a time."""
        by_column = whole.right.new_zeros(whole.right.shape[1], dtype=COMPUTE_DTYPE)
        for some, image in zip(_some_rows(whole.left), images, strict=True):
            by_column += (some * image).sum(dim=0)
        return torch.stack([by_column[span].sum() for span in self._spans])

    def _of(self, whole: Coordinates, combination: Combination) -> Coordinates:
        """The combination, from all columns in one dtype or another."""
        if len(combination) > len(self._spans) // 2:  # then the columns as they stand, some of them with weight 0
            weights = self.coefficients(combination).repeat_interleave(self._widths)
            return Coordinates(left=whole.left * weights.to(whole.left.dtype), right=whole.right)
        spans = [self._spans[term.block] for term in combination]
        parts = [whole.left[:, span] * term.coefficient for span, term in zip(spans, combination, strict=True)]
        return Coordinates(
            left=torch.cat([whole.left[:, :0], *parts], dim=1),
            right=torch.cat([whole.right[:, :0], *(whole.right[:, span] for span in spans)], dim=1),
        )

    @cached_property
    def _widths(self) -> Tensor:
        widths = [span.stop - span.start for span in self._spans]
        return torch.tensor(widths, device=self._left.columns.device)

    def outside(self, combination: Combination, basis: Tensor) -> Coordinates:
        """(I − P)X, P the projection onto `basis` (q_L×m, orthonormal)."""
        found = self.coordinates(combination)
        return Coordinates(left=found.left - basis @ (basis.mT @ found.left), right=found.right)

    @cached_property
    def _rough(self) -> Coordinates:
        """All columns in float32, half the memory of the float64 ones once more."""
        return Coordinates(left=self._left.columns, right=self._right.columns).in_float32()

    @property
    def large(self) -> bool:
        """Whether products of all columns cost so much that float32 is worth a try."""
        return self._left.columns.numel() * self._right.columns.shape[0] >= _LARGE

    @property
    def vast(self) -> bool:
        """Whether a matrix in coordinates is too large to be formed."""
        return self._left.columns.shape[0] * self._right.columns.shape[0] > _VAST

    def magnitude(self, combination: Combination) -> float:
        """Σ_k‖l_k‖‖r_k‖ of the combination, as `Coordinates.magnitude` would have it."""
        return sum(abs(term.coefficient) * self._magnitudes[term.block] for term in combination)

    @cached_property
    def _magnitudes(self) -> list[float]:
        norms = _column_magnitudes(self._left.columns, self._right.columns)
        found: list[float] = torch.stack([norms[span].sum() for span in self._spans]).tolist()
        return found

    def inside(self, basis: Tensor) -> list[float]:
        """‖P·block‖ for every block, P the projection onto `basis` (q_L×m, orthonormal)."""
        left, right = basis.mT @ self._left.columns, self._right.columns
        norms = [torch.linalg.matrix_norm(left[:, span] @ right[:, span].mT) for span in self._spans]
        found: list[float] = torch.stack(norms).tolist()
        return found

    def coefficients(self, combination: Combination) -> Tensor:
        """The combination as a vector over the blocks: its product with `inner_products(X)` is ⟨combination, X⟩."""
        values = [0.0] * len(self._spans)
        for term in combination:
            values[term.block] += term.coefficient
        return self._left.columns.new_tensor(values)

    def lift_left(self, coordinates: Tensor) -> Tensor:
        """Q_L · coordinates (q_L×m → d×m)."""
        return self._left.lift(coordinates)

    def lift_right(self, coordinates: Tensor) -> Tensor:
        """Q_R · coordinates (q_R×m → n×m)."""
        return self._right.lift(coordinates)


def _is_moderate(columns: Tensor) -> bool:
    """Whether float32 holds all columns, and their products."""
    norms = torch.linalg.vector_norm(columns, dim=0)
    return bool(((norms == 0) | ((norms > _LEAST) & (norms < _MOST))).all())


def _some_rows(matrix: Tensor) -> tuple[Tensor, ...]:
    return torch.split(matrix, _ROWS_AT_A_TIME)


class _Side:
    """Householder QR of stacked columns, with Q kept as reflectors; the stack itself where it is wide (Q = I)."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        # Column-major, as LAPACK wants it: anything else is copied twice.
        stack = torch.cat([part.mT.to(COMPUTE_DTYPE) for part in parts]).mT
        self._wide = stack.shape[1] >= stack.shape[0]
        self._packed, self._tau = (stack, stack[0, :0]) if self._wide else torch.geqrf(stack)

    @cached_property
    def columns(self) -> Tensor:
        """The stack in coordinates (q×cols), q = min(rows, cols); upper triangular unless it is wide."""
        return self._packed if self._wide else self._packed[: self._tau.shape[-1]].triu()

    def lift(self, coordinates: Tensor) -> Tensor:
        if self._wide:
            return coordinates
        q = self._tau.shape[-1]
        padded = coordinates.new_zeros((self._packed.shape[0], coordinates.shape[1]))
        padded[:q] = coordinates
        return torch.ormqr(self._packed[:, :q], self._tau, padded)
