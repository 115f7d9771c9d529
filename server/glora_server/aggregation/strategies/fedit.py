r"""FedIT, zero-padded: the factors are averaged, not the updates. Kept as the contrast that shows what gauges do.

:math:`\bar B = \Sigma p_i\sqrt{s_i}B_i,\ \bar A = \Sigma p_i\sqrt{s_i}A_i`, each padded with zeros to rank R. The
product :math:`\bar B\bar A` is not :math:`\Sigma p_i s_iB_iA_i`; the bias is
:math:`-\Sigma p_i(\tilde B_i-\bar B)(\tilde A_i-\bar A)`, and it changes when a device refactors the same update.

O(N(d + n)r). Source: FederatedGPT-Shepherd (FedIT), there with equal ranks.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import ClientUpdate, normalised_weights
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey
from glora_server.aggregation.strategies.averages import (
    SPLIT,
    averaged_a,
    averaged_b,
    factor_readout,
    factor_result,
    largest_rank,
)
from glora_server.aggregation.strategies.base import AggregationResult, ClientContract, Properties, Strategy
from glora_server.aggregation.strategies.options import Option, OptionValue


class Fedit(Strategy):
    """The strategy `fedit`.

    The state's `extra` holds b (d×R) and a (R×n); u, a, sigma are their product's canonical form, for telemetry.
    """

    name = "fedit"
    summary = "FedAvg on the factors, zero-padded for mixed ranks; depends on the gauge, the usual baseline"
    properties = Properties(
        gauge_invariant=False, exact=False, mixed_ranks=True, cost="O(N(d+n)r)", source="FedIT (FederatedGPT-Shepherd)"
    )
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
        largest_rank(updates, rank=rank, name=self.name)
        weights = normalised_weights([update.weight for update in updates])
        b = averaged_b(updates, weights, rank, power=SPLIT)
        a = averaged_a(updates, weights, rank, power=SPLIT)
        return factor_result(self.name, b, a, updates, weights, previous=state, rank=rank)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """The first columns of b and rows of a, each divided by √scale; `style` has no meaning here."""
        return factor_readout(state, rank, scale, key=key, power=SPLIT)
