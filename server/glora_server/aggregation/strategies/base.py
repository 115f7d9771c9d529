"""What a strategy is. A new one is a file beside this one and a line in `STRATEGIES`."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

from glora_server.aggregation.diagnostics import Diagnostics
from glora_server.aggregation.errors import ContractError, EmptyUpdatesError, MixedRanksError, RankError
from glora_server.aggregation.factors import ClientUpdate
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey
from glora_server.aggregation.strategies.options import Option, OptionValue

NO_OPTIONS: Mapping[str, OptionValue] = MappingProxyType({})
"""All at their defaults."""


class TrainMask(StrEnum):
    """Which factors a device trains."""

    BOTH = "both"
    A = "a"
    B = "b"
    CORE = "core"


class InitSource(StrEnum):
    """What a device starts a round from."""

    READOUT = "readout"
    FRESH = "fresh"
    COMMON_A = "common_a"
    FROZEN_STATE = "frozen_state"


class UploadSet(StrEnum):
    """What a device sends back."""

    BOTH = "both"
    A = "a"
    B = "b"
    CORE = "core"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientContract:
    """What a strategy needs from devices in a round (ALGORITHMS §3.11).

    `needs_sent`: the server must give the factors as sent with each update. `reset_optimizer`: factor coordinates
    change between rounds, so optimizer state must not be carried over. `merges`: before training the device adds
    `Strategy.merge` of the state to its frozen base weight. `keeps_b`: B never leaves the device, which goes on with
    its own and ignores the zero B of the readout. `may_shrink`: the device may return a smaller rank than it was given
    and has that rank from then on.
    """

    train: TrainMask = TrainMask.BOTH
    init: InitSource = InitSource.READOUT
    upload: UploadSet = UploadSet.BOTH
    needs_sent: bool = False
    reset_optimizer: bool = True
    merges: bool = False
    keeps_b: bool = False
    may_shrink: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """How many numbers one device sends or gets per module and round: a sum of rows times columns.

    Rows are those of B (`d`), of A (`n`) or both (`d+n`); columns the device's rank `r`, the sum of the round's ranks
    `Σr`, or the server rank `R`. Bytes are this times the width of the wire dtype.
    """

    terms: tuple[tuple[Literal["d", "n", "d+n"], Literal["r", "Σr", "R"]], ...]

    def count(self, *, d: int, n: int, r: int, total: int, server: int) -> int:
        """The number of values; `total` is Σr, `server` is R."""
        rows = {"d": d, "n": n, "d+n": d + n}
        columns = {"r": r, "Σr": total, "R": server}
        return sum(rows[row] * columns[column] for row, column in self.terms)

    def formula(self) -> str:
        """The sum as text, such as (d+n)·r + (d+n)·Σr."""
        return " + ".join(f"({row})·{column}" if "+" in row else f"{row}·{column}" for row, column in self.terms)


BOTH_FACTORS = Volume(terms=(("d+n", "r"),))
ONLY_B = Volume(terms=(("d", "r"),))
ONLY_A = Volume(terms=(("n", "r"),))


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInstruction:
    """W ← W + left·right on the frozen base weight, left (d×k), right (k×n); `digest` names exactly these numbers."""

    left: Tensor
    right: Tensor
    digest: str


def merge_instruction(left: Tensor, right: Tensor) -> MergeInstruction:
    """The instruction with its digest, BLAKE2b over shapes, dtypes and little-endian bytes."""
    digest = hashlib.blake2b(digest_size=16, person=b"glora-merge")
    for factor in (left, right):
        digest.update(f"{tuple(factor.shape)}{factor.dtype}".encode())
        digest.update(factor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return MergeInstruction(left=left, right=right, digest=digest.hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """What holds for a strategy's result.

    `gauge_invariant`: unchanged by (B_iQ_i, Q_i⁻¹A_i). `exact`: equals the mean of the ΔW_i before truncation to
    rank R.
    `mixed_ranks`: devices of one round may have different ranks. `no_gauge`: one factor is common to all devices, so
    that no gauge is left to them and an update that has one is refused. `up`, `down`: traffic of one device with the
    default options. `cost`: the server's work on one module. `source`: where the method comes from.
    """

    gauge_invariant: bool
    exact: bool
    mixed_ranks: bool
    no_gauge: bool = False
    up: Volume = BOTH_FACTORS
    down: Volume = BOTH_FACTORS
    cost: str = ""
    source: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationResult:
    """The next state of a module, and what was seen on the way."""

    state: LayerState
    diagnostics: Diagnostics


class Strategy(Protocol):
    """One way to fold updates into a state. Pure: no clock, no files, no randomness that is not in the arguments."""

    name: str
    summary: str
    properties: Properties
    options: tuple[Option, ...]

    @abstractmethod
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """What devices must do in that round, given resolved options."""
        raise NotImplementedError

    def check_plan(self, ranks: Sequence[int], options: Mapping[str, OptionValue] = NO_OPTIONS) -> None:  # noqa: ARG002
        """Raise RankError, MixedRanksError or OptionError when devices of these ranks cannot take part in one run."""
        if not ranks:
            raise EmptyUpdatesError("A plan needs at least one device rank.")
        if min(ranks) < 1:
            raise RankError(f"A plan has rank {min(ranks)}; every rank must be at least 1.")
        if not self.properties.mixed_ranks and len(set(ranks)) > 1:
            given = ", ".join(str(rank) for rank in sorted(set(ranks)))
            raise MixedRanksError(
                f"The strategy {self.name!r} needs one rank for all devices and the plan has {given}; "
                "grant one rank or choose a strategy that mixes ranks, such as 'glora'."
            )

    @abstractmethod
    def aggregate(
        self,
        state: LayerState | None,
        updates: Sequence[ClientUpdate],
        *,
        rank: int,
        round_index: int,
        options: Mapping[str, OptionValue],
    ) -> AggregationResult:
        """The next state; updates, state and options have been checked."""
        raise NotImplementedError

    def aggregate_many(
        self,
        states: Sequence[LayerState | None],
        updates: Sequence[Sequence[ClientUpdate]],
        *,
        rank: int,
        round_index: int,
        options: Mapping[str, OptionValue],
        batched: bool,  # noqa: ARG002  # the default has no batches
    ) -> list[AggregationResult]:
        """`aggregate` of each module; `batched` allows modules of one layout to be computed together."""
        return [
            self.aggregate(state, of_module, rank=rank, round_index=round_index, options=options)
            for state, of_module in zip(states, updates, strict=True)
        ]

    @abstractmethod
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """(b, a) of that rank for a device with that scale."""
        raise NotImplementedError

    def merge(
        self,
        state: LayerState,  # noqa: ARG002  # the default has nothing to merge
        *,
        joining: bool = False,  # noqa: ARG002
    ) -> MergeInstruction | None:
        """What devices add to the base weight before the next round; None where the base stays as it is.

        A device that took the last round's merge needs only this round's; `joining` is for one that has the plain base.
        """
        return None


def check_uploaded(updates: Sequence[ClientUpdate], wanted: UploadSet, *, name: str) -> None:
    """Raise ContractError unless every update has the factors that the contract wants."""
    for position, update in enumerate(updates):
        for factor, needed, present in (
            ("A", wanted is not UploadSet.B, update.has_a),
            ("B", wanted is not UploadSet.A, update.has_b),
        ):
            if needed and not present:
                raise ContractError(
                    f"Update {position} has no {factor}, which {name!r} needs in this round; "
                    "reject it and check that the device follows its contract."
                )
