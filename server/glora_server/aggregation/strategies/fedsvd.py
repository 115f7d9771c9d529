r"""FedSVD: FFA-LoRA whose common A is turned into right singular vectors every T rounds.

.. math:: \bar B = \Sigma p_is_iB_i,\qquad \text{every } T \text{ rounds: } \bar BA = U\Sigma V^\top,\quad
    \bar B \leftarrow U\Sigma,\quad A \leftarrow V^\top

All devices share A, so the mean is exact and turning the basis leaves the product as it is; an orthonormal A bounds
∂L/∂B, which is what clipping under differential privacy wants. Where B̄A has a rank below r, the other rows of A are
orthonormal rows of the old A's row space: they carry nothing yet and can be trained. B̄ = 0 leaves A as it is, and so
do rows beyond min(d, n).

O(Ndr), at a refresh + (d + n)r² + r³. Source: FedSVD (NeurIPS 2025, seanie12/fed-svd).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import ClientUpdate, core_svd, normalised_weights
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey
from glora_server.aggregation.strategies.averages import (
    ON_B,
    Factors,
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
from glora_server.aggregation.strategies.common_factor import common_a, first_key, with_a
from glora_server.aggregation.strategies.options import NumberOption, Option, OptionValue, number


class Fedsvd(Strategy):
    """The strategy `fedsvd`; `extra` holds b (d×r, scale folded in) and the common a (r×n).

    An update may have B only, or both with the common A; with B only, `sent` tells A in the first round.
    """

    name = "fedsvd"
    summary = "A frozen and common, B averaged, both turned into singular vectors every few rounds; one rank for all"
    properties = Properties(
        gauge_invariant=True,
        exact=True,
        mixed_ranks=False,
        no_gauge=True,
        up=ONLY_B,
        cost="O(Ndr), at a refresh + O((d+n)r² + r³)",
        source="FedSVD (NeurIPS 2025)",
    )
    options: tuple[Option, ...] = (
        NumberOption(name="refresh", summary="a new A after this many rounds", default=1.0, whole=True),
    )

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """B is trained and comes back; A is the delivered one and stays for the round."""
        return ClientContract(train=TrainMask.B, upload=UploadSet.B, needs_sent=True)

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
        """B̄ and A, in the basis of the singular vectors when round_index + 1 is a multiple of `refresh`."""
        r = equal_rank(updates, rank=rank, name=self.name)
        a = common_a(state, updates)[:r]
        weights = normalised_weights([update.weight for update in updates])
        whole = with_a(updates, a)
        b = averaged_b(whole, weights, r, power=ON_B)
        if (round_index + 1) % int(number(options, "refresh")) == 0:
            b, a = turned_basis(b, a)
        return factor_result(self.name, b, a, whole, weights, previous=state, rank=rank, dtype=updates[0].b.dtype)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """B̄/scale and A; the version of `key` and `style` have no meaning here."""
        return factor_readout(state, rank, scale, key=first_key(key), power=ON_B)


def turned_basis(b: Tensor, a: Tensor) -> Factors:
    """(UΣ, Vᵀ) with the same product and shapes; B̄ = 0 has no singular vectors and stays as it is.

    Signs make the largest |entry| of each row of Vᵀ positive. A rank above d or n keeps the columns that it cannot
    turn as zeros in B and as they were in A.
    """
    if not bool(b.any()):
        return b, a
    found = core_svd(b, a.mT)
    largest = found.v.gather(0, found.v.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(found.v.dtype)
    turned = found.sigma.numel()
    return (
        torch.cat([found.u * (sign * found.sigma), torch.zeros_like(b[:, turned:])], dim=1),
        torch.cat([(found.v * sign).mT, a[turned:]]),
    )
