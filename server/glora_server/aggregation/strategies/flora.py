r"""FLoRA: the updates are stacked, not averaged, and every device merges the stack into its base weight.

.. math:: B = [B_1\ \dots\ B_N],\qquad A = [p_1s_1A_1;\ \dots;\ p_Ns_NA_N],\qquad BA = M,\qquad W_0 \leftarrow W_0 + BA

Then everybody starts again with A random and B = 0. Exact for any ranks, with weights and scales on A only (a weight on
both sides, or none, is a common mistake). The rank of the model grows without bound, and the base must be mergeable
(not 4-bit). What a rank-R state cannot hold is kept as a tail, so that nothing is lost.

Server: copies, and O((d + n)(Σr + k)² + (Σr + k)³) for the telemetry of a model of rank k; device: O(dnΣr) for the
merge. Source: arXiv 2409.05976.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import COMPUTE_DTYPE, ClientUpdate, normalised_weights
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey, check_readout, refill_rows
from glora_server.aggregation.strategies.averages import kept, model_blocks, spectral_result, started, update_terms
from glora_server.aggregation.strategies.base import (
    AggregationResult,
    ClientContract,
    InitSource,
    MergeInstruction,
    Properties,
    Strategy,
    Volume,
    merge_instruction,
)
from glora_server.aggregation.strategies.options import Option, OptionValue


class Flora(Strategy):
    """The strategy `flora`.

    u·a + tail_b·tail_a is everything that was merged so far; `extra` also holds this round's stack, stack_b (d×Σr) and
    stack_a (Σr×n).
    """

    name = "flora"
    summary = "updates stacked and merged into each device's base weight: exact for any ranks, large downloads"
    properties = Properties(
        gauge_invariant=True,
        exact=True,
        mixed_ranks=True,
        down=Volume(terms=(("d+n", "Σr"),)),
        cost="copies; for its telemetry O((d+n)(Σr+k)² + (Σr+k)³), a model of rank k",
        source="FLoRA (arXiv 2409.05976)",
        note="rank grows without bound; needs a mergeable base",
    )
    options: tuple[Option, ...] = ()

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """A fresh adapter is trained over the merged base and comes back whole."""
        return ClientContract(init=InitSource.FRESH, merges=True)

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
        """The stack, and the model that it leads to."""
        weights = normalised_weights([update.weight for update in updates])
        held = model_blocks(state)
        terms = update_terms(updates, weights, held=held, base=[1.0] * len(held))
        scaled = [u.a.to(COMPUTE_DTYPE) * (p * u.scale) for u, p in zip(updates, weights, strict=True)]
        stack = {"stack_b": torch.cat([update.b for update in updates], dim=1), "stack_a": torch.cat(scaled)}
        target = terms.frame.coordinates(terms.mean())
        return spectral_result(
            self.name, terms, target, updates, previous=state, rank=rank, exact=True, extra=stack, keep_tail=True
        )

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """B = 0 and seeded rows in A, new ones for each version."""
        check_readout(rank, scale)
        b = state.u.new_zeros((state.u.shape[0], rank))
        a = refill_rows(b.new_zeros((0, state.a.shape[1]), dtype=COMPUTE_DTYPE), first=0, last=rank, key=key)
        return b, a.to(b.dtype)

    @override
    def merge(self, state: LayerState, *, joining: bool = False) -> MergeInstruction | None:
        """This round's stack; for a device that joins, everything that was merged so far."""
        if not started(state):
            return None
        if not joining:
            return merge_instruction(kept(state, "stack_b"), kept(state, "stack_a"))
        return merge_instruction(
            torch.cat([state.u, kept(state, "tail_b")], dim=1), torch.cat([state.a, kept(state, "tail_a")])
        )
