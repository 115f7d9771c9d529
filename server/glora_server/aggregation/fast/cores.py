r"""Gram cores of some devices of one rank: what `intake` decides votes from (the notation stands there).

Gram matrices square condition numbers. So columns are scaled to norm one, float32 sums are kept only where they show
themselves to suffice, and a device whose factors cancel (‖B‖‖A‖ ≫ ‖BA‖: a bad gauge) is refactored by QR first. The
error of σ that is left is 3e-8 of Σ‖b_j‖‖a_j‖.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glora_server.aggregation.factors import gauge_fix

RESOLUTION = 3e-8
"""Smallest σ relative to Σ‖b_j‖‖a_j‖ that the square root of a float64 Gram core can tell from zero."""

_CHUNK_VALUES = 1 << 19
_DROPPED = 1e-13
_LEAST_BEYOND = 1e-3
_LEAST_SPREAD = 1e-5
_LEAST_CHANGE = 1e-4
_BAD_GAUGE = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """T_k = u·diag(sigma)·vᵀ (float64, c columns; c may be 0) and what these devices were sent, times its scale·η."""

    u: Tensor
    sigma: Tensor
    v: Tensor
    sent_b: Tensor
    sent_a: Tensor
    sent_gain: float

    @property
    def width(self) -> int:
        """c."""
        return self.sigma.numel()

    @property
    def sent_square(self) -> float:
        """‖η·sent‖_F²."""
        left, right = self.sent_b.double(), self.sent_a.double()
        return float(((left.mT @ left) * (right @ right.mT)).sum()) * self.sent_gain**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Devices of one rank r with a common tail: factors, p_i and f_i (m, float64)."""

    tail: Tail
    b: tuple[Tensor, ...]
    a: tuple[Tensor, ...]
    share: Tensor
    gain: Tensor


