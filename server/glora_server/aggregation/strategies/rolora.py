r"""RoLoRA: the factors take turns. Even rounds train and average B over a common A, odd ones A over a common B.

.. math:: t\ \text{even:}\quad S' = (\Sigma p_is_iB_i)\,A,\qquad t\ \text{odd:}\quad S' = B\,(\Sigma p_iA_i)

One factor is common, so every round is exact. B comes first, because training A over B = 0 moves nothing.

O(Ndr) or O(Nnr). Source: arXiv 2409.02346, in the order of FedRot-LoRA's code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import COMPUTE_DTYPE, ClientUpdate, normalised_weights
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey
from glora_server.aggregation.strategies.averages import (
    ON_B,
    averaged_a,
    averaged_b,
    equal_rank,
    factor_readout,
    factor_result,
)
from glora_server.aggregation.strategies.base import (
    ONLY_B,
    AggregationResult,
    ClientContract,
    Properties,
    Strategy,
    TrainMask,
    UploadSet,
)
from glora_server.aggregation.strategies.common_factor import common_a, common_b, first_key, with_a
from glora_server.aggregation.strategies.options import Option, OptionValue


class Rolora(Strategy):
    """The strategy `rolora`; `extra` holds b (d×r, scale folded in) and a (r×n).

    An update may have the trained factor only, or both with the common one as it was delivered; `sent` tells the
    common one.
    """

    name = "rolora"
    summary = "B and A trained in turns over the other one, common to all: exact each round, half the traffic, one rank"
    properties = Properties(
        gauge_invariant=True,
        exact=True,
        mixed_ranks=False,
        no_gauge=True,
        up=ONLY_B,
        down=ONLY_B,
        cost="O(Ndr)",
        source="RoLoRA (arXiv 2409.02346)",
        note="odd rounds move n·r instead of d·r",
    )
    options: tuple[Option, ...] = ()

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """B in even rounds, A in odd ones."""
        if _trains_b(round_index):
            return ClientContract(train=TrainMask.B, upload=UploadSet.B, needs_sent=True)
        return ClientContract(train=TrainMask.A, upload=UploadSet.A, needs_sent=True)

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
        """The mean of the trained factor beside the common one."""
        r = equal_rank(updates, rank=rank, name=self.name)
        weights = normalised_weights([update.weight for update in updates])
        if _trains_b(round_index):
            a = common_a(state, updates)[:r]
            whole = with_a(updates, a)
            b = averaged_b(whole, weights, r, power=ON_B)
        else:
            b = common_b(state, updates)[:, :r]
            whole = [_over(b, update) for update in updates]
            a = averaged_a(whole, weights, r, power=ON_B)
        return factor_result(self.name, b, a, whole, weights, previous=state, rank=rank, dtype=updates[0].b.dtype)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """b/scale and a; the version of `key` and `style` have no meaning here."""
        return factor_readout(state, rank, scale, key=first_key(key), power=ON_B)


def _trains_b(round_index: int) -> bool:
    return round_index % 2 == 0


def _over(b: Tensor, update: ClientUpdate) -> ClientUpdate:
    """The update over the common b, which holds the scale of the plan; a device's own scale stays as a ratio."""
    planned = update.scale if update.sent_scale is None else update.sent_scale
    return replace(update, b=b, a=update.a.to(COMPUTE_DTYPE), scale=update.scale / planned, sent=None, sent_scale=None)
