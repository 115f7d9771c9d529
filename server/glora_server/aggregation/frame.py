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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glora_server.aggregation.factors import COMPUTE_DTYPE, EPS, CompactSvd, core_svd, singular_values

_ROWS_AT_A_TIME = 512


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
        return float((torch.linalg.vector_norm(self.left, dim=0) * torch.linalg.vector_norm(self.right, dim=0)).sum())

    def turned(self) -> "Coordinates":
        """X·Q for an orthonormal Q after which `right` is k×k or smaller: what norms of X and of PX need."""
        if self.right.shape[1] >= self.right.shape[0]:
            return self
        return Coordinates(left=self.left, right=torch.linalg.qr(self.right, mode="r").R)

    def norm(self) -> float:
        """‖X‖_F; a wide stack goes some rows at a time, so that no d×n matrix is needed."""
        right = self.turned().right.mT
        parts = (torch.linalg.matrix_norm(rows @ right) for rows in torch.split(self.left, _ROWS_AT_A_TIME))
        return math.hypot(*(float(part) for part in parts))

    def spectral_norm(self) -> float:
        """Largest singular value of X."""
        values = singular_values(self._core())
        return float(values[0]) if values.numel() else 0.0

    def svd(self) -> CompactSvd:
        """SVD of X in coordinates of the frame."""
        return core_svd(self.left, self.right)

    def _core(self) -> Tensor:
        t_left = torch.linalg.qr(self.left, mode="r").R
        t_right = torch.linalg.qr(self.right, mode="r").R
        core: Tensor = t_left @ t_right.mT
        return core


def rounding_floor(x: Coordinates) -> float:
    """Size below which a singular value of X may be float64 rounding; larger when terms cancel or gauges are bad."""
    return 32 * EPS * x.magnitude()


class JointFrame:
    """The frame of some blocks. Blocks must agree in d, n and device; nothing is changed in place."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._left = _Side([block.left for block in blocks])
        self._right = _Side([block.right.mT for block in blocks])
        ends = torch.tensor([block.left.shape[1] for block in blocks]).cumsum(0).tolist()
        self._spans = [slice(end - block.left.shape[1], end) for end, block in zip(ends, blocks, strict=True)]

    def coordinates(self, combination: Combination) -> Coordinates:
        """The combination in coordinates; O(q) per column."""
        left, right = self._left.columns, self._right.columns
        if not combination:
            return Coordinates(left=left[:, :0], right=right[:, :0])
        return Coordinates(
            left=torch.cat([left[:, self._spans[t.block]] * t.coefficient for t in combination], dim=1),
            right=torch.cat([right[:, self._spans[t.block]] for t in combination], dim=1),
        )

    def inner_products(self, combination: Combination) -> Tensor:
        """⟨block_i, X⟩ = Σ L_i∘(XR_i) for every block: inner products of combinations with X follow from it.

        XR, all columns of R at once, some rows of X at a time: 4q_Lq_R·cols flops where X is as wide as it is high,
        else 2(q_L + q_R)·cols·(columns of X).
        """
        found, right = self.coordinates(combination), self._right.columns
        narrow = found.left.shape[1] < min(found.left.shape[0], found.right.shape[0])
        seen = found.right.mT @ right if narrow else None
        by_column = right.new_zeros(right.shape[1])
        for start in range(0, found.left.shape[0], _ROWS_AT_A_TIME):
            rows = found.left[start : start + _ROWS_AT_A_TIME]
            image = (rows @ found.right.mT) @ right if seen is None else rows @ seen
            by_column += (self._left.columns[start : start + _ROWS_AT_A_TIME] * image).sum(dim=0)
        return torch.stack([by_column[span].sum() for span in self._spans])

    def coefficients(self, combination: Combination) -> Tensor:
        """The combination as a vector over the blocks: its product with `inner_products(X)` is ⟨combination, X⟩."""
        vector = self._left.columns.new_zeros(len(self._spans))
        for term in combination:
            vector[term.block] += term.coefficient
        return vector

    def lift_left(self, coordinates: Tensor) -> Tensor:
        """Q_L · coordinates (q_L×m → d×m)."""
        return self._left.lift(coordinates)

    def lift_right(self, coordinates: Tensor) -> Tensor:
        """Q_R · coordinates (q_R×m → n×m)."""
        return self._right.lift(coordinates)


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
