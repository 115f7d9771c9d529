"""Devices of several modules of one shape in two tensors: every product is one batched call, whatever their number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glora_server.aggregation.fast.devices import Products, Shape, Units, products_of, unit_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """b (M×m×d×r) and a (M×m×r×n), float32; see `devices.Devices` for the methods."""

    b: Tensor
    a: Tensor

    @classmethod
    def of(cls, b: Sequence[Sequence[Tensor]], a: Sequence[Sequence[Tensor]]) -> "Stacked":
        """From the factors of each module's devices."""
        return cls(
            b=torch.stack([torch.stack(list(module)).float() for module in b]),
            a=torch.stack([torch.stack(list(module)).float() for module in a]),
        )

    @property
    def shape(self) -> Shape:
        """Their sizes."""
        modules, devices, d, r = self.b.shape
        return Shape(modules=modules, devices=devices, d=d, n=self.a.shape[3], rank=r)

    def products(self, left: Tensor, right: Tensor) -> Products:
        """See `Devices`."""
        return products_of(self.b, self.a, left[:, None], right[:, None])

    def picked(self, modules: Sequence[int], devices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Devices`."""
        return self.b[list(modules), list(devices)], self.a[list(modules), list(devices)]

    def replaced(self, modules: Sequence[int], devices: Sequence[int], b: Tensor, a: Tensor) -> "Stacked":
        """See `Devices`."""
        places = torch.tensor(list(modules), device=b.device), torch.tensor(list(devices), device=b.device)
        return replace(self, b=self.b.index_put(places, b), a=self.a.index_put(places, a))

    def columns(self, units: Units, low: torch.dtype, *, keep: bool) -> "StackedColumns":  # noqa: ARG002 (it must)
        """See `Devices`."""
        return StackedColumns(self.b, units, low)

    def onto(self, rows: Tensor) -> Tensor:
        """See `Devices`."""
        found: Tensor = rows[:, None] @ self.b
        return found

    def seen(self, rows: Tensor) -> Tensor:
        """See `Devices`."""
        found: Tensor = self.a @ rows.mT[:, None]
        return found

    def right_sum(self, coefficients: Tensor) -> Tensor:
        """See `Devices`."""
        total: Tensor = coefficients.transpose(1, 2).flatten(2) @ self.a.flatten(1, 2)
        return total


class StackedColumns:
    """The E_i of several modules, side by side, in float32 and in the reduced precision."""

    def __init__(self, b: Tensor, units: Units, low: torch.dtype) -> None:
        self._raw = _side_by_side(b)
        self._units = self._raw
        if not bool(units.plain.all()):
            precise = low == torch.float64 or bool(units.precise.any())
            made = unit_columns(b, units.lift, units.shift, units.u[:, None], precise=precise)
            self._units = _side_by_side(torch.where(units.plain[..., None, None], b.to(made.dtype), made))
        self._low = self._units.to(low)
        self._units = self._units.float()
        self._devices = slice(0, b.shape[1])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """See `Columns`: one block."""
        yield self._devices, self._low

    def combined(self, on_units: Tensor, on_raw: Tensor) -> Tensor:
        """See `Columns`."""
        units, raw = on_units.flatten(1, 2), on_raw.flatten(1, 2)
        if self._units is self._raw:
            both: Tensor = self._raw @ torch.cat([units, raw], dim=-1)
            return both
        return torch.cat([self._units @ units, self._raw @ raw], dim=-1)


def _side_by_side(b: Tensor) -> Tensor:
    """M×d×mr from M×m×d×r."""
    return b.transpose(1, 2).flatten(2)
