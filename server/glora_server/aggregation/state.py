r"""The server's state of one module in its canonical gauge, and the slices that devices get.

:math:`S = UA` with U orthonormal, :math:`A = \Sigma V^\top`, singular values falling, the largest |entry| of each
column of U positive (a convention that makes versions comparable). A readout of rank r is then the first r columns
and rows: it is
:math:`S_{[r]}`, and readouts nest.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from glora_server.aggregation.errors import NonFiniteError, OptionError, RankError, ShapeError
from glora_server.aggregation.factors import (
    COMPUTE_DTYPE,
    CompactSvd,
    check_factors,
    check_scale,
    core_svd,
    is_rank,
    numerical_rank,
)

DEAD_BELOW = 1e-6
"""A direction with σ_j ≤ DEAD_BELOW·σ_1 cannot be trained as it is and is handed out refilled."""

ROW_NORM = 1 / math.sqrt(3)
"""Norm of a refilled row of A: what PEFT's Kaiming initialisation gives on average."""

ReadoutStyle = Literal["balanced", "a_orthonormal"]


@dataclass(frozen=True, slots=True)
class LayerState:
    """State of one module: `u` (d×R'), `a` (R'×n), `sigma` (R'), R' = min(R, numerical rank); R' = 0 is the zero state.

    `extra` holds named tensors of strategies whose state is not a single U·A; `strategy` names the one that made it.
    """

    u: Tensor
    a: Tensor
    sigma: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    strategy: str = "glora"

    @property
    def rank(self) -> int:
        """R', the number of directions that the state holds."""
        return self.u.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefillKey:
    """What the rows of dead directions are made from, so that replicas and restarts make the same ones."""

    seed: int = 0
    module: str = ""
    version: int = 0