def chunks(count: int, rows: int, rank: int) -> list[slice]:
    """Slices of devices whose factors fit into a few MB together."""
    size = max(1, _CHUNK_VALUES // (rows * rank))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The parts along a new first dimension in `dtype`."""
    return torch.stack(list(parts)).to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grams:
    """Inner products of devices' factors, float64: BᵀB, AAᵀ (m×r×r), U_TᵀB, V_TᵀAᵀ (m×c×r), ⟨BA, B0A0⟩ (m)."""

    b: Tensor
    a: Tensor
    cross: Tensor
    right: Tensor
    inner: Tensor

    def replaced(self, rows: Tensor, other: "Grams") -> "Grams":
        """The same with those of some devices replaced."""
        return Grams(
            b=self.b.index_copy(0, rows, other.b),
            a=self.a.index_copy(0, rows, other.a),
            cross=self.cross.index_copy(0, rows, other.cross),
            right=self.right.index_copy(0, rows, other.right),
            inner=self.inner.index_copy(0, rows, other.inner),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """What follows from the Grams.

    `norms` ν of B's columns; Λ^½ (`root`) and E (`directions`) of the columns over ν beyond the tail; eigenpairs of H,
    rising; `magnitude` Σ‖b_j‖‖a_j‖, `product` ‖B_iA_i‖_F, `change` ‖D_i‖_F² or 0 where only rounding is left.
    """

    norms: Tensor
    root: Tensor
    directions: Tensor
    values: Tensor
    vectors: Tensor
    magnitude: Tensor
    product: Tensor
    change: Tensor

    def cancellation(self) -> Tensor:
        """Σ‖b_j‖‖a_j‖ over ‖BA‖, ≥ 1; 1 for zero updates."""
        tiny = torch.finfo(self.product.dtype).tiny
        return torch.where(self.magnitude > 0, self.magnitude / self.product.clamp(min=tiny), 1.0)

    def trusted(self, gain: Tensor) -> Tensor:
        """Where float32 sums are good enough: a millionth does not matter to what was subtracted or is smallest."""
        spread = self.values[:, 0] > _LEAST_SPREAD * self.values[:, -1]
        changed = self.change > _LEAST_CHANGE * (self.product * gain).square()
        beyond = self.root[:, 0].square() > _LEAST_BEYOND
        return spread & changed & beyond & (self.cancellation() < _BAD_GAUGE)


def measured(batch: Batch) -> tuple[Batch, Grams, Cores]:
    """Grams and cores of the devices, and the batch with the bad gauges among them refactored."""
    grams = _grams(batch, range(len(batch.b)), torch.float32)
    cores = _cores(batch, grams)
    doubtful = (~cores.trusted(batch.gain)).nonzero()[:, 0]
    if doubtful.numel():
        grams = grams.replaced(doubtful, _grams(batch, doubtful.tolist(), torch.float64))
        cores = _cores(batch, grams)
    bad = (cores.cancellation() > _BAD_GAUGE).nonzero()[:, 0]
    if bad.numel():
        b, a = list(batch.b), list(batch.a)
        for i in bad.tolist():
            b[i], a[i] = _refactored(b[i], a[i])
        batch = replace(batch, b=tuple(b), a=tuple(a))
        grams = grams.replaced(bad, _grams(batch, bad.tolist(), torch.float64))
        cores = _cores(batch, grams)
    return batch, grams, cores


def inverse_root(root: Tensor) -> Tensor:
    """1/root, 0 where root is 0."""
    return torch.where(root > 0, 1.0 / root.clamp(min=_DROPPED**0.5), 0.0)


def _refactored(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors of the same product and shape, float32; unused columns are zero."""
    found = gauge_fix(b, a, 1.0, rank_tol=1e-7)
    half = found.sigma.sqrt()
    left = b.new_zeros(b.shape, dtype=torch.float32)
    right = a.new_zeros(a.shape, dtype=torch.float32)
    left[:, : half.numel()] = (found.u * half).float()
    right[: half.numel()] = (found.v * half).mT.float()
    return left, right


def _grams(batch: Batch, chosen: Sequence[int], dtype: torch.dtype) -> Grams:
    tail = batch.tail
    left = torch.cat([tail.u, tail.sent_b.double()], dim=1).to(dtype)
    right = torch.cat([tail.v, tail.sent_a.double().mT], dim=1).to(dtype)
    c, parts = tail.width, []
    d, r = batch.b[0].shape
    for part in chunks(len(chosen), max(d, batch.a[0].shape[1]), r):
        bs = stacked([batch.b[i] for i in chosen[part]], dtype)
        rows = stacked([batch.a[i] for i in chosen[part]], dtype)
        on_left, on_right = (left.mT @ bs).double(), (right.mT @ rows.mT).double()
        parts.append(
            Grams(
                b=(bs.mT @ bs).double(),
                a=(rows @ rows.mT).double(),
                cross=on_left[:, :c],
                right=on_right[:, :c],
                inner=(on_left[:, c:] * on_right[:, c:]).sum(dim=(1, 2)),
            )
        )
    return Grams(
        b=torch.cat([p.b for p in parts]),
        a=torch.cat([p.a for p in parts]),
        cross=torch.cat([p.cross for p in parts]),
        right=torch.cat([p.right for p in parts]),
        inner=torch.cat([p.inner for p in parts]),
    )


def _cores(batch: Batch, grams: Grams) -> Cores:
    on_b = grams.b.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    on_a = grams.a.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    norms = torch.where(on_b > 0, on_b, 1.0)
    cross = grams.cross / norms[:, None]
    beyond = grams.b / (norms[:, :, None] * norms[:, None, :]) - cross.mT @ cross
    values, directions = torch.linalg.eigh(beyond)
    root = torch.where(values > _DROPPED, values, 0.0).sqrt()
    j = _joint(cross, root[:, :, None] * directions.mT)
    core = j @ _right_gram(batch.tail, grams, norms * batch.gain[:, None]) @ j.mT
    spectrum, vectors = torch.linalg.eigh((core + core.mT) / 2)
    squares = (grams.b * grams.a).sum(dim=(1, 2)).clamp(min=0)
    return Cores(
        norms=norms,
        root=root,
        directions=directions,
        values=spectrum,
        vectors=vectors,
        magnitude=(on_b * on_a).sum(dim=1),
        product=squares.sqrt(),
        change=_change(batch, squares * batch.gain.square(), grams.inner),
    )


def _change(batch: Batch, own: Tensor, inner: Tensor) -> Tensor:
    """‖f_iB_iA_i − η·sent‖_F², 0 where nothing but rounding is left."""
    sent = batch.tail.sent_square
    change = own + sent - 2 * batch.gain * batch.tail.sent_gain * inner
    return torch.where(change > 1e-14 * (own + sent), change, 0.0)


def _joint(cross: Tensor, fold: Tensor) -> Tensor:
    """J (m×(c+r)×(c+r))."""
    m, c, r = cross.shape
    joint = cross.new_zeros((m, c + r, c + r))
    joint[:, :c, :c] = torch.eye(c, dtype=cross.dtype, device=cross.device)
    joint[:, :c, c:] = cross
    joint[:, c:, c:] = fold
    return joint


def _right_gram(tail: Tail, grams: Grams, factor: Tensor) -> Tensor:
    """Gram matrix of [Σ_TV_Tᵀ; factor·A] (m×(c+r)×(c+r))."""
    m, c, r = grams.cross.shape
    whole = factor.new_zeros((m, c + r, c + r))
    whole[:, :c, :c] = torch.diag(tail.sigma.square())
    whole[:, :c, c:] = tail.sigma[:, None] * grams.right * factor[:, None]
    whole[:, c:, :c] = whole[:, :c, c:].mT
    whole[:, c:, c:] = grams.a * factor[:, :, None] * factor[:, None, :]
    return whole
