r"""What a device says: the round rule defines X_i, and the subspace rule then sees nothing else.

==============  ==========================================  ==========================================================
rule            X_i                                         the device
==============  ==========================================  ==========================================================
`replace`       ΔW_i                                        trains the readout
`delta`         S + η(ΔW_i − sent_i)                        trains the readout; the tail it never had is not lost
`frozen_tail`   S + η(ΔW_i − sent_i)                        trains the readout on top of the frozen tail S − sent_i
`accumulate`    S + ηΔW_i                                   trains a fresh adapter on top of the frozen S
==============  ==========================================  ==========================================================

Each X_i = S + D_i is kept as terms over the blocks of one `JointFrame`; D_i is what the device changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from glora_server.aggregation.errors import MissingSentError
from glora_server.aggregation.factors import ClientUpdate
from glora_server.aggregation.frame import Block, Combination, JointFrame, Term, rounding_floor
from glora_server.aggregation.state import LayerState


class Rule(StrEnum):
    """How an upload is read."""

    REPLACE = "replace"
    DELTA = "delta"
    FROZEN_TAIL = "frozen_tail"
    ACCUMULATE = "accumulate"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientNorms:
    """‖ΔW_i‖_F and ‖D_i‖_F."""

    update: float
    change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTerms:
    """A round over one frame: S as the rule uses it, and per client ΔW_i and the change D_i, with X_i = S + D_i.

    `anchor` is the combination whose columns span the previous common space, empty where there is none.
    """

    frame: JointFrame
    weights: tuple[float, ...]
    base: Combination
    updates: tuple[Combination, ...]
    changes: tuple[Combination, ...]
    anchor: Combination = ()

    def norms(self, client: int, *, step: float, change: float) -> ClientNorms:
        """From `step` = ‖ηΔW_i‖ and `change` = ‖D_i‖, which counts as 0 where terms cancel to nothing but rounding.

        So it is for an adapter that came back untouched.
        """
        (own,), changed = self.updates[client], self.changes[client]
        beyond = change > rounding_floor(self.frame.magnitude(changed))
        return ClientNorms(update=step * own.coefficient / changed[0].coefficient, change=change if beyond else 0.0)

    def said(self, client: int) -> Combination:
        """X_i."""
        return self.base + self.changes[client]

    def mean(self) -> Combination:
        """Σ p_i X_i, blocks that several clients share taken once."""
        return self.base + weighted_sum(self.changes, self.weights)


def weighted_sum(combinations: Sequence[Combination], weights: Sequence[float]) -> Combination:
    """Σ weight·combination with one term per block, in the order of the blocks."""
    total: dict[int, float] = {}
    for combination, weight in zip(combinations, weights, strict=True):
        for term in combination:
            total[term.block] = total.get(term.block, 0.0) + weight * term.coefficient
    return tuple(Term(block=block, coefficient=total[block]) for block in sorted(total) if total[block] != 0.0)


def round_terms(
    rule: Rule,
    state: LayerState | None,
    updates: Sequence[ClientUpdate],
    weights: tuple[float, ...],
    *,
    eta: float,
    anchored: bool = False,
) -> RoundTerms:
    """The round's matrices as terms; `anchored` keeps the state in the frame for rules that do not use it.

    Raises MissingSentError when the rule needs `sent` and an update has none.
    """
    needs_sent = rule in {Rule.DELTA, Rule.FROZEN_TAIL}
    step = 1.0 if rule is Rule.REPLACE else eta
    blocks = [Block(left=update.b, right=update.a) for update in updates]
    raw = tuple((Term(block=i, coefficient=update.scale),) for i, update in enumerate(updates))
    changes = [_scaled(combination, step) for combination in raw]
    if needs_sent:
        sent = sent_adapters(updates, rule)
        for i, (block, scale) in enumerate(sent.of_client):
            if block is not None:
                changes[i] += (Term(block=len(blocks) + block, coefficient=-step * scale),)
        blocks += sent.blocks
    held: Combination = ()
    if (rule is not Rule.REPLACE or anchored) and state is not None and state.rank:
        held = (Term(block=len(blocks), coefficient=1.0),)
        blocks.append(Block(left=state.u, right=state.a))
    return RoundTerms(
        frame=JointFrame(blocks),
        weights=weights,
        base=held if rule is not Rule.REPLACE else (),
        updates=raw,
        changes=tuple(changes),
        anchor=held if anchored else (),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SentAdapters:
    """Distinct sent adapters, and for each client which one it had (None: a zero adapter) at which scale."""

    blocks: tuple[Block, ...]
    of_client: tuple[tuple[int | None, float], ...]


def sent_adapters(updates: Sequence[ClientUpdate], rule: Rule) -> SentAdapters:
    """What the devices were sent, equal adapters once. Raises MissingSentError."""
    kept: list[tuple[Tensor, Tensor]] = []
    zeros: list[tuple[Tensor, Tensor]] = []
    of_client: list[tuple[int | None, float]] = []
    for position, update in enumerate(updates):
        if update.sent is None:
            raise MissingSentError(
                f"The rule {rule.value!r} needs the factors that each device was sent, and update {position} has none; "
                "pass sent=(b0, a0) as rendered, or use rule='replace'."
            )
        scale = update.sent_scale if update.sent_scale is not None else update.scale
        # Devices of one rank were sent the same file: its columns need to be in the frame only once.
        found = next((k for k, other in enumerate(kept) if _same(update.sent, other)), None)
        if found is None and (any(_same(update.sent, zero) for zero in zeros) or not bool(update.sent[0].any())):
            zeros = zeros or [update.sent]
        elif found is None:
            found = len(kept)
            kept.append(update.sent)
        of_client.append((found, scale))
    return SentAdapters(blocks=tuple(Block(left=b, right=a) for b, a in kept), of_client=tuple(of_client))


def _same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return all(
        x is y or (x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y))
        for x, y in zip(first, second, strict=True)
    )


def _scaled(combination: Combination, factor: float) -> Combination:
    return tuple(Term(block=term.block, coefficient=factor * term.coefficient) for term in combination)
