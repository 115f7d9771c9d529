r"""K, or MMᵀ, applied to a few columns without being formed.

`VoteOperator`: :math:`Ky = \sum_i [U_T\,E_i]\,C_i\,[U_T\,E_i]^\top y`, C_i the devices' cores. In reduced precision
(the E_i and y in bfloat16, sums in float32) it costs 2^-9 of the votes and no more, however the uploads were
factored, for the E_i are well-conditioned. `finished` takes coefficients found so back through the uploads in
float32: what it returns has nothing outside of the space that devices span.
`MeanOperator`: :math:`MM^\top y`, M = Σp_iX_i, from the factors in float32.
Cost 4·d·Σr per column, for the mean 4(d + n)·Σr.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from glora_server.aggregation.fast.intake import Group

_KEPT_BYTES = 10 << 20
"""Of one module in reduced precision; larger ones are converted anew in every pass, which costs half as much again."""


def low_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    supported: bool = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


class Operator(Protocol):
    """A symmetric positive semidefinite d×d matrix L·Lᵀ or L·C·Lᵀ for each module."""

    def apply(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix times `columns` (M×d×k, float32), in the fastest precision that does, and its coefficients.

        These are CLᵀ·columns (M×…×k), linear in the columns.
        """
        ...

    def finished(self, coefficients: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """L·coefficients in float32, and ΣB_i·extra_i (M×d×l).

        `extra` (M×m×r×l, group by group) rides along, for the factors are read anyway.
        """
        ...


class VoteOperator:
    """K of all subspaces but mean; `bounded`: its eigenvalues are votes, not energies.

    Energies span the square of the range of σ, which leaves no room for the rounding of bfloat16.
    """

    def __init__(self, groups: Sequence[Group], *, bounded: bool) -> None:
        device = groups[0].tail.u.device
        self._low = low_precision(device) if bounded else torch.float32
        self._reduced = self._low != torch.float32
        self._tails = [group.tail.u.float() for group in groups]
        self._cores = [group.core().float() for group in groups]
        values = sum(group.devices.shape.d * group.columns for group in groups)
        keep = values * self._low.itemsize <= _KEPT_BYTES
        self._columns = [group.devices.columns(group.units, self._low, keep=keep) for group in groups]
        self._ranks = [group.rank for group in groups]
        self._rows = sum(core.shape[1] * core.shape[2] for core in self._cores)

    def apply(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """K·columns, and what each device's core made of [U_T E_i]ᵀ·columns."""
        low = columns.to(self._low)
        total, at = torch.zeros_like(columns), 0
        coefficients = columns.new_empty((columns.shape[0], self._rows, columns.shape[2]))
        for position, (tail, core) in enumerate(zip(self._tails, self._cores, strict=True)):
            c, inside = tail.shape[2], (tail.mT @ columns)[:, None]
            said = torch.zeros_like(inside[:, 0])
            for part, block in self._columns[position].blocks(reduced=self._reduced):
                own = self._split(position, _times(block.mT, low).float())
                answered = core[:, part] @ torch.cat([inside.expand(-1, own.shape[1], -1, -1), own], dim=2)
                said += answered[..., :c, :].sum(dim=1)
                total += _times(block, answered[..., c:, :].flatten(1, 2).to(self._low)).float()
                rows = answered.shape[1] * answered.shape[2]
                coefficients[:, at : at + rows] = answered.flatten(1, 2)
                at += rows
            if c:
                total += tail @ said
        return total, coefficients

    def finished(self, coefficients: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Σ[U_T E_i]·coefficients_i, and the extra product."""
        k, total, at = coefficients.shape[2], coefficients.new_zeros(()), 0
        for position, (tail, core) in enumerate(zip(self._tails, self._cores, strict=True)):
            (m, size), c = core.shape[1:3], tail.shape[2]
            answered = coefficients[:, at : at + m * size].view(-1, m, size, k)
            at += m * size
            total = total + self._columns[position].combined(answered[..., c:, :], extra[position])
            if c:
                total[..., :k] += tail @ answered[..., :c, :].sum(dim=1)
        return total[..., :k], total[..., k:]

    def _split(self, position: int, rows: Tensor) -> Tensor:
        """M×wr×k as M×w×r×k."""
        return rows.view(rows.shape[0], -1, self._ranks[position], rows.shape[2])


class MeanOperator:
    """MMᵀ, always in float32: raw factors may be ill-conditioned."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._tails = shared_tails(groups)
        self._columns = [group.devices.columns(group.units, torch.float32, keep=False) for group in groups]

    def apply(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """M(Mᵀ·columns), and Mᵀ·columns."""
        seen = self._transposed(columns)
        return self._times(seen, None)[0], seen

    def finished(self, coefficients: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """M·coefficients, and the extra product."""
        return self._times(coefficients, extra)

    def _transposed(self, columns: Tensor) -> Tensor:
        rows = columns.mT.contiguous()
        total = columns.new_zeros(())
        for group, tail in zip(self._groups, self._tails, strict=True):
            own = group.devices.right_sum(group.devices.onto(rows) * group.weights.float())
            total = total + own + tail.left_times(columns)
        return total.mT

    def _times(self, columns: Tensor, extra: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        k, total = columns.shape[2], columns.new_zeros(())
        for position, (group, tail) in enumerate(zip(self._groups, self._tails, strict=True)):
            seen = group.devices.seen(columns) * group.weights.float()
            more = seen[..., :0] if extra is None else extra[position]
            raw = self._columns[position].combined(seen[..., :0], torch.cat([seen, more], dim=-1))
            total = total + torch.nn.functional.pad(tail.times(columns), (0, more.shape[3])) + raw
        return total[..., :k], total[..., k:]


class SharedTail:
    """p_kT_k of a group in float32, p_k the weight of its devices."""

    def __init__(self, group: Group) -> None:
        tail = group.tail
        weight = group.batch.share.sum(dim=1)[:, None, None]
        self.u = tail.u.float()
        self._right = ((tail.v * tail.sigma[:, None]).mT * weight).float()

    def left_times(self, columns: Tensor) -> Tensor:
        """columnsᵀ·p_kT_k (M×k×n)."""
        return (columns.mT @ self.u) @ self._right

    def times(self, columns: Tensor) -> Tensor:
        """p_kT_k·columns (M×d×k)."""
        return self.u @ (self._right @ columns)


def shared_tails(groups: Sequence[Group]) -> list[SharedTail]:
    """One per group."""
    return [SharedTail(group) for group in groups]


@lru_cache(maxsize=8)
def gaussian(rows: int, columns: int, *, seed: int) -> Tensor:
    """Standard normal numbers (float32), drawn once for all modules of a shape; not to be written to.

    On the CPU whatever the device of a round, so that every machine has the same ones.
    """
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def raw_sum(groups: Sequence[Group], coefficients: Sequence[Tensor]) -> Tensor:
    """ΣB_i·coefficients_i (M×d×l), float32, for coefficients M×m×r×l, group by group."""
    parts = [
        group.devices.columns(group.units, torch.float32, keep=False).combined(part[..., :0], part)
        for group, part in zip(groups, coefficients, strict=True)
    ]
    return torch.stack(parts).sum(dim=0)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """left @ right (M×…); one module goes by the two-dimensional product, which in bfloat16 is ten times faster."""
    if left.shape[0] == 1:
        return (left[0] @ right[0])[None]
    product: Tensor = left @ right
    return product
