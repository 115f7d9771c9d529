r"""Which R-dimensional column space the clients agree on (ALGORITHMS §1.2, §1.6).

With :math:`X_i = U_i\Sigma_iV_i^\top` cut to its revealed rank, :math:`K = \sum_i p_i
U_i\,\mathrm{diag}(w_i)\,U_i^\top` and U_ref = TopEig_R(K):

============  =====================================  ================================================
rule          w_ij                                   the space maximises
============  =====================================  ================================================
`projector`   1                                      agreement of subspaces; a vote is at most p_i
`ridge`       σ_ij² / (σ_ij² + τ²σ_i1²)              the same, softly: weak directions vote weakly
`energy`      σ_ij²                                  Σ p_i‖PX_i‖²
`mean`        (K = MMᵀ, M = Σ p_iX_i)                ‖PM‖², so P·M is the best rank-R part of M
============  =====================================  ================================================

K is never formed: its eigenvectors are the left singular vectors of Z = [√(p_i w_ij) u_ij], in coordinates of the
joint frame. All rules see {X_i, p_i} only, so none can depend on a device's gauge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from glora_server.aggregation.factors import EPS, CompactSvd, numerical_rank, svd
from glora_server.aggregation.frame import rounding_floor
from glora_server.aggregation.rules import RoundTerms


class Subspace(StrEnum):
    """The rules for the common column space."""

    PROJECTOR = "projector"
    RIDGE = "ridge"
    ENERGY = "energy"
    MEAN = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """What the clients agree on.

    `basis` (q×m, m ≤ R): orthonormal columns in frame coordinates; `spectrum`: the falling eigenvalues of K;
    `votes`: how many directions each client voted for.
    """

    basis: Tensor
    spectrum: Tensor
    votes: tuple[int, ...]

    def eigengap(self, rank: int) -> float:
        """λ_R − λ_{R+1}; the spectrum counts as zero beyond its end."""
        padded = [*self.spectrum[: rank + 1].tolist(), 0.0, 0.0]
        return padded[rank - 1] - padded[rank] if rank <= len(self.spectrum) else 0.0


def reveal(terms: RoundTerms, rank_tol: float) -> tuple[CompactSvd, ...]:
    r"""Each X_i cut to the directions that its device vouches for.

    Rounding to the wire dtype perturbs an upload by about rank_tol relative to the *terms* of X_i = S + D_i, and
    when S and sent_i cancel that noise stays behind as directions with tiny σ, each of which would have a full vote
    in the projector. A direction counts if

    .. math:: \sigma_j(X_i) > \max(\min(\tau \cdot m_i,\ \sigma_1(D_i)),\ \varepsilon_i),\quad
              m_i = \max(\sigma_1(X_i), \sigma_1(S), \sigma_1(D_i), \sigma_1(\eta\Delta W_i)).

    By Weyl's inequality a direction that only D_i holds has σ ≤ σ_1(D_i); so where a device changed less than the
    tolerance, its change has no vote but every direction of S stronger than the change keeps its own: an adapter
    that comes back untouched votes for all of S, however coarse the wire. With S = 0 this is the plain σ_j > τσ_1.
    ε_i is the rounding of float64 itself.
    """
    frame = terms.frame
    base_norm = frame.coordinates(terms.base).spectral_norm()
    revealed = []
    for client, change in enumerate(terms.changes):
        said = frame.coordinates(terms.said(client))
        found = said.svd()
        top = float(found.sigma[0])
        changed, terms_norm = top, top
        if terms.base or len(change) > 1:
            changed = frame.coordinates(change).spectral_norm()
            terms_norm = max(top, changed, base_norm, frame.coordinates(change[:1]).spectral_norm())
        floor = max(min(rank_tol * terms_norm, changed), rounding_floor(said))
        keep = numerical_rank(found.sigma, tolerance=0.0, floor=floor)
        revealed.append(CompactSvd(u=found.u[:, :keep], sigma=found.sigma[:keep], v=found.v[:, :keep]))
    return tuple(revealed)


def consensus(subspace: Subspace, terms: RoundTerms, *, rank: int, rank_tol: float, ridge_tau: float) -> Consensus:
    """TopEig_R(K) in coordinates of the frame; fewer than `rank` columns when K has a smaller rank."""
    clients = reveal(terms, rank_tol)
    votes = tuple(client.sigma.numel() for client in clients)
    if subspace is Subspace.MEAN:
        mean = terms.frame.coordinates(terms.mean())
        found = mean.svd()
        keep = min(rank, numerical_rank(found.sigma, tolerance=0.0, floor=rounding_floor(mean)))
    else:
        found = _left_svd(_stack(subspace, clients, terms.weights, ridge_tau))
        keep = min(rank, numerical_rank(found.sigma, tolerance=found.u.shape[0] * EPS))
    return Consensus(basis=found.u[:, :keep], spectrum=found.sigma.square(), votes=votes)


def _stack(subspace: Subspace, clients: Sequence[CompactSvd], weights: Sequence[float], ridge_tau: float) -> Tensor:
    """Z (q×Σρ)."""
    return torch.cat(
        [
            client.u * (math.sqrt(weight) * _root_votes(subspace, client.sigma, ridge_tau))
            for client, weight in zip(clients, weights, strict=True)
        ],
        dim=1,
    )


def _root_votes(subspace: Subspace, sigma: Tensor, ridge_tau: float) -> Tensor:
    """√w_ij."""
    if subspace is Subspace.PROJECTOR:
        return torch.ones_like(sigma)
    if subspace is Subspace.RIDGE:
        return sigma / torch.hypot(sigma, ridge_tau * sigma[:1])
    return sigma


def _left_svd(stack: Tensor) -> CompactSvd:
    """SVD of Z; a wide Z is first reduced to a square by an LQ factorisation, which keeps its left singular vectors."""
    if stack.shape[1] > stack.shape[0]:
        stack = torch.linalg.qr(stack.mT, mode="r").R.mT
    return svd(stack)
