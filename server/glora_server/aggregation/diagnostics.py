"""What an aggregation tells about itself, all of it from small cores in the joint frame."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_server.aggregation.factors import COMPUTE_DTYPE, ClientUpdate, singular_values
from glora_server.aggregation.frame import Combination, rounding_floor
from glora_server.aggregation.rules import ClientNorms, RoundTerms, weighted_sum
from glora_server.aggregation.state import LayerState

_ROUNDING = 2.0**-24
"""That of float32."""
_SAME = 1e-14
"""How much quotients of numbers that are multiples of others may differ."""
_SURE = 1e-3
"""What float32 may cost a number before it is computed in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDiagnostics:
    """One client in one module, in the order of the updates.

    `share` is p_i; `votes` the number of directions it voted for (None where nobody votes); norms are Frobenius
    norms of ΔW_i and of the change D_i = X_i − S; cosines compare ΔW_i and D_i with their weighted means (0 when
    either is zero);
    `capture` = ‖P·ΔW_i‖/‖ΔW_i‖, low when the client is orthogonal to the consensus (1 for a zero update); `influence`
    ‖D̄ − D̄_{−i}‖/‖D̄‖: how far the mean change D̄ moves when the client is left out (see `influence`).
    """

    rank: int
    share: float
    votes: int | None
    update_norm: float
    change_norm: float
    cosine: float
    change_cosine: float
    capture: float
    influence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrincipalAngles:
    """Angles in radians between the column spaces of two versions, over the directions that the smaller one has."""

    largest: float
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """One module in one round.

    `eigenvalues` of K, the R largest (empty where no K is used); `eigengap` λ_m − λ_{m+1} at the end of the common
    space, m = min(R, rank of K); `sigma` of the new state; `mean_norm` ‖ΣpX‖_F; `captured_energy` ‖S'‖²/‖ΣpX‖² and
    `truncation_error` ‖S' − ΣpX‖/‖ΣpX‖ (1 and 0 when ΣpX = 0), S' with what is kept of it beyond R;
    `aggregation_bias` ‖T − ΣpX‖/‖ΣpX‖, T what the strategy would keep at any R: 0 for exact ones, and for others the
    part of the error, and of an energy above 1, that no larger R mends; `coverage` w_j = Σ_{i: r_i ≥ j} p_i for
    j = 1…R; `angles` to the previous version, None when either is the zero state.

    Fast rounds, and large ones of strategies that average factors, estimate from 16 random probes what needs all inner
    products of the devices: `mean_norm` and what follows from it within some per cent, cosines within about 0.1.
    """

    eigenvalues: tuple[float, ...]
    eigengap: float | None
    sigma: tuple[float, ...]
    mean_norm: float
    captured_energy: float
    truncation_error: float
    aggregation_bias: float
    coverage: tuple[float, ...]
    clients: tuple[ClientDiagnostics, ...]
    angles: PrincipalAngles | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanProducts:
    """⟨block, Σp_iΔW_i⟩ and ⟨block, Σp_iD_i⟩ for every block of the round's frame."""

    updates: Tensor
    changes: Tensor


def coverage(updates: Sequence[ClientUpdate], weights: Sequence[float], rank: int) -> tuple[float, ...]:
    """w_j for j = 1 … rank: the share of the weight that could train direction j."""
    pairs = [(update.rank, weight) for update, weight in zip(updates, weights, strict=True)]
    return tuple(math.fsum(weight for own, weight in pairs if own >= j) for j in range(1, rank + 1))


def eigengap(spectrum: Sequence[float], kept: int) -> float:
    """λ_kept − λ_{kept+1} of falling eigenvalues, which are zero beyond their end; 0 when nothing is kept."""
    padded = [*spectrum[: kept + 1], 0.0, 0.0]
    return padded[kept - 1] - padded[kept] if kept else 0.0


def influence(share: float, norm: float, cosine: float, mean_norm: float) -> float:
    """p/(1 − p)·‖D − D̄‖/‖D̄‖ from p, ‖D‖, cos(D, D̄) and ‖D̄‖: how far D̄ moves when one client's D is left out.

    1 for a client alone, infinite where all others' changes and this one cancel.
    """
    if share >= 1.0:
        return 1.0
    apart = math.sqrt(max(0.0, norm * norm - 2 * cosine * norm * mean_norm + mean_norm * mean_norm))
    if apart == 0.0:
        return 0.0
    return share / (1.0 - share) * apart / mean_norm if mean_norm else math.inf


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
    frame, norms = terms.frame, []
    for client, change in enumerate(terms.changes):
        norm = frame.coordinates(change).norm()
        step = norm if len(change) == 1 else frame.coordinates(change[:1]).norm()
        norms.append(terms.norms(client, step=step, change=norm))
    return tuple(norms)


def mean_products(terms: RoundTerms, norms: Sequence[ClientNorms]) -> MeanProducts:
    """What all cosines follow from.

    From float32 products where those cannot cost a cosine more than 1e-3; terms that cancel and bad gauges can.
    """
    frame, own, mean = (
        terms.frame,
        weighted_sum(terms.updates, terms.weights),
        weighted_sum(terms.changes, terms.weights),
    )
    updates = frame.inner_products(own, rough=frame.large)
    if frame.large and not _is_sure(terms, terms.updates, updates, [size.update for size in norms]):
        updates = frame.inner_products(own)
    if terms.changes == terms.updates:
        return MeanProducts(updates=updates, changes=updates)
    step, beside = _beside(mean, own)
    if beside is None:
        return MeanProducts(updates=updates, changes=frame.inner_products(mean))
    changes = step * updates + frame.inner_products(beside, rough=frame.large)
    if frame.large and not _is_sure(terms, terms.changes, changes, [size.change for size in norms]):
        changes = frame.inner_products(mean)
    return MeanProducts(updates=updates, changes=changes)


