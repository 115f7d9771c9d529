"""Dense, slow, obvious float64 references of the strategies beside glora, each as the paper's formula is written.

They share no code with `glora_server.aggregation`; every update matrix is d×n.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from glora_server.aggregation import ClientUpdate

Factors = tuple[Tensor, Tensor]


def shares(updates: Sequence[ClientUpdate]) -> list[float]:
    total = sum(u.weight for u in updates)
    return [u.weight / total for u in updates]


def delta_w(update: ClientUpdate) -> Tensor:
    """ΔW = s·B·A."""
    dense: Tensor = update.scale * (update.b.double() @ update.a.double())
    return dense


def mean_update(updates: Sequence[ClientUpdate]) -> Tensor:
    """M = Σ p_iΔW_i."""
    return torch.stack([p * delta_w(u) for p, u in zip(shares(updates), updates, strict=True)]).sum(0)


def padded_average(updates: Sequence[ClientUpdate], weights: Sequence[float], rank: int) -> Factors:
    """(Σ w√sB, Σ w√sA), padded with zeros."""
    b = torch.zeros(updates[0].b.shape[0], rank, dtype=torch.float64)
    a = torch.zeros(rank, updates[0].a.shape[1], dtype=torch.float64)
    for w, u in zip(weights, updates, strict=True):
        wide = rank - u.rank
        b = b + w * u.scale**0.5 * torch.cat([u.b.double(), torch.zeros(b.shape[0], wide, dtype=b.dtype)], dim=1)
        a = a + w * u.scale**0.5 * torch.cat([u.a.double(), torch.zeros(wide, a.shape[1], dtype=b.dtype)])
    return b, a


def procrustes(m: Tensor, *, determinant: int | None = None) -> Tensor:
    """The R in O(r), or with that determinant, that maximises tr(RᵀM)."""
    u, _, vh = torch.linalg.svd(m)
    if determinant is not None:
        fix = torch.eye(len(m), dtype=m.dtype)
        fix[-1, -1] = determinant * torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
        vh = fix @ vh
    turn: Tensor = u @ vh
    return turn


def soft_rotation(m: Tensor, strength: float) -> Tensor:
    """polar((1 − λ)I + λR), the polar factor from X(XᵀX)^(−1/2)."""
    x = (1 - strength) * torch.eye(len(m), dtype=m.dtype) + strength * procrustes(m, determinant=1)
    values, vectors = torch.linalg.eigh(x.T @ x)
    turn: Tensor = x @ vectors @ torch.diag(values**-0.5) @ vectors.T
    return turn


def fedrot(
    updates: Sequence[ClientUpdate], reference: Factors, *, on_a: bool, rotation: str, strength: float = 0.5
) -> Tensor:
    """B̄Ā of factors that were rotated towards the reference pair."""
    turned = []
    for u in updates:
        b, a = u.b.double(), u.a.double()
        m = a @ reference[1].T if on_a else b.T @ reference[0]
        if rotation == "orthogonal":
            r = procrustes(m)
        else:
            r = procrustes(m, determinant=1) if rotation == "special" else soft_rotation(m, strength)
        turned.append(ClientUpdate(b @ r, r.T @ a, u.scale, u.weight))
    b, a = padded_average(turned, shares(updates), updates[0].rank)
    product: Tensor = b @ a
    return product


def hetlora(updates: Sequence[ClientUpdate], rank: int) -> Tensor:
    """Zero-padded factors, weights by the dense Frobenius norms."""
    norms = [float(delta_w(u).norm()) for u in updates]
    b, a = padded_average(updates, [norm / sum(norms) for norm in norms], rank)
    product: Tensor = b @ a
    return product


def lora_fair_closed(updates: Sequence[ClientUpdate], strength: float) -> Tensor:
    """(B̄ + ΔB)Ā with ΔB = (M − B̄Ā)Āᵀ(ĀĀᵀ + λI)⁻¹."""
    b, a = padded_average(updates, shares(updates), updates[0].rank)
    eye = torch.eye(len(a), dtype=torch.float64)
    correction = (mean_update(updates) - b @ a) @ a.T @ torch.linalg.inv(a @ a.T + strength * eye)
    product: Tensor = (b + correction) @ a
    return product


def lora_fair_objective(updates: Sequence[ClientUpdate], correction: Tensor, strength: float) -> Tensor:
    """1 − cos(M, (B̄ + ΔB)Ā) + λ‖ΔB‖_F, dense and differentiable."""
    b, a = padded_average(updates, shares(updates), updates[0].rank)
    cosine = torch.nn.functional.cosine_similarity(mean_update(updates).flatten(), ((b + correction) @ a).flatten(), 0)
    value: Tensor = 1 - cosine + strength * correction.norm()
    return value


def raflora(updates: Sequence[ClientUpdate], levels: Sequence[int]) -> Tensor:
    """Σ over slices of the weighted mean over the devices that have the slice."""
    total = torch.zeros(updates[0].b.shape[0], updates[0].a.shape[1], dtype=torch.float64)
    start = 0
    for level in levels:
        holders = [u for u in updates if u.rank >= level]
        for u in holders:
            p = u.weight / sum(v.weight for v in holders)
            total = total + p * u.scale * u.b[:, start:level].double() @ u.a[start:level].double()
        start = level
    return total


def florist_rank(m: Tensor, energy: float) -> int:
    """The fewest directions that hold the share `energy` of ‖M‖²."""
    squares = torch.linalg.svdvals(m) ** 2
    k = 1
    while float(squares[:k].sum()) < energy * float(squares.sum()):
        k += 1
    return k
