"""What an aggregation tells about itself, all of it from small cores in the joint frame."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_server.aggregation.factors import COMPUTE_DTYPE, ClientUpdate, singular_values
from glora_server.aggregation.frame import ROUGH_EPS, Combination
from glora_server.aggregation.rules import ClientNorms, RoundTerms, weighted_sum
from glora_server.aggregation.state import LayerState

_ROUGH_COSINE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDiagnostics:
    """One client in one module, in the order of the updates.

    `share` is p_i; `votes` the number of directions it voted for (None where nobody votes); norms are Frobenius
    norms of ΔW_i and of the change D_i = X_i − S; cosines compare ΔW_i and D_i with their weighted means (0 when
    either is zero);
    `capture` = ‖P·ΔW_i‖/‖ΔW_i‖, low when the client is orthogonal to the consensus (1 for a zero update).
    """

    rank: int
    share: float
    votes: int | None
    update_norm: float
    change_norm: float
    cosine: float
    change_cosine: float
    capture: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrincipalAngles:
    """Angles in radians between the column spaces of two versions, over the directions that the smaller one has."""

    largest: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """One module in one round.

    `eigenvalues` of K, the R largest (empty where no K is used); `eigengap` λ_R − λ_{R+1}; `sigma` of the new state;
    `mean_norm` ‖ΣpX‖_F; `captured_energy` ‖S'‖²/‖ΣpX‖² and `truncation_error` ‖S' − ΣpX‖/‖ΣpX‖ (1 and 0 when ΣpX = 0);
    `coverage` w_j = Σ_{i: r_i ≥ j} p_i for j = 1…R; `angles` to the previous version, None when either is the zero
    state.
    """

    eigenvalues: tuple[float, ...]
    eigengap: float | None
    sigma: tuple[float, ...]
    mean_norm: float
    captured_energy: float
    truncation_error: float
    coverage: tuple[float, ...]
    clients: tuple[ClientDiagnostics, ...]
    angles: PrincipalAngles | None


def coverage(updates: Sequence[ClientUpdate], weights: Sequence[float], rank: int) -> tuple[float, ...]:
    """w_j for j = 1 … rank: the share of the weight that could train direction j."""
    pairs = [(update.rank, weight) for update, weight in zip(updates, weights, strict=True)]
    return tuple(math.fsum(weight for own, weight in pairs if own >= j) for j in range(1, rank + 1))


def principal_angles(previous: LayerState | None, current: LayerState) -> PrincipalAngles | None:
    """Angles between span(U) of two versions; small ones from arcsin, since arccos loses half the digits there."""
    if previous is None or not previous.rank or not current.rank:
        return None
    first, second = previous.u.to(current.u.dtype), current.u
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    overlap = first.mT @ second
    cosines = singular_values(overlap.to(COMPUTE_DTYPE)).clamp(max=1.0)
    sines = _sines(second - first @ overlap).clamp(max=1.0)
    angles = torch.where(cosines > math.sqrt(0.5), sines.asin(), cosines.acos())
    return PrincipalAngles(largest=float(angles.max()), mean=float(angles.mean()))


def _sines(rest: Tensor) -> Tensor:
    """Singular values of `rest`, rising; float32 columns are rounded to more than a float64 Gram matrix loses."""
    if rest.dtype == COMPUTE_DTYPE:
        return singular_values(rest).flip(0)
    wide = rest.to(COMPUTE_DTYPE)
    squares: Tensor = torch.linalg.eigvalsh(wide.mT @ wide)
    return squares.clamp(min=0).sqrt()


def client_norms(terms: RoundTerms) -> tuple[ClientNorms, ...]:
    """‖ΔW_i‖ and ‖D_i‖ of every client, for strategies that have no other use for them."""
    frame = terms.frame
    return tuple(
        terms.norms(i, step=frame.coordinates(change[:1]).norm(), change=frame.coordinates(change).norm())
        for i, change in enumerate(terms.changes)
    )


def client_diagnostics(
    terms: RoundTerms,
    updates: Sequence[ClientUpdate],
    norms: Sequence[ClientNorms],
    *,
    votes: Sequence[int] | None,
    basis: Tensor,
) -> tuple[ClientDiagnostics, ...]:
    """One record per client; `basis` (q×m, frame coordinates, orthonormal) spans what the new state can hold."""
    update_norms, change_norms = [own.update for own in norms], [own.change for own in norms]
    cosines = _cosines_to_mean(terms, terms.updates, update_norms)
    same = terms.changes == terms.updates
    change_cosines = cosines if same else _cosines_to_mean(terms, terms.changes, change_norms)
    inside = terms.frame.inside(basis)
    return tuple(
        ClientDiagnostics(
            rank=update.rank,
            share=terms.weights[i],
            votes=None if votes is None else votes[i],
            update_norm=size.update,
            change_norm=size.change,
            cosine=cosines[i] if size.update else 0.0,
            change_cosine=change_cosines[i] if size.change else 0.0,
            capture=min(1.0, own.coefficient * inside[own.block] / size.update) if size.update else 1.0,
        )
        for i, (update, (own,), size) in enumerate(zip(updates, terms.updates, norms, strict=True))
    )


def _cosines_to_mean(terms: RoundTerms, combinations: Sequence[Combination], norms: Sequence[float]) -> list[float]:
    """cos(X_i, Σp_jX_j) for each combination, 0 where either is zero; `norms` are ‖X_i‖_F.

    From float32 products where those cannot be off by more than 1e-3, which only terms that cancel and bad gauges allow.
    """
    frame, mean = terms.frame, weighted_sum(combinations, terms.weights)
    vectors, of_mean = torch.stack([frame.coefficients(x) for x in combinations]), frame.coefficients(mean)
    own = torch.tensor(norms, dtype=of_mean.dtype, device=of_mean.device)
    inner = _inner_products(terms, combinations, mean, norms)
    products = own * (of_mean @ inner).clamp(min=0).sqrt()
    cosines = torch.where(products > 0, vectors @ inner / products.clamp(min=torch.finfo(inner.dtype).tiny), 0.0)
    return [float(cosine) for cosine in cosines.clamp(-1.0, 1.0).tolist()]


def _inner_products(
    terms: RoundTerms, combinations: Sequence[Combination], mean: Combination, norms: Sequence[float]
) -> Tensor:
    """⟨block, mean⟩ for every block, of which the cosines are made."""
    frame = terms.frame
    if frame.large:
        rough = frame.inner_products(mean, rough=True)
        mean_norm = math.sqrt(max(0.0, float(frame.coefficients(mean) @ rough)))
        sizes = [(frame.magnitude(mean), mean_norm)]
        sizes += [(frame.magnitude(x), norm) for x, norm in zip(combinations, norms, strict=True) if norm]
        if all(ROUGH_EPS * magnitude <= _ROUGH_COSINE / 2 * norm for magnitude, norm in sizes):
            return rough
    return frame.inner_products(mean)
