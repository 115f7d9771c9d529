"""What can be chosen as a strategy and what it wants of devices; asked of the worker, because only that knows."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

from glora_server.coordinator.numerics import retrying
from glora_server.coordinator.ports import NumericsEngine, StrategyChoice, StrategyInfo
from glora_server.coordinator.run_spec import RunSpec

_REMEMBERED: Final = 1024
"""Contracts that are kept in memory."""

_Key = tuple[str, str, int]


class Catalogue:
    """The strategies, and the contracts of the runs that go on; each is asked for once.

    A worker that folds for minutes answers nothing else meanwhile, so no round waits for what another one asks.
    """

    def __init__(self, numerics: NumericsEngine) -> None:
        self._numerics = numerics
        self._lock = asyncio.Lock()
        self._known: tuple[StrategyInfo, ...] = ()
        self._contracts: dict[_Key, StrategyInfo] = {}

    async def all(self) -> tuple[StrategyInfo, ...]:
        """Every strategy with its default options."""
        async with self._lock:
            if not self._known:
                self._known = await retrying(self._numerics.strategies)
        return self._known

    async def of_round(self, spec: RunSpec, round_number: int) -> StrategyInfo:
        """What the run's strategy wants in the round of that number, from 1 (0, the start, counts as 1).

        Raises STRATEGY_UNKNOWN or STRATEGY_OPTIONS.
        """
        # Contracts differ between even and odd rounds at most (see the port).
        index = max(0, round_number - 1) % 2
        key = (spec.strategy.name, repr(sorted(spec.strategy.options.items())), index)
        known = self._contracts.get(key)
        if known is None:
            choice = StrategyChoice(name=spec.strategy.name, options=spec.strategy.options)
            known = await retrying(partial(self._numerics.describe, choice, round_index=index))
            while len(self._contracts) >= _REMEMBERED:
                del self._contracts[next(iter(self._contracts))]
            self._contracts[key] = known
        return known
