"""What the server and the worker process say to each other: pickled records over a private pipe, one answer a request.

The worker greets first. Nothing here imports torch, since the server reads these records too.
"""

from __future__ import annotations

from dataclasses import dataclass

from glora_server.coordinator.model import StatePart
from glora_server.coordinator.ports import (
    AggregatedPart,
    AggregateJob,
    CheckJob,
    CheckResult,
    InitialiseJob,
    RenderJob,
    StrategyChoice,
    StrategyInfo,
)
from glora_wire.errors import GloraError, Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class ListStrategies:
    """Ask for every strategy, as it is with its default options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribeStrategy:
    """Ask what a strategy wants of devices with these options in that round, from 0."""

    choice: StrategyChoice
    round_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckStrategy:
    """Ask whether a strategy can serve a run."""

    choice: StrategyChoice
    min_rank: int
    max_rank: int


Job = InitialiseJob | RenderJob | CheckJob | AggregateJob | ListStrategies | DescribeStrategy | CheckStrategy
Result = (
    tuple[StatePart, ...]
    | tuple[AggregatedPart, ...]
    | tuple[StrategyInfo, ...]
    | StrategyInfo
    | CheckResult
    | Refusal
    | None
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The worker is ready."""

    pid: int
    device: str
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outcome of one job; seconds of work, and the largest resident size of the worker so far."""

    outcome: Result | GloraError
    seconds: float
    peak_bytes: int
