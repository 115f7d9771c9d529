"""The engine for numerics: jobs, results, and who runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from glora_server.coordinator.model import (
    StatePart,
)
from glora_server.rounds.ids import DeviceId
from glora_wire.errors import Refusal
from glora_wire.payload import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyChoice:
    """A strategy by name with its options, as numbers, strings and booleans."""

    name: str
    options: Mapping[str, str | float | int | bool]


Frozen = Literal["", "tail", "state"]

ReadoutVariant = Literal["train", "fresh", "tail", "state"]
"""What is cut from a state. "train": what the strategy hands out at a rank. "fresh": what it hands out of an empty
state. "tail": the directions beyond those of a smaller adapter. "state": the directions from the first one on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionInfo:
    """An option of a strategy, so that a form can ask for it; the strategy checks what is given."""

    name: str
    summary: str
    kind: Literal["choice", "number", "ranks"]
    """One of `choices`; a number; rising ranks, written "4, 8, 16"."""
    default: str | float | None
    """None: the strategy chooses."""
    choices: tuple[str, ...] = ()
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyInfo:
    """What a strategy wants of devices in a round (names as in types.proto, lower case) and what it promises.

    `frozen`: what of the state devices load beside the adapter that they train: nothing, the directions beyond its
    rank, or all of it. `needs_sent`: aggregation asks for the adapter that each device was sent. `may_shrink`: an
    update may have a smaller rank than was granted. `not_served`: why no run can have it, as a sentence; empty: it can.
    """

    name: str
    summary: str
    train_mask: str
    init: str
    upload_set: str
    mixed_ranks: bool
    frozen: Frozen = ""
    needs_sent: bool = False
    reset_optimizer: bool = True
    may_shrink: bool = False
    options: tuple[OptionInfo, ...] = ()
    not_served: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialiseJob:
    """Make the parts of version 0: empty module states, dense tensors drawn from (seed, name)."""

    strategy: StrategyChoice
    modules: tuple[tuple[str, int, int], ...]
    """(name, out_features, in_features)"""
    dense: tuple[tuple[str, tuple[int, ...], float], ...]
    """(name, shape, standard deviation; 0 = zeros)"""
    rank: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderJob:
    """Write the tensors of some parts into an adapter file of `rank` that `path` already holds the header of."""

    path: Path
    """A file of the final size; its safetensors header says where each tensor goes."""
    strategy: StrategyChoice
    parts: tuple[StatePart, ...]
    rank: int
    scale: float
    seed: int
    version_number: int
    style: str
    """"balanced" or "a_orthonormal"."""
    variant: ReadoutVariant = "train"
    first: int = 0
    """How many leading directions of the state a "tail" leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckJob:
    """Judge the numbers of an update whose header was checked: finite, and not absurdly large."""

    path: Path
    scales: Mapping[str, float]
    """s of every module."""
    expected: tuple[TensorSpec, ...]
    max_norm: float
    """Largest Frobenius norm of the whole ΔW; 0 = what float32 can hold."""
    sent_path: Path | None = None
    """The adapter file that the device started from: it has the factor that the device does not send."""
    digest: str | None = None
    """Of the content; an engine with a GPU may keep the numbers of an update that it finds good until it is folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The verdict; `norm` is ‖ΔW‖_F over all modules."""

    refusal: Refusal | None
    norm: float | None
    module_norms: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRef:
    """One accepted update, by file."""

    device_id: DeviceId
    path: Path
    scales: Mapping[str, float]
    """s of every module."""
    weight: float
    sent_path: Path | None
    """The adapter file that the device started from; its scale is `sent_scale` everywhere."""
    sent_scale: float
    digest: str | None = None
    """Of the content, as in the CheckJob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateJob:
    """Fold the updates of one shard of parts; parts share nothing."""

    strategy: StrategyChoice
    parts: tuple[StatePart, ...]
    """The previous state. A dense part without tensors was never aggregated before."""
    updates: tuple[UpdateRef, ...]
    rank: int
    round_index: int
    wire_dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatedPart:
    """The new state of one part and what was measured (JSON object; empty for dense parts)."""

    part: StatePart
    diagnostics_json: str


class NumericsEngine(Protocol):
    """Runs the numerics outside of the event loop, in a worker that may die: then WorkerLostError, and try again."""

    async def initialise(self, job: InitialiseJob) -> tuple[StatePart, ...]:
        """The parts of version 0."""
        ...

    async def render(self, job: RenderJob) -> None:
        """Write tensors into the file."""
        ...

    async def check(self, job: CheckJob) -> CheckResult:
        """Judge an update."""
        ...

    async def aggregate(self, job: AggregateJob) -> tuple[AggregatedPart, ...]:
        """The new parts, in the order of the job; raises GloraError for input that can not be aggregated."""
        ...

    async def strategies(self) -> tuple[StrategyInfo, ...]:
        """What can be chosen."""
        ...

    async def describe(self, choice: StrategyChoice, *, round_index: int) -> StrategyInfo:
        """What the strategy wants with these options in that round, from 0; raises STRATEGY_UNKNOWN or _OPTIONS.

        It differs between even and odd rounds at most.
        """
        ...

    async def check_strategy(self, choice: StrategyChoice, *, min_rank: int, max_rank: int) -> Refusal | None:
        """Why the strategy cannot serve a run with these options and devices of these ranks; None when it can."""
        ...


class WorkerLostError(Exception):
    """The worker process ended; the job can be given again."""
