r"""Low-rank factors of one module: records, checks, norms, gauge fixing.

A device trains :math:`B (d\times r), A (r\times n)`; what it says is :math:`\Delta W = sBA`. Everything here
depends on the product only and is computed from thin QR cores in float64; a product is formed where it is no larger
than its factors, and nowhere else. `d` = out features, `n` = in features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from glora_server.aggregation.errors import (
    ConvergenceError,
    DeviceError,
    DtypeError,
    EmptyUpdatesError,
    NonFiniteError,
    ScaleError,
    ShapeError,
    WeightError,
)

_LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it in __all__

COMPUTE_DTYPE = torch.float64
"""All cores are float64: float32 inputs then lose nothing to an ill-conditioned gauge, and cores are small."""

EPS = torch.finfo(COMPUTE_DTYPE).eps

_LARGEST = 1e140
"""Of entries of B times those of A, so that squares of products fit float64; shorter dtypes cannot reach it."""


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """One device's trained factors of one module.

    `b` (d×r) and `a` (r×n) in the wire dtype; `scale` is s = alpha/r (rsLoRA: alpha/√r); `weight` ≥ 0 in any unit
    (training rows), normalised over the round. `sent` = (b0, a0) as the device received them, after rounding to the
    wire dtype; `sent_scale` is their scale where it is not `scale`.

    A factor that was not uploaded is *absent*, which is not zero: it has rank 0, so b is d×0 or a is 0×n (see `only_a`
    and `only_b`). Strategies whose contract uploads one factor ignore the other one or check it against the common one.
    """

    b: Tensor
    a: Tensor
    scale: float
    weight: float
    sent: tuple[Tensor, Tensor] | None = None
    sent_scale: float | None = None

    @property
    def rank(self) -> int:
        """Number of columns of `b`, or of rows of `a` where `b` is absent."""
        return self.b.shape[1] or self.a.shape[0]

    @property
    def has_b(self) -> bool:
        """Whether B was uploaded."""
        return self.b.shape[1] > 0

    @property
    def has_a(self) -> bool:
        """Whether A was uploaded."""
        return self.a.shape[0] > 0

    @classmethod
    def only_b(
        cls, b: Tensor, scale: float, weight: float, *, in_features: int, sent: tuple[Tensor, Tensor] | None = None
    ) -> Self:
        """An update of which only B (d×r) was uploaded, for a module with n = in_features."""
        return cls(b, b.new_zeros((0, in_features)), scale, weight, sent=sent)

    @classmethod
    def only_a(
        cls, a: Tensor, scale: float, weight: float, *, out_features: int, sent: tuple[Tensor, Tensor] | None = None
    ) -> Self:
        """An update of which only A (r×n) was uploaded, for a module with d = out_features."""
        return cls(a.new_zeros((out_features, 0)), a, scale, weight, sent=sent)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactSvd:
    """X = u · diag(sigma) · vᵀ with orthonormal columns, sigma falling."""

    u: Tensor
    sigma: Tensor
    v: Tensor


def svd(core: Tensor) -> CompactSvd:
    """Thin SVD of a small core. Raises ConvergenceError."""
    try:
        u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    except _LinAlgError as error:
        raise _not_converged(core) from error
    return CompactSvd(u=u, sigma=sigma, v=vh.mT)


def singular_values(core: Tensor) -> Tensor:
    """Falling singular values of a small core. Raises ConvergenceError."""
    try:
        values: Tensor = torch.linalg.svdvals(core)
    except _LinAlgError as error:
        raise _not_converged(core) from error
    return values


def core_svd(left: Tensor, right: Tensor) -> CompactSvd:
    r"""SVD of :math:`X = L R^\top` from :math:`L = Q_LT_L,\ R = Q_RT_R` and the SVD of :math:`T_LT_R^\top`.

    left (d×k), right (n×k), float64. Returns u (d×m), sigma (m), v (n×m) with m = min(d, n, k). O((d + n)k² + k³);
    with more columns than X has on its short side X itself is the smaller core, O(dnk + dn·m) and no larger than the
    factors.
    """
    if _is_wide(left, right):
        return svd(left @ right.mT)
    q_left, t_left = torch.linalg.qr(left)
    q_right, t_right = torch.linalg.qr(right)
    core = svd(t_left @ t_right.mT)
    return CompactSvd(u=q_left @ core.u, sigma=core.sigma, v=q_right @ core.v)


def _is_wide(left: Tensor, right: Tensor) -> bool:
    """Whether L Rᵀ is a smaller core than the triangles of L and R."""
    return left.shape[-1] > min(left.shape[-2], right.shape[-2])


def core_left(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(u, sigma) of `core_svd`, which costs a third less for thin factors: Q_R is never made."""
    if _is_wide(left, right):
        found = svd(left @ right.mT)
        return found.u, found.sigma
    q_left, t_left = torch.linalg.qr(left)
    core = svd(t_left @ torch.linalg.qr(right, mode="r").R.mT)
    return q_left @ core.u, core.sigma


