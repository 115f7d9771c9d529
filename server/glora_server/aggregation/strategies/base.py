"""What a strategy is. A new one is a file beside this one and a line in `STRATEGIES`."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from glora_server.aggregation.diagnostics import Diagnostics
from glora_server.aggregation.errors import EmptyUpdatesError, MixedRanksError, RankError
from glora_server.aggregation.factors import ClientUpdate
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey
from glora_server.aggregation.strategies.options import Option, OptionValue


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
    change between rounds, so optimizer state must not be carried over.
    """

    train: TrainMask = TrainMask.BOTH
    init: InitSource = InitSource.READOUT
    upload: UploadSet = UploadSet.BOTH
    needs_sent: bool = False
    reset_optimizer: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """What holds for a strategy's result.

    `gauge_invariant`: unchanged by (B_iQ_i, Q_i⁻¹A_i). `exact`: equals the mean of the ΔW_i before truncation to
    rank R.
    `mixed_ranks`: devices of one round may have different ranks.
    """

    gauge_invariant: bool
    exact: bool
    mixed_ranks: bool


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

    def check_plan(self, ranks: Sequence[int]) -> None:
        """Raise RankError or MixedRanksError when devices of these ranks cannot take part in one run."""
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

    @abstractmethod
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """(b, a) of that rank for a device with that scale."""
        raise NotImplementedError
