"""What an aggregation tells about itself, all of it from small cores in the joint frame."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_server.aggregation.factors import COMPUTE_DTYPE, ClientUpdate, singular_values
from glora_server.aggregation.frame import Combination, Coordinates, rounding_floor
from glora_server.aggregation.rules import RoundTerms, weighted_sum
from glora_server.aggregation.state import LayerState


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


def client_diagnostics(
    terms: RoundTerms, updates: Sequence[ClientUpdate], votes: Sequence[int] | None, basis: Tensor
) -> tuple[ClientDiagnostics, ...]:
    """One record per client; `basis` (q×m, frame coordinates, orthonormal) spans what the new state can hold."""
    frame, weights = terms.frame, terms.weights
    owns = [frame.coordinates(update).turned() for update in terms.updates]
    changes = owns if terms.changes == terms.updates else [frame.coordinates(change) for change in terms.changes]
    norms = [own.norm() for own in owns]
    raw_norms = norms if changes is owns else [change.norm() for change in changes]
    change_norms = [_beyond_rounding(norm, change) for norm, change in zip(raw_norms, changes, strict=True)]
    cosines = _cosines_to_mean(terms, terms.updates, norms)
    change_cosines = cosines if changes is owns else _cosines_to_mean(terms, terms.changes, change_norms)
    records = []
    for i, (update, own, own_norm, change_norm) in enumerate(zip(updates, owns, norms, change_norms, strict=True)):
        inside = Coordinates(left=basis.mT @ own.left, right=own.right).norm()
        records.append(
            ClientDiagnostics(
                rank=update.rank,
                share=weights[i],
                votes=None if votes is None else votes[i],
                update_norm=own_norm,
                change_norm=change_norm,
                cosine=cosines[i] if own_norm else 0.0,
                change_cosine=change_cosines[i] if change_norm else 0.0,
                capture=min(1.0, inside / own_norm) if own_norm else 1.0,
            )
        )
    return tuple(records)


def _beyond_rounding(norm: float, x: Coordinates) -> float:
    """`norm` of X, or 0 where terms cancel to nothing but rounding: an adapter that came back untouched."""
    return norm if norm > rounding_floor(x) else 0.0


def _cosines_to_mean(terms: RoundTerms, combinations: Sequence[Combination], norms: Sequence[float]) -> list[float]:
    """cos(X_i, Σp_jX_j) for each combination, 0 where either is zero; `norms` are ‖X_i‖_F."""
    frame, mean = terms.frame, weighted_sum(combinations, terms.weights)
    inner = frame.inner_products(mean)
    vectors = torch.stack([frame.coefficients(combination) for combination in combinations])
    mean_norm = (frame.coefficients(mean) @ inner).clamp(min=0).sqrt()
    products = torch.tensor(norms, dtype=inner.dtype, device=inner.device) * mean_norm
    cosines = torch.where(products > 0, vectors @ inner / products.clamp(min=torch.finfo(inner.dtype).tiny), 0.0)
    return [float(cosine) for cosine in cosines.clamp(-1.0, 1.0).tolist()]
