"""The strategies by name. To add one: a file here with a class after `base.Strategy`, and its line below."""

from collections.abc import Mapping
from types import MappingProxyType

from glora_server.aggregation.errors import UnknownStrategyError
from glora_server.aggregation.strategies.base import Strategy
from glora_server.aggregation.strategies.fedex import Fedex
from glora_server.aggregation.strategies.fedit import Fedit
from glora_server.aggregation.strategies.fedrot import Fedrot
from glora_server.aggregation.strategies.fedsa import Fedsa
from glora_server.aggregation.strategies.fedsvd import Fedsvd
from glora_server.aggregation.strategies.ffa import Ffa
from glora_server.aggregation.strategies.flexlora import Flexlora
from glora_server.aggregation.strategies.flora import Flora
from glora_server.aggregation.strategies.florist import Florist
from glora_server.aggregation.strategies.glora import Glora
from glora_server.aggregation.strategies.hetlora import Hetlora
from glora_server.aggregation.strategies.lora_fair import LoraFair
from glora_server.aggregation.strategies.raflora import Raflora
from glora_server.aggregation.strategies.rolora import Rolora

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        strategy.name: strategy
        for strategy in (
            Glora(),
            Fedit(),
            Fedrot(),
            Ffa(),
            Rolora(),
            Fedsa(),
            Flora(),
            Flexlora(),
            Fedex(),
            Hetlora(),
            LoraFair(),
            Raflora(),
            Florist(),
            Fedsvd(),
        )
    }
)


def find_strategy(name: str) -> Strategy:
    """The strategy of that name. Raises UnknownStrategyError, naming the ones there are."""
    try:
        return STRATEGIES[name]
    except KeyError as missing:
        raise UnknownStrategyError(
            f"There is no strategy {name!r}; choose one of {', '.join(sorted(STRATEGIES))}."
        ) from missing