def delta_norm(b: Tensor, a: Tensor, scale: float) -> float:
    r"""‖sBA‖_F from the two QR cores, :math:`s\|T_BT_A^\top\|_F`: error ~ eps‖B‖‖A‖, where a Gram form has its square.

    b (d×r), a (r×n), any floating dtype.
    """
    return abs(scale) * float(torch.linalg.matrix_norm(_product_core(b, a)))


def spectral_norm(b: Tensor, a: Tensor, scale: float) -> float:
    """Largest singular value of sBA, from the same r×r core as `delta_norm`."""
    values = singular_values(_product_core(b, a))
    return abs(scale) * float(values[0]) if values.numel() else 0.0


def delta_inner(first: ClientUpdate, second: ClientUpdate) -> float:
    r"""⟨ΔW_1, ΔW_2⟩ = s_1s_2 Σ (B_1ᵀB_2)∘(A_1A_2ᵀ), in float64, O((d + n)r_1r_2)."""
    left = first.b.to(COMPUTE_DTYPE).mT @ second.b.to(COMPUTE_DTYPE)
    right = first.a.to(COMPUTE_DTYPE) @ second.a.to(COMPUTE_DTYPE).mT
    return first.scale * second.scale * float((left * right).sum())


def gauge_fix(b: Tensor, a: Tensor, scale: float, *, rank_tol: float) -> CompactSvd:
    r"""Rank-revealing factors of :math:`\Delta W = sBA`: its part with :math:`\sigma_j > \tau\sigma_1` (§1.2).

    The same result for every factorisation of the same ΔW, up to rotations inside equal singular values.
    """
    found = core_svd(b.to(COMPUTE_DTYPE) * scale, a.to(COMPUTE_DTYPE).mT)
    keep = numerical_rank(found.sigma, tolerance=rank_tol)
    return CompactSvd(u=found.u[:, :keep], sigma=found.sigma[:keep], v=found.v[:, :keep])


def numerical_rank(sigma: Tensor, *, tolerance: float, floor: float = 0.0) -> int:
    """How many of the falling `sigma` are above tolerance·sigma[0] and above `floor`."""
    if sigma.numel() == 0:
        return 0
    return int((sigma > max(tolerance * float(sigma[0]), floor)).sum())


def default_rank_tol(dtype: torch.dtype) -> float:
    """Rank tolerance τ that rounding to the wire dtype asks for (ALGORITHMS §1.2)."""
    if dtype == torch.float64:
        return 1e-12
    return 1e-5 if dtype == torch.float32 else 4e-2


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a state is kept: float64 for float64 uploads, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalised_weights(weights: Sequence[float]) -> tuple[float, ...]:
    """p_i = weight_i / Σ weights. Raises WeightError."""
    for position, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise WeightError(
                f"Update {position} has weight {weight}; give a finite number of training rows, zero or more."
            )
    largest = max(weights)
    if largest == 0:
        raise WeightError("All weights are zero, so there is no mean; at least one update must have a positive weight.")
    parts = [weight / largest for weight in weights]  # so that no sum can overflow
    total = math.fsum(parts)
    return tuple(part / total for part in parts)


def check_updates(updates: Sequence[ClientUpdate]) -> None:
    """Raise the fitting AggregationError unless all updates describe one module, finite, on one device."""
    if not updates:
        raise EmptyUpdatesError("There are no updates to aggregate; keep the previous state instead.")
    first = updates[0]
    for position, update in enumerate(updates):
        name = f"Update {position}"
        _check_form(update.b, update.a, name=name, one_may_be_absent=True)
        _check_scales(update, name=name)
        if (update.b.shape[0], update.a.shape[1]) != (first.b.shape[0], first.a.shape[1]):
            raise ShapeError(
                f"{name} is for a {update.b.shape[0]}×{update.a.shape[1]} module and update 0 for "
                f"{first.b.shape[0]}×{first.a.shape[1]}; aggregate one module at a time."
            )
        if update.b.dtype != first.b.dtype:
            raise DtypeError(f"{name} is {update.b.dtype} and update 0 is {first.b.dtype}; a run has one wire dtype.")
        _check_device(update.b, first.b, name=name)
        _check_sent(update, name=name)
    _check_all_finite(updates)


