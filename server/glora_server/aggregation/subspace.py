r"""Which R-dimensional column space the clients agree on (ALGORITHMS §1.2, §1.6).

With :math:`X_i = U_i\Sigma_iV_i^\top` cut to its revealed rank, :math:`K = \sum_i p_i
U_i\,\mathrm{diag}(w_i)\,U_i^\top` and U_ref = TopEig_R(K):

===================  ==============================  ================================================
rule                 w_ij                            the space maximises
===================  ==============================  ================================================
`projector`          1                               agreement of subspaces; a vote is at most p_i
`ridge`              σ_ij² / (σ_ij² + τ²σ_i1²)       the same, softly: weak directions vote weakly
`energy`             σ_ij²                           Σ p_i‖PX_i‖²
`normalised_energy`  σ_ij² / Σ_j σ_ij²               the same of X_i/‖X_i‖; all of a client's votes: p_i
`mean`               (K = MMᵀ, M = Σ p_iX_i)         ‖PM‖², so P·M is the best rank-R part of M
===================  ==============================  ================================================

Rank-normalised votes use p_i·ρ̄/ρ_i, ρ̄ = Σp_iρ_i, in place of p_i (not in `mean`, where nobody votes): every client then
has the same vote mass by weight, whatever its rank, and with equal ranks nothing changes. An anchor β uses
(1 − β)K + βU_{t−1}U_{t−1}ᵀ, which steadies the space between rounds.

K's eigenvectors are the left singular vectors of Z = [√(p_i w_ij) u_ij] in coordinates of the joint frame, where K is
no larger than Z and is formed if that is cheaper. All rules see {X_i, p_i} only, so none can depend on a device's
gauge.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from glora_server.aggregation.diagnostics import eigengap
from glora_server.aggregation.eigen import gram_of_rows, leading_eigen
from glora_server.aggregation.factors import EPS, numerical_rank, svd
from glora_server.aggregation.frame import rounding_floor
from glora_server.aggregation.reveal import Revealed, reveal
from glora_server.aggregation.rules import ClientNorms, RoundTerms

_LARGE = 128


class Subspace(StrEnum):
    """The rules for the common column space."""

    PROJECTOR = "projector"
    RIDGE = "ridge"
    ENERGY = "energy"
    NORMALISED_ENERGY = "normalised_energy"
    MEAN = "mean"


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """What the clients agree on.

    `basis` (q×m, m ≤ R): orthonormal columns in frame coordinates; `spectrum`: the falling eigenvalues of K;
    `votes`: how many directions each client voted for; `norms`: the size of what each one said.
    """

    basis: Tensor
    spectrum: Tensor
    votes: tuple[int, ...]
    norms: tuple[ClientNorms, ...]

    @property
    def eigengap(self) -> float:
        """λ_m − λ_{m+1}: how clearly the basis ends where it does."""
        return eigengap(self.spectrum.tolist(), self.basis.shape[1])


def energy_rank(sigma: Tensor, energy: float) -> int:
    """The smallest k with Σ_{j≤k} σ_j² ≥ energy·Σ σ_j², at least 1; energy 1 keeps all that is not zero."""
    squares = sigma.square()
    total = float(squares.sum())
    if total == 0.0:
        return 1
    beyond = squares.flip(0).cumsum(0).flip(0)  # summed from the small end, so that a tail of rounding size counts
    allowed = max(1.0 - energy, 0.0) * total
    return max(1, int((beyond > allowed).sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Voting:
    """How clients vote: the subspace rule, τ of `ridge`, votes by rank or not, and β of the anchor (0: none)."""

    subspace: Subspace
    ridge_tau: float = 0.1
    rank_normalised: bool = False
    anchor: float = 0.0


def consensus(voting: Voting, terms: RoundTerms, *, rank: int, rank_tol: float) -> Consensus:
    """TopEig_R(K) in coordinates of the frame; fewer than `rank` columns when K has a smaller rank."""
    clients = reveal(terms, rank_tol)
    votes, norms = tuple(client.sigma.numel() for client in clients), tuple(client.norms for client in clients)
    if voting.subspace is Subspace.MEAN:
        mean = terms.frame.coordinates(terms.mean())
        basis, sigma = mean.left_svd()
        keep = min(rank, numerical_rank(sigma, tolerance=0.0, floor=rounding_floor(mean.magnitude())))
    else:
        weights = _by_rank(terms.weights, votes) if voting.rank_normalised else terms.weights
        stack = _stack(voting, clients, weights)
        if voting.anchor and terms.anchor:
            held = terms.frame.coordinates(terms.anchor).left
            stack = torch.cat([math.sqrt(1 - voting.anchor) * stack, math.sqrt(voting.anchor) * held], dim=1)
        bounded = voting.subspace in {Subspace.PROJECTOR, Subspace.RIDGE}
        if bounded and min(stack.shape) > _LARGE:
            basis, spectrum = _by_eigh(stack, rank)
            return Consensus(basis=basis, spectrum=spectrum, votes=votes, norms=norms)
        basis, sigma = _left_svd(stack)
        keep = min(rank, numerical_rank(sigma, tolerance=basis.shape[0] * EPS))
    return Consensus(basis=basis[:, :keep], spectrum=sigma.square(), votes=votes, norms=norms)


def _by_eigh(stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same from ZZᵀ (q×q), a third of the work of an SVD, for votes in [0, 1].

    Eigenvectors are as good, for the gap that matters is that of K; what is lost are directions below q·1e-16 of all
    votes, so this is not for energies, whose range is that of σ².
    """
    values, vectors = leading_eigen(gram_of_rows(stack), rank)
    values = values.clamp(min=0)
    keep = min(rank, numerical_rank(values, tolerance=stack.shape[0] * EPS))
    return vectors[:, :keep], values


