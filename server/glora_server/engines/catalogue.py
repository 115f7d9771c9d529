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
    TrainMask,
    UploadSet,
    check_options,
    find_strategy,
)
from glora_server.aggregation.strategies.options import ChoiceOption, NumberOption, Option, RanksOption
from glora_server.coordinator.ports import Frozen, OptionInfo, StrategyChoice, StrategyInfo
from glora_wire.errors import GloraError, Reason, Refusal

_INIT: Final[Mapping[InitSource, str]] = {
    InitSource.READOUT: "readout",
    InitSource.FRESH: "fresh",
    # Factors that are common to all devices are delivered, and the train mask keeps A as it is.
    InitSource.COMMON_A: "readout",
}
_ROUNDS_THAT_DIFFER: Final = 2
"""Contracts alternate between even and odd rounds at most."""
_REASONS: Final[Mapping[str, Reason]] = {
    "UNKNOWN_STRATEGY": Reason.STRATEGY_UNKNOWN,
    "BAD_OPTION": Reason.STRATEGY_OPTIONS,
}
"""From the aggregation's reasons to the wire's; all else that a plan can get wrong lies in the run's description."""


def strategies() -> tuple[StrategyInfo, ...]:
    """Every strategy with its default options, by name."""
    return tuple(_info(STRATEGIES[name], check_options(name, {})) for name in sorted(STRATEGIES))


def describe(choice: StrategyChoice, *, round_index: int = 0) -> StrategyInfo:
    """The strategy with these options in that round; raises GloraError STRATEGY_UNKNOWN or STRATEGY_OPTIONS."""
    try:
        options = check_options(choice.name, choice.options)
        return _info(find_strategy(choice.name), options, round_index=round_index)
    except AggregationError as error:
        raise _refused(error) from error


def contract(choice: StrategyChoice, *, round_index: int) -> ClientContract:
    """What devices must do in that round; raises GloraError STRATEGY_UNKNOWN or STRATEGY_OPTIONS."""
    try:
        options = check_options(choice.name, choice.options)
        return find_strategy(choice.name).contract(options, round_index=round_index)
    except AggregationError as error:
        raise _refused(error) from error


def check_strategy(choice: StrategyChoice, *, min_rank: int, max_rank: int) -> Refusal | None:
    """Why the strategy cannot serve a run with these options and ranks; None when it can."""
    try:
        options = check_options(choice.name, choice.options)
        strategy = find_strategy(choice.name)
        if min_rank < max_rank and not strategy.properties.mixed_ranks:
            return Refusal(
                reason=Reason.SPEC_INVALID,
                message=f"Strategy {choice.name} needs one rank for all devices; set policy.min_rank = {max_rank}, "
                "which is lora.max_rank, or choose a strategy that mixes ranks, such as glora.",
            )
        strategy.check_plan((min_rank, max_rank), options)
        for index in range(_ROUNDS_THAT_DIFFER):
            missing = _not_served(choice.name, strategy.contract(options, round_index=index))
            if missing is not None:
                return Refusal(reason=Reason.STRATEGY_OPTIONS, message=missing)
    except AggregationError as error:
        return _refused(error).as_refusal()
    return None


def _not_served(name: str, contract: ClientContract) -> str | None:
    """What the contract asks for that the service does not do yet, as a sentence; None when it does all of it."""
    if contract.merges:
        return (
            f"Strategy {name} has devices merge updates into their base weights, which they are not told yet; "
            "choose another one, such as flexlora, or use it through glora_server.aggregation."
        )
    if contract.keeps_b:
        return (
            f"Strategy {name} leaves each device a B of its own, so that a run would have no model to evaluate or "
            "export; choose another one, such as ffa, or use it through glora_server.aggregation."
        )
    if contract.train is TrainMask.CORE or contract.upload is UploadSet.CORE:
        return (
            f"Strategy {name} trains a core between frozen factors, which devices cannot do yet; "
            "choose another one, such as glora, or use it through glora_server.aggregation."
        )
    return None


def _info(strategy: Strategy, options: Mapping[str, OptionValue], *, round_index: int = 0) -> StrategyInfo:
    wanted = strategy.contract(options, round_index=round_index)
    frozen = _frozen(wanted)
    return StrategyInfo(
        name=strategy.name,
        summary=strategy.summary,
        train_mask=wanted.train.value,
        init="fresh" if frozen == "state" else _INIT.get(wanted.init, "readout"),
        upload_set=wanted.upload.value,
        mixed_ranks=strategy.properties.mixed_ranks,
        frozen=frozen,
        needs_sent=wanted.needs_sent,
        reset_optimizer=wanted.reset_optimizer,
        may_shrink=wanted.may_shrink,
        options=tuple(map(_option, strategy.options)),
        not_served=_not_served(strategy.name, wanted) or "",
    )


def _option(option: Option) -> OptionInfo:
    """The option in plain words: members of the aggregation's enums would bring torch into the server's process."""
    match option:
        case ChoiceOption():
            return OptionInfo(
                name=option.name,
                summary=option.summary,
                kind="choice",
                default=str(option.default),
                choices=tuple(map(str, option.choices)),
            )
        case NumberOption():
            return OptionInfo(
                name=option.name, summary=option.summary, kind="number", default=option.default, whole=option.whole
            )
        case RanksOption():
            return OptionInfo(name=option.name, summary=option.summary, kind="ranks", default=option.default)


def _frozen(wanted: ClientContract) -> Frozen:
    """What lies under the trained adapter: a change that is measured from what was sent leaves its tail only."""
    if wanted.init is not InitSource.FROZEN_STATE:
        return ""
    return "tail" if wanted.needs_sent else "state"


def _refused(error: AggregationError) -> GloraError:
    return GloraError(_REASONS.get(error.reason, Reason.SPEC_INVALID), str(error))