def check_factors(b: Tensor, a: Tensor, *, name: str) -> None:
    """Raise unless `b` (d×r) and `a` (r×n) are finite floating matrices of one rank, dtype and device."""
    _check_form(b, a, name=name)
    _check_finite(b, a, name=name)


def _check_form(b: Tensor, a: Tensor, *, name: str, one_may_be_absent: bool = False) -> None:
    fits = b.ndim == a.ndim == 2 and b.shape[1] == a.shape[0]
    absent = one_may_be_absent and b.ndim == a.ndim == 2 and (b.shape[1] == 0) != (a.shape[0] == 0)
    if not (fits or absent):
        raise ShapeError(
            f"{name} has B {tuple(b.shape)} and A {tuple(a.shape)}; B must be out×r and A r×in with the same r."
        )
    if 0 in (b.shape[0], a.shape[1], b.shape[1] or a.shape[0]):
        raise ShapeError(f"{name} has an empty dimension: B {tuple(b.shape)}, A {tuple(a.shape)}.")
    if not b.dtype.is_floating_point or b.dtype != a.dtype:
        raise DtypeError(f"{name} has B {b.dtype} and A {a.dtype}; both must be the same floating dtype.")
    _check_device(b, a, name=name)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. A finite sum has finite terms only, and costs a tenth of looking at each."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _check_finite(b: Tensor, a: Tensor, *, name: str) -> None:
    for label, tensor in (("B", b), ("A", a)):
        if not all_finite(tensor):
            raise NonFiniteError(
                f"{name} has NaN or infinity in {label}; training diverged or the upload is damaged. "
                "Reject it and lower the learning rate if it repeats."
            )
    if b.dtype == COMPUTE_DTYPE and b.numel() and a.numel():
        top = float(b.abs().max()) * float(a.abs().max())
        if top > _LARGEST:
            raise NonFiniteError(
                f"{name} has numbers whose products reach {top:.3g}, which cannot be computed with; "
                "training diverged or the upload is damaged. Reject it."
            )


def _check_all_finite(updates: Sequence[ClientUpdate]) -> None:
    """Raise NonFiniteError for the first update with NaN or infinity; one answer from the device if there is none."""
    # Devices of one rank were sent the same tensors.
    sent = {id(factor): factor for update in updates if update.sent is not None for factor in update.sent}
    factors = [*(factor for update in updates for factor in (update.b, update.a)), *sent.values()]
    wide = any(factor.dtype == COMPUTE_DTYPE for factor in factors)
    if not wide and bool(torch.isfinite(torch.stack([factor.sum() for factor in factors])).all()):
        return
    for position, update in enumerate(updates):
        _check_finite(update.b, update.a, name=f"Update {position}")
        if update.sent is not None:
            _check_finite(*update.sent, name=f"Update {position}, as sent,")


def is_rank(value: object) -> bool:
    """Whether it is a whole number from 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_scale(scale: float, *, name: str) -> None:
    """Raise ScaleError unless `scale` is a positive finite number."""
    if not math.isfinite(scale) or scale <= 0:
        raise ScaleError(f"{name} has scale {scale}; s = alpha/r must be a positive finite number.")


def _not_converged(core: Tensor) -> ConvergenceError:
    return ConvergenceError(
        f"The singular value decomposition of a {core.shape[0]}×{core.shape[1]} core did not converge. "
        "Run the round again; if it repeats, look for extreme values in the uploads."
    )


def _product_core(b: Tensor, a: Tensor) -> Tensor:
    check_factors(b, a, name="The product")
    t_left = torch.linalg.qr(b.to(COMPUTE_DTYPE), mode="r").R
    t_right = torch.linalg.qr(a.to(COMPUTE_DTYPE).mT, mode="r").R
    core: Tensor = t_left @ t_right.mT
    return core


def _check_scales(update: ClientUpdate, *, name: str) -> None:
    check_scale(update.scale, name=name)
    if update.sent_scale is not None:
        check_scale(update.sent_scale, name=f"{name}, as sent,")


def _check_device(tensor: Tensor, other: Tensor, *, name: str) -> None:
    if tensor.device != other.device:
        raise DeviceError(f"{name} has tensors on {tensor.device} and {other.device}; move all to one device first.")


def _check_sent(update: ClientUpdate, *, name: str) -> None:
    if update.sent is None:
        return
    b0, a0 = update.sent
    _check_form(b0, a0, name=f"{name}, as sent,")
    _check_device(b0, update.b, name=name)
    if (b0.shape[0], a0.shape[1]) != (update.b.shape[0], update.a.shape[1]):
        raise ShapeError(
            f"{name} was sent a {b0.shape[0]}×{a0.shape[1]} adapter and is {update.b.shape[0]}×{update.a.shape[1]}."
        )