def _is_sure(terms: RoundTerms, combinations: Sequence[Combination], products: Tensor, norms: Sequence[float]) -> bool:
    """Whether products with the mean of the combinations are good to `_SURE` if rounding was that of float32."""
    frame, mean = terms.frame, weighted_sum(combinations, terms.weights)
    mean_norm = math.sqrt(max(0.0, float(frame.coefficients(mean) @ products)))
    sizes = [(frame.magnitude(mean), mean_norm)]
    sizes += [(frame.magnitude(x), norm) for x, norm in zip(combinations, norms, strict=True) if norm]
    sure = all(_ROUNDING * magnitude <= _SURE / 2 * norm for magnitude, norm in sizes)
    return sure and bool(torch.isfinite(products).all())


def _beside(mean: Combination, part: Combination) -> tuple[float, Combination | None]:
    """η and X with mean = η·part + X, where X has no block of `part`; None where there is no such X.

    The mean change is η times the mean update less what was sent, and products with that are cheap.
    """
    within = {term.block: term.coefficient for term in part}
    beside = tuple(term for term in mean if term.block not in within)
    steps = [term.coefficient / within[term.block] for term in mean if term.block in within]
    if len(steps) != len(part) or not steps or max(steps) - min(steps) > _SAME * max(steps):
        return 1.0, None
    return steps[0], beside


def norm_outside(terms: RoundTerms, products: MeanProducts, basis: Tensor, inside: float) -> float:
    """‖(I − P)M‖_F, P the projection onto `basis` and `inside` = ‖PM‖_F; in large rounds to three digits.

    There it is what ‖M‖² = ‖S‖² + 2⟨S, ΣpD⟩ + ‖ΣpD‖² leaves beside ‖PM‖², if that is enough to be sure of.
    """
    frame = terms.frame
    if frame.large:
        held, changed = frame.coefficients(terms.base), frame.coefficients(weighted_sum(terms.changes, terms.weights))
        square = frame.coordinates(terms.base).norm() ** 2 + float((2 * held + changed) @ products.changes)
        rounding = 4 * _ROUNDING * frame.magnitude(terms.mean()) * inside
        if rounding <= _SURE * (square - inside**2):
            return math.sqrt(square - inside**2)
    mean = _rough_mean(terms) if frame.large and not frame.vast else None
    if mean is not None:
        low = basis.float()
        found = float(torch.linalg.matrix_norm(mean - low @ (low.mT @ mean)))
        if _ROUNDING * frame.magnitude(terms.mean()) <= _SURE / 2 * found < math.inf:
            return found
    rest = frame.outside(terms.mean(), basis)
    if frame.large:
        found = rest.rough_norm()
        if _ROUNDING * rest.magnitude() <= _SURE / 2 * found < math.inf:
            return found
    return rest.norm()


def _rough_mean(terms: RoundTerms) -> Tensor | None:
    """M in float32, from ΣpΔW if it is that and little beside."""
    own = weighted_sum(terms.updates, terms.weights)
    step, beside = _beside(terms.mean(), own)
    return None if beside is None else step * terms.frame.rough_matrix(own) + terms.frame.rough_matrix(beside)


def client_diagnostics(
    terms: RoundTerms,
    updates: Sequence[ClientUpdate],
    norms: Sequence[ClientNorms],
    products: MeanProducts,
    *,
    votes: Sequence[int] | None,
    basis: Tensor,
) -> tuple[ClientDiagnostics, ...]:
    """One record per client; `basis` (q×m, frame coordinates, orthonormal) spans what the new state can hold."""
    cosines, mean_norm = _cosines(terms, terms.updates, products.updates, [own.update for own in norms])
    change_cosines = cosines
    if products.changes is not products.updates:
        change_cosines, mean_norm = _cosines(terms, terms.changes, products.changes, [own.change for own in norms])
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
            influence=influence(terms.weights[i], size.change, change_cosines[i], mean_norm),
        )
        for i, (update, (own,), size) in enumerate(zip(updates, terms.updates, norms, strict=True))
    )


def _cosines(
    terms: RoundTerms, combinations: Sequence[Combination], inner: Tensor, norms: Sequence[float]
) -> tuple[list[float], float]:
    """cos(X_i, Σp_jX_j) for each combination, 0 where either is zero, and ‖ΣpX‖; `norms` are ‖X_i‖_F."""
    frame, mean = terms.frame, weighted_sum(combinations, terms.weights)
    vectors = torch.stack([frame.coefficients(combination) for combination in combinations])
    mean_norm = (frame.coefficients(mean) @ inner).clamp(min=0).sqrt()
    mean_norm = torch.where(mean_norm > rounding_floor(frame.magnitude(mean)), mean_norm, 0.0)
    products = torch.tensor(norms, dtype=inner.dtype, device=inner.device) * mean_norm
    cosines = torch.where(products > 0, vectors @ inner / products.clamp(min=torch.finfo(inner.dtype).tiny), 0.0)
    return [float(cosine) for cosine in cosines.clamp(-1.0, 1.0).tolist()], float(mean_norm)
