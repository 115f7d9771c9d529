r"""HetLoRA: factors padded with zeros and averaged by the norms of their updates; devices may prune themselves.

.. math:: p_k = \|\Delta W_k\|_F \,/\, \Sigma_j\|\Delta W_j\|_F,\qquad \bar B = \Sigma p_k[\sqrt{s_k}B_k\ \ 0],\quad
    \bar A = \Sigma p_k[\sqrt{s_k}A_k;\ 0]

A device of rank r gets the first r columns and rows. Devices prune themselves (`glora_client.pruning`): the loss
+ λ‖B[:, γr:]‖_F‖A[γr:, :]‖_F, and after training the rank shrinks to ⌊γr⌋ when that product fell. Inexact, and columns
carry meaning: depends on the gauge.
‖ΔW_k‖ comes from QR cores. The scale is folded in as √s on both factors (the released reimplementation drops it and
divides by a wrong one when it loads). When every update is zero, p_k is the share of training rows. The mean that
diagnostics compare with is the one with these p_k.

O(N(d + n)r² + (d + n)R). Source: arXiv 2401.06432; `weights` = "rows" is the variant "weighted HetLoRA".
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import ClientUpdate, delta_norm, normalised_weights
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
from glora_server.aggregation.strategies.options import ChoiceOption, Option, OptionValue


class Hetlora(Strategy):
    """The strategy `hetlora`; `extra` holds b (d×R) and a (R×n), √s on both."""

    name = "hetlora"
    summary = "factors padded with zeros and averaged by the norms of the updates, for mixed ranks"
    properties = Properties(
        gauge_invariant=False,
        exact=False,
        mixed_ranks=True,
        cost="O(N(d+n)r² + (d+n)R)",
        source="HetLoRA (arXiv 2401.06432)",
        note="devices may shrink their rank",
    )
    options: tuple[Option, ...] = (
        ChoiceOption(
            name="weights",
            summary="norm: by ‖ΔW‖; rows: by training rows",
            default="norm",
            choices=("norm", "rows"),
        ),
    )

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """Readouts are trained and come back whole, possibly narrower."""
        return ClientContract(may_shrink=True)

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
        """The weighted zero-padded factors. An update of weight 0 counts nothing, whatever its norm."""
        largest_rank(updates, rank=rank, name=self.name)
        weights = normalised_weights([update.weight for update in updates])
        if options["weights"] == "norm":
            norms = [delta_norm(u.b, u.a, u.scale) if u.weight > 0 else 0.0 for u in updates]
            weights = normalised_weights(norms) if any(norms) else weights
        b = averaged_b(updates, weights, rank, power=SPLIT)
        a = averaged_a(updates, weights, rank, power=SPLIT)
        return factor_result(self.name, b, a, updates, weights, previous=state, rank=rank)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """Truncation: the first columns and rows, each divided by √scale; `style` has no meaning here."""
        return factor_readout(state, rank, scale, key=key, power=SPLIT)
