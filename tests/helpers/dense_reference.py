"""Dense float64 reference for aggregation: every matrix d×n, every formula as written, no thought for cost.

It shares no code with `glora_server.aggregation`. Formulas: X_i, K, P and S' of GLoRA's round with a rank-revealing
basis.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_server.aggregation import ClientUpdate, LayerState


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseRound:
    """S' = P·M with the pieces that led to it; `gap` = λ_R − λ_{R+1} relative to λ_1."""

    s: Tensor
    mean: Tensor
    projector: Tensor
    eigenvalues: Tensor
    gap: float
    union_rank: int


def product(b: Tensor, a: Tensor, scale: float = 1.0) -> Tensor:
    """scale·b·a in float64."""
    dense: Tensor = scale * (b.double() @ a.double())
    return dense


def dense_state(state: LayerState) -> Tensor:
    """S = U·A in float64."""
    return product(state.u, state.a)


def truncated(x: Tensor, rank: int) -> Tensor:
    """Best rank-`rank` approximation."""
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    best: Tensor = u[:, :rank] @ torch.diag(sigma[:rank]) @ vh[:rank]
    return best


def said(rule: str, s: Tensor, update: ClientUpdate, eta: float = 1.0) -> Tensor:
    """X_i as the rule reads it."""
    delta_w = product(update.b, update.a, update.scale)
    if rule == "replace":
        return delta_w
    if rule == "accumulate":
        return s + eta * delta_w
    assert update.sent is not None
    return s + eta * (delta_w - product(*update.sent, update.scale))


def vote(x: Tensor, subspace: str, *, threshold: float, tau: float) -> Tensor:
    """One client's term of K, d×d."""
    u, sigma, _ = torch.linalg.svd(x, full_matrices=False)
    keep = sigma > threshold
    u, sigma = u[:, keep], sigma[keep]
    if subspace == "projector":
        weights = torch.ones_like(sigma)
    elif subspace == "ridge":
        weights = sigma**2 / (sigma**2 + tau**2 * sigma[:1] ** 2)
    else:
        weights = sigma**2
    k: Tensor = u @ torch.diag(weights) @ u.T
    return k


def dense_round(
    updates: Sequence[ClientUpdate],
    *,
    rank: int,
    subspace: str = "projector",
    rule: str = "replace",
    state: LayerState | None = None,
    rank_tol: float = 1e-12,
    tau: float = 0.1,
    eta: float = 1.0,
) -> DenseRound:
    """One round, densely. A direction of X_i counts above rank_tol times the largest of the terms of X_i."""
    first = updates[0]
    zero = torch.zeros(first.b.shape[0], first.a.shape[1], dtype=torch.float64)
    s = zero if state is None else dense_state(state)
    total = sum(update.weight for update in updates)
    shares = [update.weight / total for update in updates]
    xs = [said(rule, s, update, eta) for update in updates]
    mean = sum((p * x for p, x in zip(shares, xs, strict=True)), zero)
    k = mean @ mean.T
    if subspace != "mean":
        k = torch.zeros(zero.shape[0], zero.shape[0], dtype=torch.float64)
        for p, x, update in zip(shares, xs, updates, strict=True):
            parts = [x, product(update.b, update.a, update.scale)] + ([] if rule == "replace" else [s])
            size = max(float(torch.linalg.matrix_norm(part, ord=2)) for part in parts)
            k += p * vote(x, subspace, threshold=rank_tol * size, tau=tau)
    eigenvalues, vectors = torch.linalg.eigh(k)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    top = float(eigenvalues[0])
    union_rank = int((eigenvalues > 1e-11 * top).sum()) if top > 0 else 0
    basis = vectors[:, : min(rank, union_rank)]
    gap = 1.0
    if rank < union_rank:
        gap = float(eigenvalues[rank - 1] - eigenvalues[rank]) / top
    projector = basis @ basis.T
    return DenseRound(
        s=projector @ mean,
        mean=mean,
        projector=projector,
        eigenvalues=eigenvalues,
        gap=gap,
        union_rank=union_rank,
    )
