"""What can be chosen as a strategy; asked of the worker once, because only the worker knows."""

from __future__ import annotations

import asyncio

from glora_server.coordinator.numerics import retrying
from glora_server.coordinator.ports import NumericsEngine, StrategyInfo
from glora_wire.errors import GloraError, Reason


class Catalogue:
    """The strategies, by name."""

    def __init__(self, numerics: NumericsEngine) -> None:
        self._numerics = numerics
        self._lock = asyncio.Lock()
        self._known: tuple[StrategyInfo, ...] = ()

    async def all(self) -> tuple[StrategyInfo, ...]:
        """Every strategy."""
        async with self._lock:
            if not self._known:
                self._known = await retrying(self._numerics.strategies)
        return self._known

    async def get(self, name: str) -> StrategyInfo:
        """The strategy; raises STRATEGY_UNKNOWN."""
        for info in await self.all():
            if info.name == name:
                return info
        raise GloraError(Reason.STRATEGY_UNKNOWN, f"There is no strategy {name!r}.", strategy=name)
