r"""What strategies share that fold factors, or that cut a sum of updates by an SVD of small cores.

A result is a *target* matrix in coordinates of the round's `JointFrame`: its SVD gives the canonical state and
everything that the diagnostics say. Strategies that keep factors have them in the state's `extra` as `b` (d×k) and
`a` (k×n), with scales folded in: half on each factor (`SPLIT`), or all on B (`ON_B`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glora_server.aggregation.diagnostics import (
    Diagnostics,
    client_diagnostics,
    client_norms,
    coverage,
    mean_products,
    principal_angles,
)
from glora_server.aggregation.errors import MixedRanksError, RankError, StateError
from glora_server.aggregation.factors import (
    COMPUTE_DTYPE,
    ClientUpdate,
    CompactSvd,
    state_dtype,
)
from glora_server.aggregation.fast.estimate import estimated_diagnostics
from glora_server.aggregation.frame import Block, Combination, Coordinates, JointFrame, Term, rounding_floor
from glora_server.aggregation.rules import RoundTerms
from glora_server.aggregation.state import LayerState, RefillKey, check_readout, refill_rows, state_from_svd
from glora_server.aggregation.strategies.base import AggregationResult
from glora_server.aggregation.subspace import energy_rank

Factors = tuple[Tensor, Tensor]

SPLIT = 0.5
"""√s on B and √s on A."""

ON_B = 1.0
"""s on B, nothing on A."""

_MOST_COLUMNS = 256


def equal_rank(updates: Sequence[ClientUpdate], *, rank: int, name: str) -> int:
    """The one rank r ≤ R of all updates. Raises MixedRanksError or RankError."""
    ranks = sorted({update.rank for update in updates})
    if len(ranks) > 1:
        raise MixedRanksError(
            f"The strategy {name!r} needs one rank for all devices and this round has {', '.join(map(str, ranks))}; "
            "grant one rank or choose a strategy that mixes ranks, such as 'glora'."
        )
    return largest_rank(updates, rank=rank, name=name)


def largest_rank(updates: Sequence[ClientUpdate], *, rank: int, name: str) -> int:
    """The largest rank of the updates. Raises RankError when it is above R."""
    largest = max(update.rank for update in updates)
    if largest > rank:
        raise RankError(f"An update has rank {largest} and the server rank is {rank}; {name} cannot keep that.")
    return largest


def averaged_b(updates: Sequence[ClientUpdate], weights: Sequence[float], columns: int, *, power: float) -> Tensor:
    """Σ p_i s_i^power B_i (d×columns, float64), narrower ones padded with zeros."""
    mean = updates[0].b.new_zeros((updates[0].b.shape[0], columns), dtype=COMPUTE_DTYPE)
    for update, weight in zip(updates, weights, strict=True):
        mean[:, : update.rank].add_(update.b.to(COMPUTE_DTYPE), alpha=weight * update.scale**power)
    return mean


def averaged_a(updates: Sequence[ClientUpdate], weights: Sequence[float], rows: int, *, power: float) -> Tensor:
    """Σ p_i s_i^power A_i (rows×n, float64), narrower ones padded with zeros."""
    mean = updates[0].a.new_zeros((rows, updates[0].a.shape[1]), dtype=COMPUTE_DTYPE)
    for update, weight in zip(updates, weights, strict=True):
        mean[: update.rank].add_(update.a.to(COMPUTE_DTYPE), alpha=weight * update.scale**power)
    return mean


def update_terms(
    updates: Sequence[ClientUpdate],
    weights: tuple[float, ...],
    *,
    held: Sequence[Block] = (),
    base: Sequence[float] = (),
) -> RoundTerms:
    """The round with X_i = base + ΔW_i over one frame: blocks 0 … N−1 are the updates, then `held`.

    `base` holds the coefficients of the first held blocks in what every device trained on top of.
    """
    blocks = [Block(left=update.b, right=update.a) for update in updates]
    raw = tuple((Term(block=i, coefficient=update.scale),) for i, update in enumerate(updates))
    offset = len(blocks)
    under: Combination = tuple(Term(block=offset + k, coefficient=value) for k, value in enumerate(base))
    return RoundTerms(frame=JointFrame([*blocks, *held]), weights=weights, base=under, updates=raw, changes=raw)


def joined(parts: Sequence[Coordinates]) -> Coordinates:
    """The sum of matrices in one frame."""
    return Coordinates(
        left=torch.cat([part.left for part in parts], dim=1), right=torch.cat([part.right for part in parts], dim=1)
    )


def from_svd(found: CompactSvd, keep: int, *, sign: float = 1.0) -> Coordinates:
    """sign times the best rank-`keep` part of an SVD in frame coordinates."""
    return Coordinates(left=found.u[:, :keep] * (sign * found.sigma[:keep]), right=found.v[:, :keep])


def spectral_result(
    name: str,
    terms: RoundTerms,
    target: Coordinates,
    updates: Sequence[ClientUpdate],
    *,
    previous: LayerState | None,
    rank: int,
    exact: bool = False,
    extra: Mapping[str, Tensor] | None = None,
    energy: float | None = None,
    keep_tail: bool = False,
    dtype: torch.dtype | None = None,
) -> AggregationResult:
    """The state whose product is the best rank-R part of `target`, with diagnostics; `exact`: target is the mean.

    `energy` τ lowers R to the fewest directions that hold τ of ‖target‖². `keep_tail` stores what is beyond R as
    `tail_b`·`tail_a` in `extra`, so that nothing of target is lost.
    """
    found = target.svd()
    if energy is not None:
        rank = min(rank, energy_rank(found.sigma, energy))
    frame, wanted = terms.frame, found.sigma.numel() if keep_tail else rank
    full = state_from_svd(
        CompactSvd(
            u=frame.lift_left(found.u[:, :wanted]),
            sigma=found.sigma[:wanted],
            v=frame.lift_right(found.v[:, :wanted]),
        ),
        rank=wanted,
        dtype=state_dtype(dtype or updates[0].b.dtype),
        strategy=name,
        floor=rounding_floor(target.magnitude()),
    )
    kept = {key: value.to(full.u.dtype) for key, value in (extra or {}).items()}
    if keep_tail:
        kept |= {"tail_b": full.u[:, rank:].contiguous(), "tail_a": full.a[rank:].contiguous()}
    new = replace(
        full,
        u=full.u[:, :rank].contiguous(),
        a=full.a[:rank].contiguous(),
        sigma=full.sigma[:rank].contiguous(),
        extra=kept,
    )
    mean = target if exact else terms.frame.coordinates(terms.mean())
    outcome = _Outcome(mean=mean, found=found, kept=full.rank if keep_tail else new.rank, exact=exact, new=new)
    return AggregationResult(state=new, diagnostics=_diagnostics(terms, updates, outcome, previous=previous, rank=rank))


def factor_result(
    name: str,
    b: Tensor,
    a: Tensor,
    updates: Sequence[ClientUpdate],
    weights: tuple[float, ...],
    *,
    previous: LayerState | None,
    rank: int,
    dtype: torch.dtype | None = None,
) -> AggregationResult:
    """The state that keeps the factors b (d×k) and a (k×n), whose product is the model; updates have both factors.

    `dtype` is the wire dtype where the updates were completed in float64. Rounds of more than 256 columns in all
    estimate in their diagnostics what would cost more than all else, see `fast.estimate`; not those of a float64 wire.
    """
    wire = dtype or updates[0].b.dtype
    if sum(update.rank for update in updates) > _MOST_COLUMNS and wire != COMPUTE_DTYPE:
        own = Coordinates(left=b.to(COMPUTE_DTYPE), right=a.to(COMPUTE_DTYPE).mT)
        found = own.svd()
        new = state_from_svd(
            found, rank=rank, dtype=state_dtype(wire), strategy=name, floor=rounding_floor(own.magnitude())
        )
        told = estimated_diagnostics(updates, weights, found, previous=previous, new=new, rank=rank)
        kept_as = {"b": b.to(new.u.dtype), "a": a.to(new.u.dtype)}
        return AggregationResult(state=replace(new, extra=kept_as), diagnostics=told)
    terms = update_terms(updates, weights, held=[Block(left=b, right=a)])
    target = terms.frame.coordinates((Term(block=len(updates), coefficient=1.0),))
    return spectral_result(
        name, terms, target, updates, previous=previous, rank=rank, extra={"b": b, "a": a}, dtype=dtype
    )


def factor_readout(
    state: LayerState, rank: int, scale: float, *, key: RefillKey, power: float
) -> tuple[Tensor, Tensor]:
    """(b, a): the first columns and rows of the kept factors, b / s^power and a / s^(1 − power).

    A component whose column and row are both zero (nobody trained it) could never be trained again; it gets a seeded
    row in a and keeps its zero column in b, which leaves the product as it is.
    """
    check_readout(rank, scale)
    b = state.u.new_zeros((state.u.shape[0], rank), dtype=COMPUTE_DTYPE)
    a = refill_rows(b.new_zeros((0, state.a.shape[1])), first=0, last=rank, key=key)
    if state.extra or state.rank:
        mean_b, mean_a = (part.to(COMPUTE_DTYPE) for part in kept_factors(state))
        used = min(rank, mean_b.shape[1])
        b[:, :used] = mean_b[:, :used] / scale**power
        held = mean_b[:, :used].any(dim=0) | mean_a[:used].any(dim=1)
        a[:used] = torch.where(held[:, None], mean_a[:used] / scale ** (1 - power), a[:used])
    return b.to(state.u.dtype), a.to(state.u.dtype)


def kept_factors(state: LayerState) -> Factors:
    """`b` and `a` of the state's `extra`. Raises StateError."""
    return kept(state, "b"), kept(state, "a")


