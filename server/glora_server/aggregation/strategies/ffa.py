r"""FFA-LoRA: A is frozen and common, only B is trained and averaged, so the mean is exact.

.. math:: \Delta W_i = s_iB_iA_0[:r_i],\qquad \bar B = \Sigma p_i\,[s_iB_i\ \ 0],\qquad \bar BA_0 = \Sigma p_i\Delta W_i

A_0 is made from (seed, module) and nested: a device of rank r has its first r rows, and narrower uploads are padded
with zeros, which is exact for mixed ranks too (the paper has equal ranks only). As with every replace rule, columns
that few devices have decay by the share of the weight that has them.

O(Ndr). Source: arXiv 2403.12313.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import ClientUpdate, normalised_weights
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey
from glora_server.aggregation.strategies.averages import ON_B, averaged_b, factor_readout, factor_result, largest_rank
from glora_server.aggregation.strategies.base import (
    ONLY_B,
    AggregationResult,
    ClientContract,
    InitSource,
    Properties,
    Strategy,
    TrainMask,
    UploadSet,
)
from glora_server.aggregation.strategies.common_factor import common_a, first_key, with_a
from glora_server.aggregation.strategies.options import Option, OptionValue


class Ffa(Strategy):
    """The strategy `ffa`; `extra` holds b (d×k, scale folded in) and a = A_0 (k×n), k the largest rank seen so far.

    An update may have B only, or both with the common A; with B only, `sent` tells A_0 in the first round.
    """

    name = "ffa"
    summary = "A frozen and common, B averaged: exact, half the traffic, linear noise for privacy"
    properties = Properties(
        gauge_invariant=True,
        exact=True,
        mixed_ranks=True,
        no_gauge=True,
        up=ONLY_B,
        down=ONLY_B,
        cost="O(Ndr)",
        source="FFA-LoRA (arXiv 2403.12313), nested for mixed ranks",
    )
    options: tuple[Option, ...] = ()

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """B is trained and comes back; A is the common one and stays."""
        return ClientContract(train=TrainMask.B, init=InitSource.COMMON_A, upload=UploadSet.B, needs_sent=True)

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
        """B̄ and A_0."""
        largest_rank(updates, rank=rank, name=self.name)
        a = common_a(state, updates)
        weights = normalised_weights([update.weight for update in updates])
        whole = with_a(updates, a)
        b = averaged_b(whole, weights, a.shape[0], power=ON_B)
        return factor_result(self.name, b, a, whole, weights, previous=state, rank=rank, dtype=updates[0].b.dtype)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """B̄/scale and the first rows of A_0; the version of `key` and `style` have no meaning here."""
        return factor_readout(state, rank, scale, key=first_key(key), power=ON_B)
