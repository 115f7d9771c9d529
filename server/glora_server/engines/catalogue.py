"""The strategies as the coordinator sees them: what devices must do, and whether a run can use one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from glora_server.aggregation import (
    STRATEGIES,
    AggregationError,
    ClientContract,
    InitSource,
    OptionValue,
    Strategy,
    UploadSet,
    check_options,
    find_strategy,
)
from glora_server.coordinator.ports import StrategyChoice, StrategyInfo
from glora_wire.errors import GloraError, Reason, Refusal

_INIT: Final[Mapping[InitSource, str]] = {
    InitSource.READOUT: "readout",
    InitSource.FRESH: "fresh",
    # Factors that are common to all devices are delivered, and the train mask keeps A as it is.
    InitSource.COMMON_A: "readout",
    # B = 0 and a delivered A, on top of a frozen adapter.
    InitSource.FROZEN_STATE: "fresh",
}
_REASONS: Final[Mapping[str, Reason]] = {
    "UNKNOWN_STRATEGY": Reason.STRATEGY_UNKNOWN,
    "BAD_OPTION": Reason.STRATEGY_OPTIONS,
}
"""From the aggregation's reasons to the wire's; all else that a plan can get wrong lies in the run's description."""


def strategies() -> tuple[StrategyInfo, ...]:
    """Every strategy with its default options, by name."""
    return tuple(_info(STRATEGIES[name], check_options(name, {})) for name in sorted(STRATEGIES))


def describe(choice: StrategyChoice) -> StrategyInfo:
    """The strategy with these options; raises GloraError STRATEGY_UNKNOWN or STRATEGY_OPTIONS."""
    try:
        return _info(find_strategy(choice.name), check_options(choice.name, choice.options))
    except AggregationError as error:
        raise _refused(error) from error


def contract(choice: StrategyChoice, *, round_index: int) -> ClientContract:
    """What devices must do in that round; raises GloraError STRATEGY_UNKNOWN or STRATEGY_OPTIONS."""
    try:
        options = check_options(choice.name, choice.options)
        return find_strategy(choice.name).contract(options, round_index=round_index)
    except AggregationError as error:
        raise _refused(error) from error


def check_strategy(choice: StrategyChoice, *, max_rank: int, mixed_ranks: bool) -> Refusal | None:
    """Why the strategy cannot serve a run with these options and ranks; None when it can."""
    try:
        options = check_options(choice.name, choice.options)
        strategy = find_strategy(choice.name)
        strategy.check_plan((1, max_rank) if mixed_ranks else (max_rank,))
        missing = _not_served(choice.name, strategy.contract(options))
        if missing is not None:
            return Refusal(reason=Reason.STRATEGY_OPTIONS, message=missing)
    except AggregationError as error:
        return _refused(error).as_refusal()
    return None


def _not_served(name: str, contract: ClientContract) -> str | None:
    """What the contract asks for that the service does not do yet, as a sentence; None when it does all of it."""
    if contract.init is InitSource.FROZEN_STATE:
        return (
            f"Strategy {name} with these options trains on top of a frozen adapter, which devices are not "
            'handed yet; choose rule = "delta" or "replace".'
        )
    if contract.merges:
        return (
            f"Strategy {name} has devices merge updates into their base weights, which they are not told yet; "
            "choose another one, such as flexlora, or use it through glora_server.aggregation."
        )
    if contract.upload is not UploadSet.BOTH:
        return (
            f"Strategy {name} uploads one factor only, which the service does not take yet; "
            "choose another one, such as glora, or use it through glora_server.aggregation."
        )
    return None


def _info(strategy: Strategy, options: Mapping[str, OptionValue]) -> StrategyInfo:
    wanted = strategy.contract(options)
    return StrategyInfo(
        name=strategy.name,
        summary=strategy.summary,
        train_mask=wanted.train.value,
        init=_INIT[wanted.init],
        upload_set=wanted.upload.value,
        mixed_ranks=strategy.properties.mixed_ranks,
    )


def _refused(error: AggregationError) -> GloraError:
    return GloraError(_REASONS.get(error.reason, Reason.SPEC_INVALID), str(error))
