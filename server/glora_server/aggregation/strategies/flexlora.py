r"""FlexLoRA: the exact mean of the updates, cut to rank R by an SVD, each device gets its slice.

.. math:: M = \Sigma p_is_iB_iA_i \approx U_R\Sigma_RV_R^\top,\qquad B = U_r\Sigma_r/s,\quad A = V_r^\top

The paper forms M densely (d×n) and takes its SVD; here M stays factored, [s_1p_1B_1 …]·[A_1; …], and the SVD is that of
the core between two QR factors. Same result. As in the paper uploads replace the state, so directions beyond the
smallest rank decay by w_j every round.

O((d + n)(Σr)² + (Σr)³). Source: arXiv 2402.11505.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import ClientUpdate, normalised_weights
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey, slice_readout
from glora_server.aggregation.strategies.averages import spectral_result, update_terms
from glora_server.aggregation.strategies.base import AggregationResult, ClientContract, Properties, Strategy
from glora_server.aggregation.strategies.options import Option, OptionValue


class Flexlora(Strategy):
    """The strategy `flexlora`: the canonical state of M_[R]."""

    name = "flexlora"
    summary = "the mean of the true updates cut to rank R by SVD, A orthonormal in what devices get"
    properties = Properties(
        gauge_invariant=True,
        exact=True,
        mixed_ranks=True,
        cost="O((d+n)(Σr)² + (Σr)³)",
        source="FlexLoRA (arXiv 2402.11505), factored",
        note="the tail beyond a device's rank decays each round",
    )
    options: tuple[Option, ...] = ()

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
        """M_[R]."""
        terms = update_terms(updates, normalised_weights([update.weight for update in updates]))
        mean = terms.frame.coordinates(terms.mean())
        return spectral_result(self.name, terms, mean, updates, previous=state, rank=rank, exact=True)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """A slice with orthonormal rows in A, whatever `style` says: that is the method."""
        return slice_readout(state, rank, scale, key=key, style="a_orthonormal")