def kept(state: LayerState, name: str) -> Tensor:
    """A tensor of the state's `extra`. Raises StateError."""
    try:
        return state.extra[name]
    except KeyError as missing:
        raise StateError(
            f"The state has no tensor {missing} in `extra`, where {state.strategy} keeps what it needs; "
            "was it made by another strategy?"
        ) from missing


def started(state: LayerState | None) -> bool:
    """Whether the state is past the start, where nothing is kept yet."""
    return state is not None and bool(state.extra or state.rank)


def model_blocks(state: LayerState | None) -> list[Block]:
    """The state's whole model as a sum of blocks: u·a and, where it is kept, the tail beyond rank R."""
    if state is None or not started(state):
        return []
    blocks = [Block(left=state.u, right=state.a)]
    if "tail_b" in state.extra:
        blocks.append(Block(left=kept(state, "tail_b"), right=kept(state, "tail_a")))
    return [block for block in blocks if block.left.shape[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """The mean M, the SVD of what a strategy aimed at (`exact`: M), how many directions are kept of it, the state."""

    mean: Coordinates
    found: CompactSvd
    kept: int
    exact: bool
    new: LayerState

    def distance(self, directions: int) -> float:
        """‖M − T_[directions]‖_F, T the target."""
        return joined([self.mean, from_svd(self.found, directions, sign=-1.0)]).norm()


def _diagnostics(
    terms: RoundTerms,
    updates: Sequence[ClientUpdate],
    outcome: _Outcome,
    *,
    previous: LayerState | None,
    rank: int,
) -> Diagnostics:
    found, new, norm = outcome.found, outcome.new, outcome.mean.norm()
    norm = norm if norm > rounding_floor(outcome.mean.magnitude()) else 0.0
    norms = client_norms(terms)
    held = float(torch.linalg.vector_norm(found.sigma[: outcome.kept]))
    captured = (held / norm) ** 2 if norm else 1.0
    biased = norm and not outcome.exact
    return Diagnostics(
        eigenvalues=(),
        eigengap=None,
        sigma=tuple(new.sigma.tolist()),
        mean_norm=norm,
        captured_energy=min(1.0, captured) if outcome.exact else captured,
        truncation_error=outcome.distance(outcome.kept) / norm if norm else 0.0,
        aggregation_bias=outcome.distance(found.sigma.numel()) / norm if biased else 0.0,
        coverage=coverage(updates, terms.weights, rank),
        clients=client_diagnostics(
            terms, updates, norms, mean_products(terms, norms), votes=None, basis=found.u[:, : outcome.kept]
        ),
        angles=principal_angles(previous, new),
    )
