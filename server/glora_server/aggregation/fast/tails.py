r"""The tails :math:`T_k = S - \eta\,\mathrm{sent}_k` of a round, from small Gram matrices.

What is sent is cut from the state, so its columns are the state's but for rounding to the wire. With
:math:`C = U^\top B_0` and :math:`E = B_0 - UC`,

.. math:: S - gB_0A_0 = [U\;E]\begin{pmatrix}A - gCA_0\\-gA_0\end{pmatrix},

where nothing is subtracted in a Gram matrix. E is left out where it says no more than float32 rounding, as it does
unless the wire is coarser than that; its singular vectors would be cut off in the end. Modules (M) come first in
every shape.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glora_server.aggregation.factors import CompactSvd, core_svd
from glora_server.aggregation.fast.cores import Tail
from glora_server.aggregation.frame import Block
from glora_server.aggregation.state import LayerState

_ROUNDING = 1e-7
_DROPPED = 1e-13
_WELL_CONDITIONED = 1e-6


def tail_of(states: Sequence[LayerState | None], sent: Sequence[Block], gains: Sequence[float]) -> Tail:
    """T of each module (M of each; state None: zero), cut to what is more than float32 rounding of its terms.

    sent: d×q and q×n of any floating dtype, q the same for all. The singular values are known to 3e-8 of the terms.
    """
    like = sent[0].left
    u = _padded([like[:, :0] if state is None else state.u for state in states])
    a = _padded([sent[0].right[:0].mT if state is None else state.a.mT for state in states]).mT
    held_b, held_a = _stacked([block.left for block in sent]), _stacked([block.right for block in sent])
    gain = torch.tensor(gains, dtype=torch.float64, device=like.device)
    left, right, largest = _sides(u, a, held_b.double(), held_a.double(), gain[:, None, None])
    found = _cut(left, right, _ROUNDING * largest)
    return Tail(u=found.u, sigma=found.sigma, v=found.v, sent_b=held_b, sent_a=held_a, sent_gain=gain)


def _sides(u: Tensor, a: Tensor, b: Tensor, sent_a: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L (M×d×k) and R (M×n×k) with T = LRᵀ, and the norm of the largest term (M×1) of what T is the difference of."""
    sizes = torch.cat([_norms(u.mT) * _norms(a), gain[..., 0] * _norms(b.mT) * _norms(sent_a)], dim=1)
    largest = sizes.amax(dim=1, keepdim=True) if sizes.shape[1] else sizes.new_zeros((len(sizes), 1))
    cross = u.mT @ b
    rest, right = b - u @ cross, (a - gain * (cross @ sent_a)).mT
    weighted = rest * (gain * _norms(sent_a)[:, None])
    if weighted.shape[2]:
        beyond = torch.linalg.eigvalsh(weighted.mT @ weighted)[:, -1:]
        if bool((beyond > (_ROUNDING * largest).square()).any()):
            return torch.cat([u, rest], dim=2), torch.cat([right, sent_a.mT * -gain], dim=2), largest
    return u, right, largest


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=2)
    return norms


def _cut(left: Tensor, right: Tensor, floor: Tensor) -> CompactSvd:
    """SVD of LRᵀ without what is not above the floor (M×1) in any module; zeros where it is not in this one."""
    gram = left.mT @ left
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    squares, turn = torch.linalg.eigh(gram / (norms[..., None] * norms[:, None]))
    dropped = squares <= _DROPPED
    if bool((~dropped & (squares < _WELL_CONDITIONED)).any()):
        return _above(core_svd(left, right), floor)
    root = torch.where(dropped, 0.0, squares).sqrt()
    fold = root[..., None] * turn.mT * norms[:, None]
    lift = turn * torch.where(dropped, 0.0, 1.0 / root)[:, None] / norms[..., None]
    values, vectors = torch.linalg.eigh(fold @ (right.mT @ right) @ fold.mT)
    sigma, vectors = values.flip(1).clamp(min=0).sqrt(), vectors.flip(2)
    keep = _most_above(sigma, floor)
    sigma, vectors = sigma[:, :keep], vectors[..., :keep]
    v = right @ (fold.mT @ vectors / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)[:, None])
    return _above(CompactSvd(u=left @ (lift @ vectors), sigma=sigma, v=v), floor)


def _above(found: CompactSvd, floor: Tensor) -> CompactSvd:
    keep, alive = _most_above(found.sigma, floor), found.sigma > floor
    return CompactSvd(
        u=(found.u * alive[:, None])[..., :keep],
        sigma=(found.sigma * alive)[:, :keep],
        v=(found.v * alive[:, None])[..., :keep],
    )


def _most_above(sigma: Tensor, floor: Tensor) -> int:
    return int((sigma > floor).sum(dim=1).amax()) if sigma.shape[1] else 0


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """The matrices in float64 along a new first dimension, with zero columns where one is narrower."""
    widest = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return _stacked([p if p.shape[1] == widest else pad(p, (0, widest - p.shape[1])) for p in parts]).double()
