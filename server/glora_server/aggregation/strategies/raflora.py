r"""raFLoRA: each slice of rank is averaged over the devices that have it, so that high ranks do not decay.

.. math:: S = \sum_h\ \sum_{k:\,r_k\ge\ell_h} \frac{n_k}{\sum_{j:\,r_j\ge\ell_h}n_j}\
    s_kB_k[:,\,\ell_{h-1}{:}\ell_h]\ A_k[\ell_{h-1}{:}\ell_h,\,:],\qquad S' = S_{[R]}

Levels ℓ_1 < ℓ_2 < … come from the run, never from who took part in the round. Columns above a device's highest level
are not counted, so levels should hold all granted ranks. Without levels every rank is one (this is RB-LoRA's rule as
well), which gives the same as any list that holds all granted ranks. A slice is lost when no device of that rank takes
part, and since columns carry meaning the result depends on the gauge as soon as ranks differ.

O((d + n)(Σr)² + (Σr)³). Source: arXiv 2602.13486.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.errors import OptionError, WeightError
from glora_server.aggregation.factors import ClientUpdate, normalised_weights
from glora_server.aggregation.frame import Coordinates, Term
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey, slice_readout
from glora_server.aggregation.strategies.averages import joined, spectral_result, update_terms
from glora_server.aggregation.strategies.base import (
    NO_OPTIONS,
    AggregationResult,
    ClientContract,
    Properties,
    Strategy,
)
from glora_server.aggregation.strategies.options import Option, OptionValue, RanksOption


class Raflora(Strategy):
    """The strategy `raflora`: the canonical state of S_[R]."""

    name = "raflora"
    summary = "each slice of rank averaged over the devices that have it, then cut to rank R"
    properties = Properties(
        gauge_invariant=False,
        exact=False,
        mixed_ranks=True,
        cost="O((d+n)(Σr)² + (Σr)³)",
        source="raFLoRA (arXiv 2602.13486)",
        note="with equal ranks invariant and exact: the same as flexlora",
    )
    options: tuple[Option, ...] = (
        RanksOption(
            name="levels",
            summary="the ranks that end a slice, among them all that devices have, for columns beyond a device's last "
            "slice are not counted; every rank if not given",
        ),
    )

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """Readouts are trained and come back whole."""
        return ClientContract()

    @override
    def check_plan(self, ranks: Sequence[int], options: Mapping[str, OptionValue] = NO_OPTIONS) -> None:
        """Every device must have a slice, and the largest ones no columns beyond the last."""
        super().check_plan(ranks, options)
        ends = _levels(options)
        if ends and ends[0] > min(ranks):
            raise OptionError(
                f"Option 'levels' begins at {ends[0]}, so that devices of rank {min(ranks)} would have no slice that "
                f"counts; add their rank to the levels, or admit no device below {ends[0]} (policy.min_rank)."
            )
        if ends and ends[-1] < max(ranks):
            raise OptionError(
                f"Option 'levels' ends at {ends[-1]}, so that columns {ends[-1] + 1} to {max(ranks)} of the largest "
                f"devices would not be counted; end it with their rank, {max(ranks)}."
            )

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
        """The sum of the slices, cut to rank R."""
        weights = normalised_weights([update.weight for update in updates])
        ranks = [update.rank for update in updates]
        shares = slice_shares(ranks, weights, _levels(options) or range(1, max(ranks) + 1))
        terms = update_terms(updates, weights)
        parts = []
        for i, (update, share) in enumerate(zip(updates, shares, strict=True)):
            own = terms.frame.coordinates((Term(block=i, coefficient=update.scale),))
            parts.append(Coordinates(left=own.left * share.to(own.left.device), right=own.right))
        return spectral_result(self.name, terms, joined(parts), updates, previous=state, rank=rank)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """A slice of the state."""
        return slice_readout(state, rank, scale, key=key, style=style)


def _levels(options: Mapping[str, OptionValue]) -> list[int]:
    """ℓ_1, ℓ_2, …; empty where every rank is a level."""
    levels = options.get("levels")
    return [] if levels is None else [int(level) for level in str(levels).split(",")]


def slice_shares(ranks: Sequence[int], weights: Sequence[float], levels: Sequence[int]) -> list[Tensor]:
    """Per device the weight of each of its columns (r_k, float64): n_k over the weight of all that have the slice.

    Raises WeightError when not one column is counted.
    """
    shares = [torch.zeros(rank, dtype=torch.float64) for rank in ranks]
    start = 0
    for end in levels:
        holders = [k for k, rank in enumerate(ranks) if rank >= end]
        held = sum(weights[k] for k in holders)
        for k in holders:
            shares[k][start:end] = weights[k] / held if held > 0 else 0.0
        start = end
    if not any(bool(share.any()) for share in shares):
        raise WeightError(
            f"No update with a positive weight reaches the first level of rank, {levels[0]}; lower the levels."
        )
    return shares
