"""Which adapters an assignment hands out: what to train or evaluate, and what lies frozen under it."""

from __future__ import annotations

from glora_server.coordinator.messages import AdapterOffer
from glora_server.coordinator.ports import ReadoutVariant, StrategyInfo
from glora_server.rounds.assignment import Assignment, AssignmentKind


def offered_adapters(assignment: Assignment, wanted: StrategyInfo, held_rank: int) -> tuple[AdapterOffer, ...]:
    """The adapters in the order of their download, the one to train last.

    `held_rank` is the largest rank that the state of a module has: a frozen adapter has what of it the device does
    not train, and is left out where that is nothing.
    """
    if assignment.kind is AssignmentKind.EVALUATE:
        return tuple(AdapterOffer(key=f"r{rank}", use="evaluate", rank=rank) for rank in assignment.ranks)
    rank = assignment.rank
    first = rank if wanted.frozen == "tail" else 0
    variant: ReadoutVariant = "fresh" if wanted.init == "fresh" else "train"
    train = AdapterOffer(key="train", use="train", rank=rank, variant=variant)
    if not wanted.frozen or held_rank <= first:
        return (train,)
    frozen = AdapterOffer(key="frozen", use="frozen", rank=held_rank - first, variant=wanted.frozen, first=first)
    return frozen, train
