r"""Gram cores of some devices of one rank: what `intake` decides votes from (the notation stands there).

Gram matrices square condition numbers. So columns are scaled to norm one, float32 sums are kept only where they show
themselves to suffice, and a device whose factors cancel (‖B‖‖A‖ ≫ ‖BA‖: a bad gauge) is refactored by QR first. The
error of σ that is left is 3e-8 of Σ‖b_j‖‖a_j‖.

Modules (M) come first and devices (m) second in every shape; columns of a tail that a module lacks are zero.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glora_server.aggregation.factors import gauge_fix
from glora_server.aggregation.fast.devices import Devices, Products, chunks, products_of
from glora_server.aggregation.fast.probes import probes

RESOLUTION = 3e-8
"""Smallest σ relative to Σ‖b_j‖‖a_j‖ that the square root of a float64 Gram core can tell from zero."""

_DROPPED = 1e-13
_WELL_CONDITIONED = 1e-4
_LEAST_BEYOND = 1e-3
_LEAST_SPREAD = 1e-5
_LEAST_CHANGE = 1e-4
_BAD_GAUGE = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """T_k = u·diag(sigma)·vt (M×d×c, M×c, M×c×n, float64; c may be 0) and what these devices were sent.

    That is sent_gain·sent_b·sent_a (M, M×d×q, M×q×n), sent_gain its scale·η; `sent_square` is ‖η·sent‖_F² (M).
    """

    u: Tensor
    sigma: Tensor
    vt: Tensor
    sent_b: Tensor
    sent_a: Tensor
    sent_gain: Tensor
    sent_square: Tensor

    @property
    def width(self) -> int:
        """c."""
        return self.sigma.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Devices of one rank r with a common tail: factors, p_i and f_i (M×m, float64)."""

    tail: Tail
    devices: Devices
    share: Tensor
    gain: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Grams:
    """Inner products of devices' factors, float64.

    BᵀB, AAᵀ (M×m×r×r), U_TᵀB, V_TᵀAᵀ (M×m×c×r), B0ᵀB, A0Aᵀ (M×m×q×r), and AΩ (M×m×r×k).
    """

    b: Tensor
    a: Tensor
    cross: Tensor
    right: Tensor
    sent: Tensor
    sent_right: Tensor
    probed: Tensor

    @property
    def inner(self) -> Tensor:
        """⟨BA, B0A0⟩ (M×m)."""
        return (self.sent * self.sent_right).sum(dim=(-2, -1))

    def replaced(self, places: tuple[Tensor, Tensor], other: "Grams") -> "Grams":
        """The same with those of some devices replaced; `other` has them along its first dimension."""
        return Grams(
            b=self.b.index_put(places, other.b),
            a=self.a.index_put(places, other.a),
            cross=self.cross.index_put(places, other.cross),
            right=self.right.index_put(places, other.right),
            sent=self.sent.index_put(places, other.sent),
            sent_right=self.sent_right.index_put(places, other.sent_right),
            probed=self.probed.index_put(places, other.probed),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """What follows from the Grams.

    `norms` ν of B's columns; `beyond`: the columns over ν beyond the tail, see `Beyond`; `h` H, with `lower` and
    `upper` bounds of its eigenvalues (M×m); `magnitude` Σ‖b_j‖‖a_j‖, `product` ‖B_iA_i‖_F, `change` ‖D_i‖_F² or 0
    where only rounding is left.
    """

    norms: Tensor
    beyond: "Beyond"
    h: Tensor
    lower: Tensor
    upper: Tensor
    magnitude: Tensor
    product: Tensor
    change: Tensor

    def cancellation(self) -> Tensor:
        """Σ‖b_j‖‖a_j‖ over ‖BA‖, ≥ 1; 1 for zero updates."""
        tiny = torch.finfo(self.product.dtype).tiny
        return torch.where(self.magnitude > 0, self.magnitude / self.product.clamp(min=tiny), 1.0)

    def trusted(self, gain: Tensor) -> Tensor:
        """Where float32 sums are good enough: a millionth does not matter to what was subtracted or is smallest."""
        spread = self.lower > _LEAST_SPREAD * self.upper
        changed = self.change > _LEAST_CHANGE * (self.product * gain).square()
        beyond = self.beyond.least > _LEAST_BEYOND
        return spread & changed & beyond & (self.cancellation() < _BAD_GAUGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beyond:
    """Of columns G = N·fold, N orthonormal: fold and its (pseudo-)inverse `lift` (M×m×r×r), from GᵀG.

    `least` (M×m): at most the smallest eigenvalue of GᵀG; `least_alive`: of those that are not dropped.
    """

    fold: Tensor
    lift: Tensor
    least: Tensor
    least_alive: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> "Beyond":
        """By Cholesky where all devices' columns are well-conditioned, else by eigenvectors, at ten times the cost."""
        inverse, least = _inverse_factor(gram)
        if bool((least > _WELL_CONDITIONED).all()):
            return cls(fold=torch.linalg.cholesky(gram).mT, lift=inverse.mT, least=least, least_alive=least)
        values, directions = torch.linalg.eigh(gram)
        root = torch.where(values > _DROPPED, values, 0.0).sqrt()
        inverse_root = torch.where(root > 0, 1.0 / root.clamp(min=_DROPPED**0.5), 0.0)
        return cls(
            fold=root[..., :, None] * directions.mT,
            lift=directions * inverse_root[..., None, :],
            least=root[..., 0].square(),
            least_alive=torch.where(root > 0, values, torch.inf).amin(dim=-1),
        )


def _inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """L⁻¹ with gram = LLᵀ, and 1/‖gram⁻¹‖_F, at most the smallest eigenvalue; 0 where there is no such L."""
    factor, info = torch.linalg.cholesky_ex(gram)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    inverse = torch.linalg.solve_triangular(factor, unit, upper=False)
    least = 1.0 / torch.linalg.matrix_norm(inverse.mT @ inverse)
    return inverse, torch.where(info == 0, least, 0.0).nan_to_num(nan=0.0)


def measured(batch: Batch) -> tuple[Batch, Grams, Cores]:
    """Grams and cores of the devices, and the batch with the bad gauges among them refactored."""
    grams = _grams(batch.devices.products(*_against(batch, torch.float32)), batch.tail)
    cores = _cores(batch, grams)
    doubtful = _places(~cores.trusted(batch.gain))
    if doubtful[0].numel():
        grams = grams.replaced(doubtful, _precisely(batch, doubtful))
        cores = _cores(batch, grams)
    bad = _places(cores.cancellation() > _BAD_GAUGE)
    if bad[0].numel():
        batch = replace(batch, devices=_refactored(batch.devices, bad))
        grams = grams.replaced(bad, _precisely(batch, bad))
        cores = _cores(batch, grams)
    return batch, grams, cores


def _refactored(devices: Devices, places: tuple[Tensor, Tensor]) -> Devices:
    """The devices with balanced factors of the same products and shapes, float32; unused columns are zero."""
    modules, members = _as_lists(places)
    lefts, rights = [], []
    for module, member in zip(modules, members, strict=True):
        b, a = devices.picked([module], [member])
        found = gauge_fix(b[0], a[0], 1.0, rank_tol=1e-7)
        half = found.sigma.sqrt()
        left, right = torch.zeros_like(b[0], dtype=torch.float32), torch.zeros_like(a[0], dtype=torch.float32)
        left[:, : half.numel()] = (found.u * half).float()
        right[: half.numel()] = (found.v * half).mT.float()
        lefts.append(left)
        rights.append(right)
    return devices.replaced(modules, members, torch.stack(lefts), torch.stack(rights))


def _precisely(batch: Batch, places: tuple[Tensor, Tensor]) -> Grams:
    """Float64 sums for some devices, a few at a time."""
    left, right = _against(batch, torch.float64)
    modules, members = _as_lists(places)
    sizes, parts = batch.devices.shape, []
    for part in chunks(len(members), max(sizes.d, sizes.n) * (sizes.rank + left.shape[1])):
        b, a = batch.devices.picked(modules[part], members[part])
        parts.append(products_of(b.double(), a.double(), left[modules[part]], right[modules[part]]))
    joined = Products(
        b=torch.cat([p.b for p in parts]),
        a=torch.cat([p.a for p in parts]),
        left=torch.cat([p.left for p in parts]),
        right=torch.cat([p.right for p in parts]),
    )
    return _grams(joined, batch.tail)


def _places(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Modules and devices of the true entries (M×m)."""
    modules, devices = chosen.nonzero(as_tuple=True)
    return modules, devices


def _as_lists(places: tuple[Tensor, Tensor]) -> tuple[list[int], list[int]]:
    return places[0].tolist(), places[1].tolist()


def _against(batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[U_T B_0]ᵀ and [V_T A_0ᵀ Ω]ᵀ: what every device is compared with."""
    tail = batch.tail
    omega = probes(batch.devices.shape, tail.vt.device).mT
    left = torch.cat([tail.u.mT.to(dtype), tail.sent_b.mT.to(dtype)], dim=1)
    return left, torch.cat([tail.vt.to(dtype), tail.sent_a.to(dtype), omega.to(dtype)], dim=1)


def _grams(found: Products, tail: Tail) -> Grams:
    c, q = tail.width, tail.sent_b.shape[2]
    left, right = found.left.double(), found.right.double()
    return Grams(
        b=found.b.double(),
        a=found.a.double(),
        cross=left[..., :c, :],
        right=right[..., :c, :],
        sent=left[..., c:, :],
        sent_right=right[..., c : c + q, :],
        probed=right[..., c + q :, :].mT,
    )


def _cores(batch: Batch, grams: Grams) -> Cores:
    on_b = grams.b.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    on_a = grams.a.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    norms = torch.where(on_b > 0, on_b, 1.0)
    cross = grams.cross / norms[..., None, :]
    beyond = Beyond.of(grams.b / (norms[..., :, None] * norms[..., None, :]) - cross.mT @ cross)
    j = _joint(cross, beyond.fold)
    core = j @ _right_gram(batch.tail, grams, norms * batch.gain[..., None]) @ j.mT
    h = (core + core.mT) / 2
    squares = (grams.b * grams.a).sum(dim=(-2, -1)).clamp(min=0)
    return Cores(
        norms=norms,
        beyond=beyond,
        h=h,
        lower=_inverse_factor(h)[1],
        upper=h.diagonal(dim1=-2, dim2=-1).sum(dim=-1),
        magnitude=(on_b * on_a).sum(dim=-1),
        product=squares.sqrt(),
        change=_change(batch, squares * batch.gain.square(), grams.inner),
    )


def _change(batch: Batch, own: Tensor, inner: Tensor) -> Tensor:
    """‖f_iB_iA_i − η·sent‖_F², 0 where nothing but rounding is left."""
    sent = batch.tail.sent_square[:, None]
    change = own + sent - 2 * batch.gain * batch.tail.sent_gain[:, None] * inner
    return torch.where(change > 1e-14 * (own + sent), change, 0.0)


def _joint(cross: Tensor, fold: Tensor) -> Tensor:
    """J (M×m×(c+r)×(c+r))."""
    c, r = cross.shape[-2:]
    joint = cross.new_zeros((*cross.shape[:-2], c + r, c + r))
    joint[..., :c, :c] = torch.eye(c, dtype=cross.dtype, device=cross.device)
    joint[..., :c, c:] = cross
    joint[..., c:, c:] = fold
    return joint


def _right_gram(tail: Tail, grams: Grams, factor: Tensor) -> Tensor:
    """Gram matrix of [Σ_TV_Tᵀ; factor·A] (M×m×(c+r)×(c+r))."""
    c, r = grams.cross.shape[-2:]
    whole = factor.new_zeros((*factor.shape[:-1], c + r, c + r))
    whole[..., :c, :c] = torch.diag_embed(tail.sigma.square())[:, None]
    whole[..., :c, c:] = tail.sigma[:, None, :, None] * grams.right * factor[..., None, :]
    whole[..., c:, :c] = whole[..., :c, c:].mT
    whole[..., c:, c:] = grams.a * factor[..., :, None] * factor[..., None, :]
    return whole
