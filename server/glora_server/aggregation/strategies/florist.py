r"""FLoRIST: the exact mean, cut to the fewest directions that hold a share τ of its energy.

.. math:: M = \Sigma p_is_iB_iA_i = U\Sigma V^\top,\qquad
    p = \min\{k : \Sigma_{j\le k}\sigma_j^2 \ge \tau\,\Sigma_j\sigma_j^2\},\quad S' = U_p\Sigma_pV_p^\top,\ p \le R

The paper takes the SVDs of the stacked B and of the stacked A and then that of the small core between them; QR factors
in place of the two outer SVDs give the same core up to rotations, and M_[p] is the same matrix, the best of rank p. The
paper hands one pair of rank p to all; here a device of a smaller rank gets its first directions.

O((d + n)(Σr)² + (Σr)³). Source: arXiv 2506.09199.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import ClientUpdate, normalised_weights
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey, slice_readout
from glora_server.aggregation.strategies.averages import spectral_result, update_terms
from glora_server.aggregation.strategies.base import AggregationResult, ClientContract, Properties, Strategy
from glora_server.aggregation.strategies.options import NumberOption, Option, OptionValue, number


class Florist(Strategy):
    """The strategy `florist`: the canonical state of M_[p]."""

    name = "florist"
    summary = "the mean of the true updates cut to as few directions as hold a share of its energy"
    properties = Properties(
        gauge_invariant=True,
        exact=True,
        mixed_ranks=True,
        cost="O((d+n)(Σr)² + (Σr)³)",
        source="FLoRIST (arXiv 2506.09199)",
        note="exact for energy = 1",
    )
    options: tuple[Option, ...] = (
        NumberOption(name="energy", summary="share τ of ‖M‖² that the state keeps", default=0.99, at_most=1.0),
    )

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """Readouts are trained and come back whole."""
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
        """M_[p], p ≤ R."""
        terms = update_terms(updates, normalised_weights([update.weight for update in updates]))
        mean = terms.frame.coordinates(terms.mean())
        energy = number(options, "energy")
        return spectral_result(self.name, terms, mean, updates, previous=state, rank=rank, exact=True, energy=energy)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """A slice; directions beyond p are refilled, with zero in B."""
        return slice_readout(state, rank, scale, key=key, style=style)
