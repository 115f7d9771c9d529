r"""FedIT, zero-padded: the factors are averaged, not the updates. Kept as the contrast that shows what gauges do.

:math:`\bar B = \Sigma p_i\sqrt{s_i}B_i,\ \bar A = \Sigma p_i\sqrt{s_i}A_i`, each padded with zeros to rank R. The
product :math:`\bar B\bar A` is not
:math:`\Sigma p_i s_iB_iA_i`, and changes when a device refactors the same update.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.diagnostics import (
    Diagnostics,
    client_diagnostics,
    coverage,
    principal_angles,
)
from glora_server.aggregation.errors import RankError, StateError
from glora_server.aggregation.factors import (
    COMPUTE_DTYPE,
    ClientUpdate,
    CompactSvd,
    normalised_weights,
    state_dtype,
)
from glora_server.aggregation.frame import Block, JointFrame, Term, rounding_floor
from glora_server.aggregation.rules import RoundTerms
from glora_server.aggregation.state import (
    LayerState,
    ReadoutStyle,
    RefillKey,
    check_readout,
    refill_rows,
    state_from_svd,
)
from glora_server.aggregation.strategies.base import AggregationResult, ClientContract, Properties, Strategy
from glora_server.aggregation.strategies.options import Option, OptionValue


class Fedit(Strategy):
    """The strategy `fedit`.

    The state's `extra` holds b (d×R) and a (R×n); u, a, sigma are their product's canonical form, for telemetry.
    """

    name = "fedit"
    summary = "FedAvg on the factors, zero-padded for mixed ranks; depends on the gauge, the usual baseline"
    properties = Properties(gauge_invariant=False, exact=False, mixed_ranks=True)
    options: tuple[Option, ...] = ()

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """Readouts are trained and come back whole; averaged factors do not fit a device's optimizer state."""
        return ClientContract()

    @override
    def aggregate(
        self,
        state: LayerState | None,
        updates: Sequence[ClientUpdate],
        *,
        rank: int,
        round_index: int,
        options: Mapping[str, OptionValue],
    ) -> AggregationResult:
        """The averaged factors. A scale s is folded as √s on both, so that devices with other scales are comparable."""
        largest = max(update.rank for update in updates)
        if largest > rank:
            raise RankError(f"An update has rank {largest} and the server rank is {rank}; fedit cannot pad that.")
        weights = normalised_weights([update.weight for update in updates])
        mean_b, mean_a = _padded_means(updates, weights, rank)
        blocks = [Block(left=update.b, right=update.a) for update in updates]
        terms = _terms([*blocks, Block(left=mean_b, right=mean_a)], updates, weights)
        product = terms.frame.coordinates((Term(block=len(updates), coefficient=1.0),))
        found = product.svd()
        dtype = state_dtype(updates[0].b.dtype)
        new = state_from_svd(
            CompactSvd(u=terms.frame.lift_left(found.u), sigma=found.sigma, v=terms.frame.lift_right(found.v)),
            rank=rank,
            dtype=dtype,
            strategy=self.name,
            floor=rounding_floor(product),
            extra={"b": mean_b.to(dtype), "a": mean_a.to(dtype)},
        )
        return AggregationResult(
            state=new,
            diagnostics=_diagnostics(terms, updates, basis=found.u[:, : new.rank], previous=state, new=new, rank=rank),
        )

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """The first columns of b and rows of a, each divided by √scale: the mirror of how scales were folded in.

        A component whose column and row are both zero (nobody trained it) could never be trained again; it gets a
        seeded row in a and keeps its zero column in b, which leaves the product as it is. `style` has no meaning
        here and is not used.
        """
        check_readout(rank, scale)
        b = state.u.new_zeros((state.u.shape[0], rank), dtype=COMPUTE_DTYPE)
        a = refill_rows(b.new_zeros((0, state.a.shape[1])), first=0, last=rank, key=key)
        if state.extra or state.rank:
            mean_b, mean_a = _averages(state)
            used = min(rank, mean_b.shape[1])
            b[:, :used] = mean_b[:, :used].to(COMPUTE_DTYPE) / scale**0.5
            held = mean_b[:, :used].any(dim=0) | mean_a[:used].any(dim=1)
            a[:used] = torch.where(held[:, None], mean_a[:used].to(COMPUTE_DTYPE) / scale**0.5, a[:used])
        return b.to(state.u.dtype), a.to(state.u.dtype)


def _averages(state: LayerState) -> tuple[Tensor, Tensor]:
    try:
        return state.extra["b"], state.extra["a"]
    except KeyError as missing:
        raise StateError(
            f"The state has no tensor {missing} in `extra`, where fedit keeps its averaged factors; "
            "was it made by another strategy?"
        ) from missing


def _padded_means(updates: Sequence[ClientUpdate], weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    first = updates[0]
    mean_b = first.b.new_zeros((first.b.shape[0], rank), dtype=COMPUTE_DTYPE)
    mean_a = first.a.new_zeros((rank, first.a.shape[1]), dtype=COMPUTE_DTYPE)
    for update, weight in zip(updates, weights, strict=True):
        share = weight * update.scale**0.5
        mean_b[:, : update.rank].add_(update.b.to(COMPUTE_DTYPE), alpha=share)
        mean_a[: update.rank].add_(update.a.to(COMPUTE_DTYPE), alpha=share)
    return mean_b, mean_a


def _terms(blocks: Sequence[Block], updates: Sequence[ClientUpdate], weights: tuple[float, ...]) -> RoundTerms:
    raw = tuple((Term(block=i, coefficient=update.scale),) for i, update in enumerate(updates))
    return RoundTerms(frame=JointFrame(blocks), weights=weights, base=(), updates=raw, changes=raw)


def _diagnostics(
    terms: RoundTerms,
    updates: Sequence[ClientUpdate],
    *,
    basis: Tensor,
    previous: LayerState | None,
    new: LayerState,
    rank: int,
) -> Diagnostics:
    frame = terms.frame
    mean_norm = frame.coordinates(terms.mean()).norm()
    product = (Term(block=len(updates), coefficient=-1.0),)
    error = frame.coordinates(terms.mean() + product).norm()
    held = frame.coordinates(product).norm()
    return Diagnostics(
        eigenvalues=(),
        eigengap=None,
        sigma=tuple(new.sigma.tolist()),
        mean_norm=mean_norm,
        captured_energy=(held / mean_norm) ** 2 if mean_norm else 1.0,
        truncation_error=error / mean_norm if mean_norm else 0.0,
        coverage=coverage(updates, terms.weights, rank),
        clients=client_diagnostics(terms, updates, None, basis),
        angles=principal_angles(previous, new),
    )
