r"""K, or MMᵀ, applied to a few columns without being formed.

`VoteOperator`: :math:`Ky = \sum_i [U_T\,E_i]\,C_i\,[U_T\,E_i]^\top y`, C_i the devices' cores. In reduced precision
(the E_i and y in bfloat16, sums in float32) it costs 2^-9 of the votes and no more, however the uploads were
factored, for the E_i are well-conditioned. `finished` takes coefficients found so back through the uploads in
float32: what it returns has nothing outside of the space that devices span.
`MeanOperator`: :math:`MM^\top y`, M = Σp_iX_i, from the factors in float32.
Cost 4·d·Σr per column, for the mean 4(d + n)·Σr.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from glora_server.aggregation.fast.intake import Group
from glora_server.aggregation.product import times_transposed

_KEPT_BYTES = 10 << 20
"""Of one module in reduced precision; larger ones are converted anew in every pass, which costs half as much again."""


def low_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    supported: bool = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if supported else torch.float32


class Operator(Protocol):
    """A symmetric positive semidefinite d×d matrix L·Lᵀ or L·C·Lᵀ for each module, in units that float32 can square.

    What it is applied to are columns too, laid out as rows, so that no product has to turn one of them.
    """

    unit: Tensor
    """By what (M, float64) eigenvalues are to be multiplied."""

    @property
    def size(self) -> int:
        """How many coefficients a row has."""
        ...

    def apply(self, rows: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """`rows` (M×k×d, float32) times the matrix, in the fastest precision that does.

        Writes rows·LC (M×k×size), which is linear in the rows, into `coefficients` where they are wanted.
        """
        ...

    def finished(self, coefficients: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """L·coefficientsᵀ in float32 (M×d×k), and ΣB_i·extra_i (M×d×l).

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
        self._tails = [group.tail.u.float() for group in groups]
        traces = [group.vote.diagonal(dim1=-2, dim2=-1).sum(dim=(1, 2)) for group in groups]
        self.unit = _power_of_two(torch.stack(traces).sum(dim=0))
        self._cores = [(group.core() / self.unit[:, None, None, None]).float() for group in groups]
        values = sum(group.devices.shape.d * group.columns for group in groups)
        keep = values * self._low.itemsize <= _KEPT_BYTES
        self._columns = [group.devices.columns(group.units, self._low, keep=keep) for group in groups]
        self._ranks = [group.rank for group in groups]

    @property
    def size(self) -> int:
        """The columns of all [U_T E_i]."""
        return sum(core.shape[1] * core.shape[2] for core in self._cores)

    def apply(self, rows: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """rows·K; the coefficients are what each device's core made of rows·[U_T E_i]."""
        low = rows.to(self._low)
        total, at = torch.zeros_like(rows), 0
        for position, (tail, core) in enumerate(zip(self._tails, self._cores, strict=True)):
            c, inside = tail.shape[2], (rows @ tail)[:, None]
            said = torch.zeros_like(inside[:, 0])
            for part, block in self._columns[position].blocks():
                own = times_transposed(low, block.mT).float()
                own = own.reshape(*rows.shape[:2], -1, self._ranks[position]).transpose(1, 2)
                answered = torch.cat([inside.expand(-1, own.shape[1], -1, -1), own], dim=3) @ core[:, part].mT
                said += answered[..., :c].sum(dim=1)
                total += times_transposed(_joined(answered[..., c:]).to(self._low), block)
                if coefficients is not None:
                    joined = _joined(answered)
                    coefficients[..., at : at + joined.shape[2]] = joined
                    at += joined.shape[2]
            if c:
                total += said @ tail.mT
        return total

    def finished(self, coefficients: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Σ[U_T E_i]·coefficients_iᵀ, and the extra product."""
        k, total, at = coefficients.shape[1], coefficients.new_zeros(()), 0
        for position, (tail, core) in enumerate(zip(self._tails, self._cores, strict=True)):
            (m, size), c = core.shape[1:3], tail.shape[2]
            answered = coefficients[..., at : at + m * size].reshape(-1, k, m, size).permute(0, 2, 3, 1)
            at += m * size
            total = total + self._columns[position].combined(answered[..., c:, :], extra[position])
            if c:
                total[..., :k] += tail @ answered[..., :c, :].sum(dim=1)
        return total[..., :k], total[..., k:]


def _power_of_two(sizes: Tensor) -> Tensor:
    """The nearest power of two, which costs no rounding; 1 for zero."""
    return torch.where(sizes > 0, sizes, 1.0).log2().round().exp2()


def _joined(rows: Tensor) -> Tensor:
    """Rows of each device (M×m×k×r), device next to device (M×k×mr)."""
    return rows.transpose(1, 2).flatten(2)


class MeanOperator:
    """MMᵀ, always in float32: raw factors may be ill-conditioned."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        size = _power_of_two(torch.stack([group.magnitude for group in groups]).sum(dim=0))
        self.unit = size.square()
        self._tails = [SharedTail(group, 1.0 / size) for group in groups]
        self._weights = [(group.weights / size[:, None, None, None]).float() for group in groups]
        self._columns = [group.devices.columns(group.units, torch.float32, keep=False) for group in groups]

    @property
    def size(self) -> int:
        """n."""
        return self._groups[0].devices.shape.n

    def apply(self, rows: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """(rows·M)·Mᵀ; the coefficients are rows·M."""
        seen = self._seen(rows)
        if coefficients is not None:
            coefficients.copy_(seen)
        return self._times(seen, None)[0].mT

    def finished(self, coefficients: Tensor, extra: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """M·coefficientsᵀ, and the extra product."""
        return self._times(coefficients, extra)

    def _seen(self, rows: Tensor) -> Tensor:
        """rows·M (M×k×n)."""
        total = rows.new_zeros(())
        for group, tail, weights in zip(self._groups, self._tails, self._weights, strict=True):
            own = group.devices.right_sum(group.devices.onto(rows) * weights)
            total = total + own + tail.onto(rows)
        return total

    def _times(self, rows: Tensor, extra: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        """M·rowsᵀ (M×d×k), and the extra product."""
        k, total = rows.shape[1], rows.new_zeros(())
        for position, (group, tail) in enumerate(zip(self._groups, self._tails, strict=True)):
            seen = group.devices.seen(rows) * self._weights[position]
            more = seen[..., :0] if extra is None else extra[position]
            raw = self._columns[position].combined(seen[..., :0], torch.cat([seen, more], dim=-1))
            total = total + torch.nn.functional.pad(tail.times(rows.mT), (0, more.shape[3])) + raw
        return total[..., :k], total[..., k:]


class SharedTail:
    """p_kT_k of a group in float32, p_k the weight of its devices, times a factor for each module."""

    def __init__(self, group: Group, factor: Tensor | float = 1.0) -> None:
        weight = group.batch.share.sum(dim=1) * factor
        self.u = group.tail.u.float()
        self._right = (group.tail.vt * (group.tail.sigma * weight[:, None])[..., None]).float()

    def onto(self, rows: Tensor) -> Tensor:
        """rows·p_kT_k (M×k×n) for rows M×k×d."""
        return (rows @ self.u) @ self._right

    def times(self, columns: Tensor) -> Tensor:
        """p_kT_k·columns (M×d×k)."""
        return self.u @ (self._right @ columns)


def shared_tails(groups: Sequence[Group]) -> list[SharedTail]:
    """One per group."""
    return [SharedTail(group) for group in groups]


def probed_sum(groups: Sequence[Group]) -> Tensor:
    """Σp_if_iB_iA_iΩ (M×d×k), float32."""
    parts = [
        group.devices.columns(group.units, torch.float32, keep=False).combined(part[..., :0], part)
        for group, part in ((group, group.weighted_probes) for group in groups)
    ]
    return torch.stack(parts).sum(dim=0)
