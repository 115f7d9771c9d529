"""The factors of some devices of one rank, for one module or for several of one shape, behind the few products needed.

Tensors of a round have the modules (M) first and the devices (m) second. `Listed` is one module whose factors stay
where they are and are read device by device: on a CPU that is as fast as one large product and takes no memory.
`stacked.Stacked` holds several modules of one shape in two tensors: on a GPU a loop over small matrices would cost more
than the arithmetic.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

_BLOCK_BYTES = 2 << 20
_CHUNK_VALUES = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Modules M, devices m, factors B d×r and A r×n."""

    modules: int
    devices: int
    d: int
    n: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """BᵀB, AAᵀ (M×m×r×r) and LᵀB, RᵀAᵀ (M×m×p×r) for given L, R; of chosen devices q stands in place of M×m."""

    b: Tensor
    a: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    r"""Columns E_i that span with U_T what device i says and are well-conditioned beside it.

    E_i = B_i where `plain` (M×m), for B_i is well-conditioned as it is; elsewhere E_i = B_i·lift − u·shift, which is
    orthonormal; lift (M×m×r×r), shift (M×m×c×r), u (M×d×c), float64; `precise` (M×m): that needs float64.
    """

    lift: Tensor
    shift: Tensor
    u: Tensor
    plain: Tensor
    precise: Tensor


class Columns(Protocol):
    """The E_i of some devices."""

    def blocks(self, *, reduced: bool) -> Iterator[tuple[slice, Tensor]]:
        """All devices in order: which, and their [E_i …] (M×d×wr), float32 or the reduced precision."""
        ...

    def combined(self, on_units: Tensor, on_raw: Tensor) -> Tensor:
        """[ΣE_i·on_units_i, ΣB_i·on_raw_i] (M×d×(k+l)) in float32 for coefficients M×m×r×k and M×m×r×l."""
        ...


