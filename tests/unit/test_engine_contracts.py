"""A run is refused at its creation when its strategy asks of devices what the service does not do yet."""

import pytest

from glora_server.aggregation import STRATEGIES
from glora_server.coordinator.ports import StrategyChoice
from glora_server.engines import catalogue
from glora_wire.errors import Reason

NOT_SERVED = {"flora", "fedex", "fedsa"}
SERVED = set(STRATEGIES) - NOT_SERVED


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_contracts_that_are_not_served_are_refused_before_the_first_round(name: str) -> None:
    verdict = catalogue.check_strategy(StrategyChoice(name=name, options={}), max_rank=8, mixed_ranks=False)
    if name in SERVED:
        assert verdict is None
    else:
        assert verdict is not None
        assert verdict.reason is Reason.STRATEGY_OPTIONS
        assert name in verdict.message


@pytest.mark.parametrize("name", sorted(SERVED))
def test_mixed_ranks_are_refused_before_the_first_round_where_the_method_has_none(name: str) -> None:
    verdict = catalogue.check_strategy(StrategyChoice(name=name, options={}), max_rank=8, mixed_ranks=True)
    assert (verdict is None) is STRATEGIES[name].properties.mixed_ranks


def test_options_that_do_not_go_together_are_refused_before_the_first_round() -> None:
    choice = StrategyChoice(name="glora", options={"subspace": "mean", "anchor": 0.5})
    verdict = catalogue.check_strategy(choice, max_rank=8, mixed_ranks=True)
    assert verdict is not None
    assert verdict.reason is Reason.STRATEGY_OPTIONS
    assert "anchor" in verdict.message


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_form_learns_every_option_and_whether_the_strategy_serves(name: str) -> None:
    info = next(info for info in catalogue.strategies() if info.name == name)
    declared = {option.name: option.default for option in STRATEGIES[name].options}
    assert {option.name: option.default for option in info.options} == declared
    assert all(option.choices for option in info.options if option.kind == "choice")
    words = [word for option in info.options for word in (option.default, *option.choices)]
    assert {type(word) for word in words} <= {str, float, type(None)}, "an enum's member would carry its module along"
    assert (info.not_served == "") is (name in SERVED)