def empty_state(
    out_features: int,
    in_features: int,
    *,
    strategy: str = "glora",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LayerState:
    """The zero state of a module, from which the first adapters are read out."""
    return LayerState(
        u=torch.zeros((out_features, 0), dtype=dtype, device=device),
        a=torch.zeros((0, in_features), dtype=dtype, device=device),
        sigma=torch.zeros(0, dtype=dtype, device=device),
        strategy=strategy,
    )


def canonical_state(
    u: Tensor, a: Tensor, *, rank: int, dtype: torch.dtype | None = None, strategy: str = "glora"
) -> LayerState:
    """The canonical state of the best rank-`rank` part of u·a, for any factors u (d×k), a (k×n), e.g. an import."""
    check_factors(u, a, name="The state")
    found = core_svd(u.to(COMPUTE_DTYPE), a.to(COMPUTE_DTYPE).mT)
    return state_from_svd(found, rank=rank, dtype=dtype or u.dtype, strategy=strategy)


def state_from_svd(
    found: CompactSvd,
    *,
    rank: int,
    dtype: torch.dtype,
    strategy: str,
    floor: float = 0.0,
    extra: Mapping[str, Tensor] | None = None,
) -> LayerState:
    """State from a float64 SVD: cut to `rank` and to directions above rounding, signs fixed, rounded to `dtype`.

    `floor` is the absolute size of rounding errors in the singular values. Raises NonFiniteError.
    """
    tolerance, limits = 1e-14 if dtype == torch.float64 else 1e-7, torch.finfo(dtype)
    if found.sigma.numel() and not float(found.sigma[0]) <= limits.max:
        raise NonFiniteError(
            f"The new state has a singular value of {float(found.sigma[0]):.3g}, which {dtype} cannot hold; "
            "reject updates of such a norm."
        )
    keep = min(rank, numerical_rank(found.sigma, tolerance=tolerance, floor=max(floor, limits.tiny)))
    u, sigma, v = found.u[:, :keep], found.sigma[:keep], found.v[:, :keep]
    low, high = (u.amin(dim=0), u.amax(dim=0)) if keep else (u[0], u[0])
    sign = torch.where(high >= -low, 1.0, -1.0).to(u.dtype)
    return LayerState(
        u=(u * sign).to(dtype).contiguous(),
        a=((v * sign * sigma).mT).to(dtype).contiguous(),
        sigma=sigma.to(dtype).contiguous(),
        extra=dict(extra or {}),
        strategy=strategy,
    )


def slice_readout(
    state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
) -> tuple[Tensor, Tensor]:
    r"""(b, a) with :math:`s\,b\,a = S_{[r]}`, shapes d×rank and rank×n, in the state's dtype.

    balanced: :math:`B = U_r\sqrt{\Sigma_r/s},\ A = \sqrt{\Sigma_r/s}V_r^\top`; a_orthonormal: :math:`B =
    U_r\Sigma_r/s,\ A = V_r^\top`. Dead directions get a zero column in b and a seeded row in a, see `refill_rows`.
    """
    check_readout(rank, scale)
    live = int((state.sigma > DEAD_BELOW * state.sigma[:1]).sum()) if state.rank else 0
    used = min(live, rank)
    sigma = state.sigma.to(COMPUTE_DTYPE)[:live]
    v = state.a.to(COMPUTE_DTYPE)[:live] / sigma[:, None]
    b = torch.zeros((state.u.shape[0], rank), dtype=COMPUTE_DTYPE, device=state.u.device)
    on_b, on_a = _split_of_sigma(sigma[:used], scale, style)
    b[:, :used] = state.u.to(COMPUTE_DTYPE)[:, :used] * on_b
    rows = [v[:used] * on_a[:, None]]
    if used < rank:
        rows.append(refill_rows(v, first=used, last=rank, key=key))
    dtype = state.u.dtype
    return b.to(dtype), torch.cat(rows).to(dtype)


def frozen_factors(state: LayerState, *, first: int, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    r"""(b, a), d×rank and rank×n in the state's dtype, with :math:`s\,b\,a = S_{[first+rank]} - S_{[first]}`.

    Balanced; directions that the state does not have are zero in both. For what devices load and do not train.
    """
    check_readout(rank, scale)
    sigma = state.sigma.to(COMPUTE_DTYPE)[first : first + rank]
    half = (sigma / scale).sqrt()
    b = torch.zeros((state.u.shape[0], rank), dtype=COMPUTE_DTYPE, device=state.u.device)
    a = torch.zeros((rank, state.a.shape[1]), dtype=COMPUTE_DTYPE, device=state.a.device)
    used = sigma.numel()
    b[:, :used] = state.u.to(COMPUTE_DTYPE)[:, first : first + rank] * half
    a[:used] = state.a.to(COMPUTE_DTYPE)[first : first + rank] * (half / sigma)[:, None]
    return b.to(state.u.dtype), a.to(state.a.dtype)


def refill_rows(live: Tensor, *, first: int, last: int, key: RefillKey) -> Tensor:
    """Rows `first` … `last`−1 for dead directions, (last − first)×n, float64, each of norm ROW_NORM.

    Row j comes from a counter-based hash of (seed, module, version, j) and is orthogonal to the rows of `live`
    (orthonormal, m×n) and to the earlier refilled rows while n has room; so a larger rank has the rows of a smaller
    one and more.
    """
    n = live.shape[1]
    basis = live
    rows: list[Tensor] = []
    for j in range(first, last):
        drawn = _drawn_row(key, j, n).to(live.device)
        row = drawn
        for _ in range(2):  # the second pass takes away what rounding left of the first
            row = row - (row @ basis.mT) @ basis
        room = float(torch.linalg.vector_norm(row)) > 1e-6 * float(torch.linalg.vector_norm(drawn))
        row = row if room else drawn
        row = row / torch.linalg.vector_norm(row)
        if room:
            basis = torch.cat([basis, row[None]])
        rows.append(row * ROW_NORM)
    return torch.stack(rows) if rows else live[:0]


def check_readout(rank: int, scale: float) -> None:
    """Raise RankError or ScaleError unless an adapter of that rank and scale can be made."""
    if not is_rank(rank):
        raise RankError(f"A readout of rank {rank!r} was asked for; the rank must be a whole number from 1.")
    check_scale(scale, name="The readout")


def check_state(state: LayerState, *, out_features: int, in_features: int) -> None:
    """Raise ShapeError unless the state is of a module of that shape."""
    if (state.u.shape[0], state.a.shape[1]) != (out_features, in_features) or state.u.shape[1] != state.a.shape[0]:
        raise ShapeError(
            f"The state is U {tuple(state.u.shape)}, A {tuple(state.a.shape)} and the updates are for a "
            f"{out_features}×{in_features} module; is this the state of another module?"
        )


def _split_of_sigma(sigma: Tensor, scale: float, style: ReadoutStyle) -> tuple[Tensor, Tensor]:
    if style == "balanced":
        half = (sigma / scale).sqrt()
        return half, half
    if style == "a_orthonormal":
        return sigma / scale, torch.ones_like(sigma)
    raise OptionError(f"Unknown readout style {style!r}; use 'balanced' or 'a_orthonormal'.")


def _drawn_row(key: RefillKey, j: int, n: int) -> Tensor:
    text = f"{key.seed}\x1f{key.module}\x1f{key.version}\x1f{j}"
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"glora-refill").digest()
    # Drawn on the CPU whatever the device, so that every replica makes the same row.
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(n, generator=generator, dtype=COMPUTE_DTYPE)
