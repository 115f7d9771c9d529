r"""K, or MMᵀ, applied to a few columns without being formed, some devices at a time.

`VoteOperator`: :math:`Ky = \sum_i Q_i(p_iW_i)Q_i^\top y` with Q_i = [U_T N_i]. The N_i are rebuilt from the uploads in
each pass, unless a bfloat16 copy of all of them is small. Since the N_i are orthonormal, bfloat16 costs 2^-9 of the
vote and no more, however the uploads were factored.
`MeanOperator`: :math:`MM^\top y`, M = Σp_iX_i, from the factors in float32.
Cost 4·d·Σr per column, for the mean 4(d + n)·Σr.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from glora_server.aggregation.fast.cores import chunks, stacked
from glora_server.aggregation.fast.intake import Group

_CACHE_BYTES = 12 << 20


def low_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    supported: bool = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


class Operator(Protocol):
    """A symmetric positive semidefinite d×d matrix."""

    def apply(self, columns: Tensor, *, reduced: bool = False) -> Tensor:
        """The matrix times `columns` (d×k, float32); `reduced`: in the fastest precision."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Some devices of a group: `rows` are their N_iᵀ, one below the other ((m·r)×d)."""

    group: int
    part: slice
    rows: Tensor


def unit_rows(group: Group, part: slice, dtype: torch.dtype) -> Tensor:
    """N_iᵀ of some devices, (m·r)×d, float32 or float64."""
    lift, shift = group.lift[part].to(dtype), group.shift[part].to(dtype)
    rows = lift.mT @ stacked(group.batch.b[part], dtype).mT
    if group.tail.width:
        rows -= shift.mT @ group.tail.u.to(dtype).mT
    return rows.flatten(0, 1)


class VoteOperator:
    """K of all subspaces but mean; `bounded`: its eigenvalues are votes, not energies.

    Energies span the square of the range of σ, which leaves no room for the rounding of bfloat16.
    """

    def __init__(self, groups: Sequence[Group], *, bounded: bool) -> None:
        self._groups = groups
        self._tails = [group.tail.u.float() for group in groups]
        self._votes = [group.vote.float() for group in groups]
        self._low = low_precision(groups[0].batch.b[0].device) if bounded else torch.float32
        values = sum(len(group.batch.b) * group.batch.b[0].numel() for group in groups)
        self._keeps = values * self._low.itemsize <= _CACHE_BYTES
        self._kept: list[_Chunk] = []

    def apply(self, columns: Tensor, *, reduced: bool = False) -> Tensor:
        """K·columns."""
        dtype = self._low if reduced else torch.float32
        inside = [tail.mT @ columns for tail in self._tails]
        back = [torch.zeros_like(part) for part in inside]
        low = columns.to(dtype)
        total = torch.zeros_like(columns)
        for chunk in self._chunks(reduced=reduced):
            c, r = inside[chunk.group].shape[0], self._groups[chunk.group].rank
            seen = (chunk.rows @ low).float().view(-1, r, low.shape[1])
            votes = self._votes[chunk.group][chunk.part]
            if c:
                seen = torch.cat([inside[chunk.group].expand(seen.shape[0], -1, -1), seen], dim=1)
            said = votes @ seen
            back[chunk.group] += said[:, :c].sum(dim=0)
            total += (chunk.rows.mT @ said[:, c:].flatten(0, 1).to(dtype)).float()
        for tail, part in zip(self._tails, back, strict=True):
            if part.shape[0]:
                total += tail @ part
        return total

    def _chunks(self, *, reduced: bool) -> Iterator[_Chunk]:
        if not reduced or not self._keeps:
            yield from self._built(self._low if reduced else torch.float32)
            return
        if not self._kept:
            self._kept = self._merged()
        yield from self._kept

    def _built(self, dtype: torch.dtype) -> Iterator[_Chunk]:
        for position, group in enumerate(self._groups):
            build = torch.float64 if group.precise else torch.float32
            for part in chunks(len(group.batch.b), *group.batch.b[0].shape):
                yield _Chunk(group=position, part=part, rows=unit_rows(group, part, build).to(dtype))

    def _merged(self) -> list[_Chunk]:
        """One chunk per group: fewer, larger products."""
        merged = []
        for position, group in enumerate(self._groups):
            rows = group.batch.b[0].new_empty(
                (len(group.batch.b) * group.rank, group.batch.b[0].shape[0]), dtype=self._low
            )
            merged.append(_Chunk(group=position, part=slice(0, len(group.batch.b)), rows=rows))
        for chunk in self._built(self._low):
            rank = self._groups[chunk.group].rank
            merged[chunk.group].rows[chunk.part.start * rank : chunk.part.stop * rank] = chunk.rows
        return merged


class MeanOperator:
    """MMᵀ."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups

    def apply(self, columns: Tensor, *, reduced: bool = False) -> Tensor:  # noqa: ARG002 (of the protocol)
        """M(Mᵀ·columns), always in float32: raw factors may be ill-conditioned."""
        return times_mean(self._groups, mean_times(self._groups, columns).mT)


def mean_times(groups: Sequence[Group], columns: Tensor) -> Tensor:
    """columnsᵀ·M (k×n), float32, for columns (d×k)."""
    n = groups[0].batch.a[0].shape[1]
    total = columns.new_zeros((columns.shape[1], n))
    for group, tail in zip(groups, shared_tails(groups), strict=True):
        total += tail.left_times(columns)
        for b, a, weight in zip(group.batch.b, group.batch.a, group.weights, strict=True):
            total.addmm_(columns.mT @ b.float(), a.float(), alpha=weight)
    return total


def times_mean(groups: Sequence[Group], columns: Tensor) -> Tensor:
    """M·columns (d×k), float32, for columns (n×k)."""
    total = columns.new_zeros((groups[0].batch.b[0].shape[0], columns.shape[1]))
    for group, tail in zip(groups, shared_tails(groups), strict=True):
        total += tail.times(columns)
        for b, a, weight in zip(group.batch.b, group.batch.a, group.weights, strict=True):
            total.addmm_(b.float(), a.float() @ columns, alpha=weight)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTail:
    """p_kT_k of a group in float32, p_k the weight of its devices."""

    u: Tensor
    right: Tensor

    def left_times(self, columns: Tensor) -> Tensor:
        """columnsᵀ·p_kT_k."""
        return (columns.mT @ self.u) @ self.right

    def times(self, columns: Tensor) -> Tensor:
        """p_kT_k·columns."""
        return self.u @ (self.right @ columns)


def shared_tails(groups: Sequence[Group]) -> list[SharedTail]:
    """One per group."""
    return [
        SharedTail(
            u=group.tail.u.float(),
            right=((group.tail.v * group.tail.sigma).mT * group.batch.share.sum()).float(),
        )
        for group in groups
    ]
