"""The factors of some devices of one rank, for one module or for several of one shape, behind the few products needed.

Tensors of a round have the modules (M) first and the devices (m) second. `Listed` is one module whose factors stay
where they are: a few devices at a time are copied side by side, which costs a fraction of what wider products save and
takes next to no memory. `stacked.Stacked` holds several modules of one shape in two tensors: on a GPU a loop over small
matrices would cost more than the arithmetic.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from glora_server.aggregation.product import times_transposed

_BLOCK_BYTES = 1 << 20
_SIDE_BY_SIDE = 1 << 19
"""Numbers of factors that are copied side by side for one product: with more, they leave a core's own cache."""
_LEAST_WIDE = 128
"""Columns or rows that they have together at least: with fewer, adding up the products costs more than they do."""
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
    """BᵀB, AAᵀ (M×m×r×r), LB (M×m×p×r), RAᵀ (M×m×q×r) for given rows L and R.

    Of chosen devices, their number stands in place of M×m.
    """

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

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All devices in order: which, and their [E_i …] (M×d×wr) in the reduced precision."""
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
        """Of all devices, summed in float32, for rows L (M×p×d) and R (M×q×n), float32."""
        ...

    def picked(self, modules: Sequence[int], devices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """B (q×d×r) and A (q×r×n) of some of them, as uploaded."""
        ...

    def replaced(self, modules: Sequence[int], devices: Sequence[int], b: Tensor, a: Tensor) -> Self:
        """The same with other factors for some of them, given as `picked` gives them."""
        ...

    def columns(self, units: Units, low: torch.dtype, *, keep: bool) -> Columns:
        """The E_i; `low` is the precision of blocks (reduced, float32, or float64, in which they are then made), and
        `keep` allows to hold all of them in it.
        """
        ...

    def onto(self, rows: Tensor) -> Tensor:
        """rows·B_i (M×m×k×r), float32, for rows (M×k×d)."""
        ...

    def seen(self, rows: Tensor) -> Tensor:
        """A_i·rowsᵀ (M×m×r×k), float32, for rows (M×k×n)."""
        ...

    def right_sum(self, coefficients: Tensor) -> Tensor:
        """Σ coefficients_i·A_i (M×k×n), float32, for coefficients (M×m×k×r)."""
        ...


def products_of(b: Tensor, a: Tensor, left: Tensor, right: Tensor) -> Products:
    """Of q devices with their own left (q×p×d) and right (q×p×n), in the dtype given."""
    return Products(b=b.mT @ b, a=a @ a.mT, left=left @ b, right=right @ a.mT)


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
        m, r = self.shape.devices, self.shape.rank
        own = left.new_empty((2, m, r, r), dtype=torch.float32)
        for b, a, on_b, on_a in zip(self.b, self.a, *(gram.unbind() for gram in own), strict=True):
            wide_b, wide_a = b.float(), a.float()
            torch.mm(wide_b.mT, wide_b, out=on_b)
            torch.mm(wide_a, wide_a.mT, out=on_a)
        none = own.new_empty((1, m, 0, r))
        return Products(
            b=own[:1],
            a=own[1:],
            left=self.onto(left) if left.shape[1] else none,
            right=self.seen(right).mT if right.shape[1] else none,
        )

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
        k, r = rows.shape[1], self.shape.rank
        found = rows.new_empty((1, len(self.b), k, r))
        for part, block in side_by_side(self.b, dim=1):
            found[0, part] = times_transposed(rows[0], block.mT).view(k, -1, r).transpose(0, 1)
        return found

    def seen(self, rows: Tensor) -> Tensor:
        """See `Devices`."""
        k, r = rows.shape[1], self.shape.rank
        found = rows.new_empty((1, len(self.a), r, k))
        for part, block in side_by_side(self.a, dim=0):
            found[0, part] = times_transposed(block, rows[0]).view(-1, r, k)
        return found

    def right_sum(self, coefficients: Tensor) -> Tensor:
        """See `Devices`."""
        total = coefficients.new_zeros((coefficients.shape[2], self.shape.n))
        for part, block in side_by_side(self.a, dim=0):
            total += times_transposed(coefficients[0, part].transpose(0, 1).flatten(1), block.mT)
        return total[None]


def side_by_side(factors: Sequence[Tensor], *, dim: int) -> Iterator[tuple[slice, Tensor]]:
    """All of some matrices of one shape in order: which, and these next to one another along `dim`, in float32.

    A block is overwritten by the next one.
    """
    (rows, columns), numbers = factors[0].shape, factors[0].numel()
    count = min(max(1, _SIDE_BY_SIDE // numbers, _LEAST_WIDE // (rows, columns)[dim]), len(factors))
    buffer = factors[0].new_empty(count * numbers, dtype=torch.float32)
    for start in range(0, len(factors), count):
        some = factors[start : start + count]
        block = buffer[: len(some) * numbers].view(-1 if dim == 0 else rows, columns if dim == 0 else -1)
        if dim == 0:
            torch.cat(tuple(some), out=block)
        else:  # `cat` takes half as long again
            for place, factor in zip(block.tensor_split(len(some), dim=1), some, strict=True):
                place.copy_(factor)
        yield slice(start, start + len(some)), block


class ListedColumns:
    """The E_i of one module. A reduced copy of all is kept if allowed, and else made block by block each time."""

    def __init__(self, b: Sequence[Tensor], units: Units, low: torch.dtype, *, keep: bool) -> None:
        self._b = b
        self._units = units
        self._plain: list[bool] = units.plain[0].tolist()
        self._precise: list[bool] = (units.precise[0] | (low == torch.float64)).tolist()
        self._low = low
        self._keeps = keep
        self._kept: Tensor | None = None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """See `Columns`. A block is overwritten by the next one."""
        (d, r), m = self._b[0].shape, len(self._b)
        if self._kept is not None:
            yield slice(0, m), self._kept
            return
        one = d * r * self._low.itemsize
        size = m if self._keeps else max(1, _BLOCK_BYTES // one, _LEAST_WIDE // r)
        # Device next to device in each row: one large product per block, and copying is as fast as it can be.
        buffer = self._b[0].new_empty((1, d, min(size, m) * r), dtype=self._low)
        for start in range(0, m, size):
            part = slice(start, min(start + size, m))
            block = buffer[..., : (part.stop - part.start) * r]
            for i, place in zip(range(part.start, part.stop), torch.split(block[0], r, dim=1), strict=True):
                place.copy_(self._column(i))
            if self._keeps:
                self._kept = block
            yield part, block

    def combined(self, on_units: Tensor, on_raw: Tensor) -> Tensor:
        """See `Columns`."""
        k = on_units.shape[-1]
        plain = torch.tensor(self._plain, device=on_units.device)[:, None, None]
        both = torch.cat([torch.where(plain, on_units[0], 0.0), on_raw[0]], dim=-1)
        total = both.new_zeros((self._b[0].shape[0], both.shape[-1]))
        for part, block in side_by_side(self._b, dim=1):
            total += times_transposed(block, both[part].flatten(0, 1).mT)
        for i, as_uploaded in enumerate(self._plain):
            if not as_uploaded:
                total[:, :k].addmm_(self._column(i).float(), on_units[0, i])
        return total[None]

    def _column(self, i: int) -> Tensor:
        if self._plain[i]:
            return self._b[i]
        units = self._units
        return unit_columns(self._b[i], units.lift[0, i], units.shift[0, i], units.u[0], precise=self._precise[i])
