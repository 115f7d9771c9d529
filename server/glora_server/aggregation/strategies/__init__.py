"""The strategies by name. To add one: a file here with a class after `base.Strategy`, and its line below."""

from collections.abc import Mapping
from types import MappingProxyType

from glora_server.aggregation.errors import UnknownStrategyError
from glora_server.aggregation.strategies.base import Strategy
from glora_server.aggregation.strategies.fedit import Fedit
from glora_server.aggregation.strategies.glora import Glora

STRATEGIES: Mapping[str, Strategy] = MappingProxyType({strategy.name: strategy for strategy in (Glora(), Fedit())})


def find_strategy(name: str) -> Strategy:
    """The strategy of that name. Raises UnknownStrategyError, naming the ones there are."""
    try:
        return STRATEGIES[name]
    except KeyError as missing:
        raise UnknownStrategyError(
            f"There is no strategy {name!r}; choose one of {', '.join(sorted(STRATEGIES))}."
        ) from missing
