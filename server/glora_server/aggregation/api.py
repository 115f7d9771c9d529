"""The two verbs of the package: fold a round's updates into a state, hand a state out at a rank."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from glora_server.aggregation.errors import DeviceError, RankError, StateError
from glora_server.aggregation.factors import ClientUpdate, check_updates, is_rank
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey, check_state
from glora_server.aggregation.strategies import find_strategy
from glora_server.aggregation.strategies.base import AggregationResult, Strategy, check_uploaded
from glora_server.aggregation.strategies.options import OptionValue, resolve_options


def aggregate(
    strategy: str | Strategy,
    state: LayerState | None,
    updates: Sequence[ClientUpdate],
    *,
    rank: int,
    round_index: int = 0,
    **options: OptionValue,
) -> AggregationResult:
    """The next state of one module and its diagnostics; `state` None is the start.

    rank is the server rank R. Options are those that the strategy declares. Small cores are float64; the new state
    is float32 for float32, bfloat16 and float16 updates, float64 for float64, on the device of the updates. The
    same inputs give the same bits on one device; the order of clients matters only to rounding. Raises an
    AggregationError that names what is wrong.
    """
    return aggregate_with_options(strategy, state, updates, rank=rank, options=options, round_index=round_index)


def aggregate_many(
    strategy: str | Strategy,
    states: Sequence[LayerState | None],
    updates: Sequence[Sequence[ClientUpdate]],
    *,
    rank: int,
    options: Mapping[str, OptionValue],
    round_index: int = 0,
    batched: bool | None = None,
) -> tuple[AggregationResult, ...]:
    """`aggregate` of several modules: a state and a round's updates for each, all on one device.

    `batched`: whether a strategy may compute modules of one layout together, by default on a CUDA device only, where a
    loop over small matrices costs more than the arithmetic; a CPU is faster with one module at a time. The results
    agree with those of single calls to rounding. Batches take about three times the memory of their float32 factors
    beyond the inputs: give no more modules than that leaves room for. Raises AggregationError for the first module
    that is wrong, before anything is computed.
    """
    chosen = find_strategy(strategy) if isinstance(strategy, str) else strategy
    resolved = resolve_options(chosen.name, chosen.options, options)
    for state, of_module in zip(states, updates, strict=True):
        _check(chosen, state, of_module, rank=rank, round_index=round_index, options=resolved)
    if not updates:
        return ()
    together = updates[0][0].b.is_cuda if batched is None else batched
    results = chosen.aggregate_many(
        states, updates, rank=rank, round_index=round_index, options=resolved, batched=together
    )
    return tuple(results)


def aggregate_with_options(
    strategy: str | Strategy,
    state: LayerState | None,
    updates: Sequence[ClientUpdate],
    *,
    rank: int,
    options: Mapping[str, OptionValue],
    round_index: int = 0,
) -> AggregationResult:
    """`aggregate` for callers that hold a run's options as a mapping."""
    chosen = find_strategy(strategy) if isinstance(strategy, str) else strategy
    resolved = resolve_options(chosen.name, chosen.options, options)
    _check(chosen, state, updates, rank=rank, round_index=round_index, options=resolved)
    return chosen.aggregate(state, updates, rank=rank, round_index=round_index, options=resolved)


def readout(
    state: LayerState,
    rank: int,
    scale: float,
    *,
    seed: int = 0,
    module: str = "",
    version: int = 0,
    style: ReadoutStyle = "balanced",
) -> tuple[Tensor, Tensor]:
    """(b, a), d×rank and rank×n in the state's dtype: what its strategy hands to a device of that rank and scale.

    For glora scale·b·a is the best rank-`rank` part of the state. Rows of directions that the state does not have
    are made from (seed, module, version) and their number, so the rows of a smaller rank are the first ones of a
    larger rank.
    """
    key = RefillKey(seed=seed, module=module, version=version)
    return find_strategy(state.strategy).readout(state, rank, scale, key=key, style=style)


def check_options(strategy: str, options: Mapping[str, OptionValue]) -> Mapping[str, OptionValue]:
    """All options of the strategy with their values, defaults filled in; for the moment when a run is created."""
    chosen = find_strategy(strategy)
    resolved = resolve_options(strategy, chosen.options, options)
    chosen.contract(resolved)  # raises when options do not go together
    return resolved


def _check(
    strategy: Strategy,
    state: LayerState | None,
    updates: Sequence[ClientUpdate],
    *,
    rank: int,
    round_index: int,
    options: Mapping[str, OptionValue],
) -> None:
    if not is_rank(rank):
        raise RankError(f"The server rank is {rank!r}; it must be a whole number from 1.")
    check_updates(updates)
    check_uploaded(updates, strategy.contract(options, round_index=round_index).upload, name=strategy.name)
    if state is not None:
        _check_fits(state, strategy, updates[0])


def _check_fits(state: LayerState, strategy: Strategy, update: ClientUpdate) -> None:
    check_state(state, out_features=update.b.shape[0], in_features=update.a.shape[1])
    if state.u.device != update.b.device:
        raise DeviceError(
            f"The state is on {state.u.device} and the updates on {update.b.device}; move both to one device first."
        )
    if state.strategy != strategy.name:
        raise StateError(
            f"The state was made by {state.strategy!r} and is to be continued by {strategy.name!r}; start a new run, "
            "or import the state with canonical_state."
        )
