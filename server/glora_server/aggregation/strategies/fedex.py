r"""FedEx-LoRA: averaged factors, and what averaging them got wrong is added to every device's frozen weight.

.. math:: \Delta W_{res} = \Sigma p_is_iB_iA_i - \bar B\bar A,\qquad W_0 \leftarrow W_0 + \Delta W_{res},\qquad
    \text{adapters go on from } (\bar B, \bar A)

Exact: residual and adapter together are M. The residual stays factored (rank ≤ Σr) and has the shape of ΔW, out×in:
whoever merges it into a weight that is stored in×out (GPT-2's Conv1D) transposes it, and nobody else.
`residual_rank` cuts it and gives up exactness. One rank for all. The sum of adapters and residuals is gauge invariant,
the adapters are not.

O((d + n)(Σr + k)² + (Σr + k)³) for a model of rank k. Source: arXiv 2410.09432, weighted.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import ClientUpdate, CompactSvd, normalised_weights, numerical_rank
from glora_server.aggregation.frame import Block, Term, rounding_floor
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey
from glora_server.aggregation.strategies.averages import (
    SPLIT,
    averaged_a,
    averaged_b,
    equal_rank,
    factor_readout,
    from_svd,
    joined,
    kept,
    kept_factors,
    model_blocks,
    spectral_result,
    started,
    update_terms,
)
from glora_server.aggregation.strategies.base import (
    AggregationResult,
    ClientContract,
    MergeInstruction,
    Properties,
    Strategy,
    Volume,
    merge_instruction,
)
from glora_server.aggregation.strategies.options import NumberOption, Option, OptionValue, optional_number


class Fedex(Strategy):
    """The strategy `fedex`.

    u·a + tail_b·tail_a is the whole model (all residuals and the adapter); `extra` also holds the adapter b (d×r),
    a (r×n), √s on both, and this round's residual, residual_b (d×k) and residual_a (k×n).
    """

    name = "fedex"
    summary = "factors averaged, and the error of that merged into each device's base weight: exact, one rank for all"
    properties = Properties(
        gauge_invariant=False,
        exact=True,
        mixed_ranks=False,
        down=Volume(terms=(("d+n", "r"), ("d+n", "Σr"))),
        cost="O((d+n)(Σr+k)² + (Σr+k)³) for a model of rank k",
        source="FedEx-LoRA (arXiv 2410.09432)",
        note="the model is invariant, the adapters handed out are not; needs a mergeable base",
    )
    options: tuple[Option, ...] = (
        NumberOption(
            name="residual_rank",
            summary="most directions of the residual that are sent; all if not given",
            default=None,
            whole=True,
        ),
    )

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """Readouts are trained over the merged base and come back whole."""
        return ClientContract(merges=True)

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
        """The averaged factors, the residual, and the model that devices have once they merged it."""
        r = equal_rank(updates, rank=rank, name=self.name)
        weights = normalised_weights([update.weight for update in updates])
        b, a = averaged_b(updates, weights, r, power=SPLIT), averaged_a(updates, weights, r, power=SPLIT)
        drift, signs = _drift(state)
        terms = update_terms(updates, weights, held=[*drift, Block(left=b, right=a)], base=signs)
        frame = terms.frame
        adapter = Term(block=len(updates) + len(drift), coefficient=1.0)
        error = frame.coordinates((*terms.mean()[len(signs) :], Term(block=adapter.block, coefficient=-1.0)))
        found = error.svd()
        keep = numerical_rank(found.sigma, tolerance=0.0, floor=rounding_floor(error.magnitude()))
        most = optional_number(options, "residual_rank")
        keep = keep if most is None else min(keep, int(most))
        extra = {"b": b, "a": a, **_residual(found, keep, frame.lift_left, frame.lift_right)}
        target = joined([frame.coordinates((*terms.base, adapter)), from_svd(found, keep)])
        return spectral_result(
            self.name, terms, target, updates, previous=state, rank=rank, extra=extra, keep_tail=True
        )

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """The averaged factors, each divided by √scale; the base has the rest. `style` has no meaning here."""
        return factor_readout(state, rank, scale, key=key, power=SPLIT)

    @override
    def merge(self, state: LayerState, *, joining: bool = False) -> MergeInstruction | None:
        """This round's residual; for a device that joins, all residuals so far."""
        if not started(state):
            return None
        if not joining:
            return merge_instruction(kept(state, "residual_b"), kept(state, "residual_a"))
        blocks, signs = _drift(state)
        left = [block.left * sign for block, sign in zip(blocks, signs, strict=True)]
        return merge_instruction(torch.cat(left, dim=1), torch.cat([block.right for block in blocks]))


def _drift(state: LayerState | None) -> tuple[list[Block], list[float]]:
    """What was merged into the base so far, as signed blocks: the model less the adapter."""
    if state is None or not started(state):
        return [], []
    blocks = model_blocks(state)
    b, a = kept_factors(state)
    return [*blocks, Block(left=b, right=a)], [1.0] * len(blocks) + [-1.0]


def _residual(
    found: CompactSvd, keep: int, lift_left: Callable[[Tensor], Tensor], lift_right: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    return {
        "residual_b": lift_left(found.u[:, :keep] * found.sigma[:keep]),
        "residual_a": lift_right(found.v[:, :keep]).mT.contiguous(),
    }
