r"""The tails :math:`T_k = S - \eta\,\mathrm{sent}_k` of a round.

What is sent is cut from the state, so its columns are the state's but for rounding to the wire. With
:math:`C = U^\top B_0` and :math:`E = B_0 - UC`,

.. math:: S - gB_0A_0 = [U\;E]\begin{pmatrix}A - gCA_0\\-gA_0\end{pmatrix} = LW,

where L is well-conditioned once its columns have norm one, and nothing is subtracted in a Gram matrix: so T's singular
vectors follow from LᵀL and WWᵀ. E is left out where it says no more than float32 rounding, as it does unless the wire
is coarser than that: its part would be cut off in the end. Modules (M) come first in every shape.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glora_server.aggregation.factors import core_svd
from glora_server.aggregation.fast.cores import Beyond, Tail
from glora_server.aggregation.frame import Block
from glora_server.aggregation.state import LayerState

_ROUNDING = 1e-7
_HEAD = 4.0
"""How much more a Frobenius norm may say of rounding than a spectral one."""
_WELL_CONDITIONED = 1e-6


def tail_of(states: Sequence[LayerState | None], sent: Sequence[Block], gains: Sequence[float]) -> Tail:
    """T of each module (M of each; state None: zero), without singular values that are rounding of its terms.

    sent: d×q and q×n of any floating dtype, q the same for all. O((d + n)·(R + q)²), float64; singular values are good
    to 3e-8 of the largest one.
    """
    u, a = _state_factors(states, like=sent[0])
    sent_b, sent_a = _stacked([block.left for block in sent]), _stacked([block.right for block in sent])
    gain, wide_b, wide_a = torch.tensor(gains, dtype=torch.float64, device=u.device), sent_b.double(), sent_a.double()
    left, rows, floor = _sides(u, a, wide_b, gain[:, None, None] * wide_a)
    u, sigma, vt = _svd(left, rows, floor)
    inner = ((wide_b.mT @ wide_b) * (wide_a @ wide_a.mT)).sum(dim=(1, 2))
    return Tail(
        u=u, sigma=sigma, vt=vt, sent_b=sent_b, sent_a=sent_a, sent_gain=gain, sent_square=inner * gain.square()
    )


def _state_factors(states: Sequence[LayerState | None], *, like: Block) -> tuple[Tensor, Tensor]:
    """U (M×d×R) and A (M×R×n), float64; zeros where a module has fewer directions."""
    us = [like.left[:, :0] if state is None else state.u for state in states]
    rows = [like.right[:0] if state is None else state.a for state in states]
    most, pad = max(u.shape[1] for u in us), torch.nn.functional.pad
    if any(u.shape[1] < most for u in us):
        us = [pad(u, (0, most - u.shape[1])) for u in us]
        rows = [pad(a, (0, 0, 0, most - a.shape[0])) for a in rows]
    return _stacked(us).double(), _stacked(rows).double()


def _sides(u: Tensor, a: Tensor, b: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L (M×d×k), W (M×k×n), and what is rounding (M×1) of the largest term that T is the difference of."""
    sizes = torch.cat([_norms(a, dim=2), _norms(b, dim=1) * _norms(scaled, dim=2)], dim=1)  # U is orthonormal
    floor = _ROUNDING * (sizes.amax(dim=1, keepdim=True) if sizes.shape[1] else sizes.new_zeros((len(sizes), 1)))
    if _is_head(u, a, b, scaled, floor):
        return u[..., b.shape[2] :], a[:, b.shape[2] :], floor
    cross = u.mT @ b
    rest, rows = torch.baddbmm(b, u, cross, alpha=-1), torch.baddbmm(a, cross, scaled, alpha=-1)
    weighted = rest * _norms(scaled, dim=2)[:, None]
    if not b.shape[2] or bool((torch.linalg.eigvalsh(weighted.mT @ weighted)[:, -1:] <= floor.square()).all()):
        return u, rows, floor
    return torch.cat([u, rest], dim=2), torch.cat([rows, -scaled], dim=1), floor


def _is_head(u: Tensor, a: Tensor, b: Tensor, scaled: Tensor, floor: Tensor) -> bool:
    """Whether what was sent is the state's first directions, one by one, but for rounding: T is the others then.

    So it is with what a readout makes at a wire of float32. Column j of B0 is g·u_j and row j of gain·A0 is h·a_j; what
    they have beside that, and g·h beside 1, is bounded by Frobenius norms.
    """
    q = b.shape[2]
    if not 0 < q <= u.shape[2]:
        return False
    head, rows = u[..., :q], a[:, :q]
    squares = rows.square().sum(dim=2).clamp(min=torch.finfo(a.dtype).tiny)
    on_b, on_a = (head * b).sum(dim=1), (rows * scaled).sum(dim=2) / squares
    beside_b = _norms(torch.addcmul(b, head, on_b[:, None], value=-1), dim=1) * _norms(scaled, dim=2)
    beside_a = _norms(torch.addcmul(scaled, rows, on_a[..., None], value=-1), dim=2) * on_b.abs()
    parts = torch.cat([beside_b, beside_a, (on_b * on_a - 1) * squares.sqrt()], dim=1)
    return bool((_norms(parts, dim=1) <= _HEAD * floor[:, 0]).all())


def _svd(left: Tensor, rows: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (M×d×c), σ (M×c), Vᵀ (M×c×n) of LW, without what is not above the floor in any module, zero where in this."""
    gram = left.mT @ left
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    coordinates = Beyond.of(gram / (norms[..., None] * norms[:, None]))
    if bool((coordinates.least_alive < _WELL_CONDITIONED).any()):
        found = core_svd(left, rows.mT)
        alive, keep = _above(found.sigma, floor)
        return (found.u * alive[:, None])[..., :keep], (found.sigma * alive)[:, :keep], found.v.mT[:, :keep]
    fold, lift = coordinates.fold * norms[:, None], coordinates.lift / norms[..., None]
    values, vectors = torch.linalg.eigh(fold @ (rows @ rows.mT) @ fold.mT)
    sigma = values.flip(1).clamp(min=0).sqrt()
    alive, keep = _above(sigma, floor)
    sigma, alive = sigma[:, :keep], alive[:, :keep]
    turn = vectors.flip(2)[..., :keep] * alive[:, None]
    on_rows = turn.mT @ fold / torch.where(alive, sigma, 1.0)[..., None]
    return left @ (lift @ turn), torch.where(alive, sigma, 0.0), on_rows @ rows


def _above(sigma: Tensor, floor: Tensor) -> tuple[Tensor, int]:
    """Which falling singular values are above the floor, and the most of any module."""
    alive = sigma > floor
    return alive, int(alive.sum(dim=1).amax()) if sigma.shape[1] else 0


def _norms(matrices: Tensor, *, dim: int) -> Tensor:
    # `vector_norm` takes three times as long along rows of a few numbers.
    return matrices.square().sum(dim=dim).sqrt()


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))