class Devices(Protocol):
    """The factors of m devices of rank r in M modules."""

    @property
    def shape(self) -> Shape:
        """Their sizes."""
        ...

    def products(self, left: Tensor, right: Tensor) -> Products:
        """Of all devices, summed in float32, for left (M×d×p), right (M×n×p)."""
        ...

    def picked(self, modules: Sequence[int], devices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """B (q×d×r) and A (q×r×n) of some of them, as uploaded."""
        ...

    def replaced(self, modules: Sequence[int], devices: Sequence[int], b: Tensor, a: Tensor) -> Self:
        """The same with other factors for some of them, given as `picked` gives them."""
        ...

    def columns(self, units: Units, low: torch.dtype, *, keep: bool) -> Columns:
        """The E_i; `low` is the reduced precision, and `keep` allows to hold all of them in it."""
        ...

    def onto(self, rows: Tensor) -> Tensor:
        """rows·B_i (M×m×k×r), float32, for rows (M×k×d)."""
        ...

    def seen(self, columns: Tensor) -> Tensor:
        """A_i·columns (M×m×r×k), float32, for columns (M×n×k)."""
        ...

    def right_sum(self, coefficients: Tensor) -> Tensor:
        """Σ coefficients_i·A_i (M×k×n), float32, for coefficients (M×m×k×r)."""
        ...


def products_of(b: Tensor, a: Tensor, left: Tensor, right: Tensor) -> Products:
    """Of q devices with their own left (q×d×p) and right (q×n×p), in the dtype given."""
    return Products(b=b.mT @ b, a=a @ a.mT, left=left.mT @ b, right=right.mT @ a.mT)


def chunks(count: int, values: int) -> list[slice]:
    """Slices of so many things that their `values` each take a few MB together."""
    size = max(1, _CHUNK_VALUES // values)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def unit_columns(b: Tensor, lift: Tensor, shift: Tensor, u: Tensor, *, precise: bool) -> Tensor:
    """B·lift − u·shift, float64 if `precise`, else float32; any leading dimensions."""
    dtype = torch.float64 if precise else torch.float32
    found: Tensor = b.to(dtype) @ lift.to(dtype)
    return found - u.to(dtype) @ shift.to(dtype) if u.shape[-1] else found


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Devices of one module, each with tensors of its own."""

    b: tuple[Tensor, ...]
    a: tuple[Tensor, ...]

    @property
    def shape(self) -> Shape:
        """Their sizes."""
        (d, r), n = self.b[0].shape, self.a[0].shape[1]
        return Shape(modules=1, devices=len(self.b), d=d, n=n, rank=r)

    def products(self, left: Tensor, right: Tensor) -> Products:
        """See `Devices`."""
        sizes, wide_left, wide_right = self.shape, left[0].float().mT, right[0].float().mT
        m, r, p = sizes.devices, sizes.rank, left.shape[2]
        own = left.new_empty((2, m, r, r), dtype=torch.float32)
        across = left.new_empty((2, m, p, r), dtype=torch.float32)
        for i, (b, a) in enumerate(zip(self.b, self.a, strict=True)):
            wide_b, wide_a = b.float(), a.float()
            torch.mm(wide_b.mT, wide_b, out=own[0, i])
            torch.mm(wide_a, wide_a.mT, out=own[1, i])
            if p:
                torch.mm(wide_left, wide_b, out=across[0, i])
                torch.mm(wide_right, wide_a.mT, out=across[1, i])
        return Products(b=own[:1], a=own[1:], left=across[:1], right=across[1:])

    def picked(self, modules: Sequence[int], devices: Sequence[int]) -> tuple[Tensor, Tensor]:  # noqa: ARG002 (one)
        """See `Devices`."""
        return torch.stack([self.b[i] for i in devices]), torch.stack([self.a[i] for i in devices])

    def replaced(self, modules: Sequence[int], devices: Sequence[int], b: Tensor, a: Tensor) -> "Listed":  # noqa: ARG002
        """See `Devices`."""
        bs, rows = list(self.b), list(self.a)
        for position, i in enumerate(devices):
            bs[i], rows[i] = b[position], a[position]
        return replace(self, b=tuple(bs), a=tuple(rows))

    def columns(self, units: Units, low: torch.dtype, *, keep: bool) -> "ListedColumns":
        """See `Devices`."""
        return ListedColumns(self.b, units, low, keep=keep)

    def onto(self, rows: Tensor) -> Tensor:
        """See `Devices`."""
        found = rows.new_empty((1, len(self.b), rows.shape[1], self.shape.rank))
        for i, b in enumerate(self.b):
            torch.mm(rows[0], b.float(), out=found[0, i])
        return found

    def seen(self, columns: Tensor) -> Tensor:
        """See `Devices`."""
        found = columns.new_empty((1, len(self.a), self.shape.rank, columns.shape[2]))
        for i, a in enumerate(self.a):
            torch.mm(a.float(), columns[0], out=found[0, i])
        return found

    def right_sum(self, coefficients: Tensor) -> Tensor:
        """See `Devices`."""
        total = coefficients.new_zeros((coefficients.shape[2], self.shape.n))
        for part, a in zip(coefficients[0], self.a, strict=True):
            total.addmm_(part, a.float())
        return total[None]


class ListedColumns:
    """The E_i of one module. A reduced copy of all is kept if allowed, and else made block by block each time."""

    def __init__(self, b: Sequence[Tensor], units: Units, low: torch.dtype, *, keep: bool) -> None:
        self._b = b
        self._units = units
        self._plain: list[bool] = units.plain[0].tolist()
        self._precise: list[bool] = units.precise[0].tolist()
        self._low = low
        self._keeps = keep
        self._kept: Tensor | None = None

    def blocks(self, *, reduced: bool) -> Iterator[tuple[slice, Tensor]]:
        """See `Columns`. A reduced block is overwritten by the next one."""
        if not reduced:
            for i in range(len(self._b)):
                yield slice(i, i + 1), self._column(i).float()[None]
            return
        (d, r), m = self._b[0].shape, len(self._b)
        if self._kept is not None:
            yield slice(0, m), self._kept
            return
        one = d * r * self._low.itemsize
        size = m if self._keeps else max(1, _BLOCK_BYTES // one)
        # Device next to device in each row: one large product per block, and copying is as fast as it can be.
        buffer = self._b[0].new_empty((1, d, min(size, m) * r), dtype=self._low)
        for start in range(0, m, size):
            part = slice(start, min(start + size, m))
            for at, i in enumerate(range(part.start, part.stop)):
                buffer[0, :, at * r : (at + 1) * r].copy_(self._column(i))
            block = buffer[..., : (part.stop - part.start) * r]
            if self._keeps:
                self._kept = block
            yield part, block

    def combined(self, on_units: Tensor, on_raw: Tensor) -> Tensor:
        """See `Columns`."""
        k = on_units.shape[-1]
        both = torch.cat([on_units, on_raw], dim=-1)[0]
        total = both.new_zeros((self._b[0].shape[0], both.shape[-1]))
        for i, b in enumerate(self._b):
            if self._plain[i]:
                total.addmm_(b.float(), both[i])
            else:
                total[:, :k].addmm_(self._column(i).float(), both[i, :, :k])
                total[:, k:].addmm_(b.float(), both[i, :, k:])
        return total[None]

    def _column(self, i: int) -> Tensor:
        if self._plain[i]:
            return self._b[i]
        units = self._units
        return unit_columns(self._b[i], units.lift[0, i], units.shift[0, i], units.u[0], precise=self._precise[i])