def _by_rank(weights: Sequence[float], votes: Sequence[int]) -> tuple[float, ...]:
    """p_i·ρ̄/ρ_i; 0 for a client without a vote."""
    mean = math.fsum(weight * count for weight, count in zip(weights, votes, strict=True))
    return tuple(weight * mean / count if count else 0.0 for weight, count in zip(weights, votes, strict=True))


def _stack(voting: Voting, clients: Sequence[Revealed], weights: Sequence[float]) -> Tensor:
    """Z (q×…) with K = ZZᵀ.

    Of what a client says in the columns that it shares with others and of what is beyond, the latter has no more than r
    directions: turned so that the rest is in shared columns alone, that rest is added up there.
    """
    parts, shared = [clients[0].own[:, :0]], dict[int, tuple[Tensor, list[Tensor]]]()
    for client, weight in zip(clients, weights, strict=True):
        c, votes = client.shared.shape[1], client.sigma.numel()
        if not votes:
            continue
        said = client.inner * (math.sqrt(weight) * _root_votes(voting.subspace, client.sigma, voting.ridge_tau))
        if not c:
            parts.append(client.own @ said)
            continue
        turn, own = torch.linalg.qr(said[c:].mT, mode="complete")
        beside, mixed = said[:c] @ turn, min(votes, said.shape[0] - c)
        parts.append(torch.addmm(client.shared @ beside[:, :mixed], client.own, own[:mixed].mT))
        shared.setdefault(id(client.shared), (client.shared, []))[1].append(beside[:, mixed:])
    for basis, columns in shared.values():
        said = torch.cat(columns, dim=1)
        parts.append(basis @ (torch.linalg.qr(said.mT, mode="r").R.mT if said.shape[1] > said.shape[0] else said))
    return torch.cat(parts, dim=1)


def _root_votes(subspace: Subspace, sigma: Tensor, ridge_tau: float) -> Tensor:
    """√w_ij."""
    if subspace is Subspace.PROJECTOR:
        return torch.ones_like(sigma)
    if subspace is Subspace.RIDGE:
        return sigma / torch.hypot(sigma, ridge_tau * sigma[:1])
    if subspace is Subspace.NORMALISED_ENERGY:
        shares: Tensor = sigma / torch.linalg.vector_norm(sigma)
        return shares
    return sigma


def _left_svd(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of Z.

    A wide Z is first reduced to a square by an LQ factorisation, which keeps both.
    """
    if stack.shape[1] > stack.shape[0]:
        stack = torch.linalg.qr(stack.mT, mode="r").R.mT
    found = svd(stack)
    return found.u, found.sigma
