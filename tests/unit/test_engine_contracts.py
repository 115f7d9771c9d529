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
    verdict = catalogue.check_strategy(StrategyChoice(name=name, options={}), min_rank=8, max_rank=8)
    if name in SERVED:
        assert verdict is None
    else:
        assert verdict is not None
        assert verdict.reason is Reason.STRATEGY_OPTIONS
        assert name in verdict.message


@pytest.mark.parametrize("name", sorted(SERVED))
def test_mixed_ranks_are_refused_before_the_first_round_where_the_method_has_none(name: str) -> None:
    verdict = catalogue.check_strategy(StrategyChoice(name=name, options={}), min_rank=2, max_rank=8)
    assert (verdict is None) is STRATEGIES[name].properties.mixed_ranks


def test_options_that_do_not_go_together_are_refused_before_the_first_round() -> None:
    choice = StrategyChoice(name="glora", options={"subspace": "mean", "anchor": 0.5})
    verdict = catalogue.check_strategy(choice, min_rank=2, max_rank=8)
    assert verdict is not None
    assert verdict.reason is Reason.STRATEGY_OPTIONS
    assert "anchor" in verdict.message


@pytest.mark.parametrize(
    ("levels", "missing"), [("4", "rank 2"), ("2", "columns 3 to 8"), ("4,8", "rank 2"), ("2,4,6", "columns 7 to 8")]
)
def test_slices_that_leave_something_out_are_refused_before_the_first_round(levels: str, missing: str) -> None:
    """A device of rank 2 would have no slice, or what large ones learn beyond the last one would be thrown away."""
    choice = StrategyChoice(name="raflora", options={"levels": levels})
    verdict = catalogue.check_strategy(choice, min_rank=2, max_rank=8)
    assert verdict is not None
    assert verdict.reason is Reason.STRATEGY_OPTIONS
    assert missing in verdict.message


@pytest.mark.parametrize("levels", ["2,4,8", "1,8", "2, 3, 16"])
def test_slices_that_reach_all_ranks_are_taken(levels: str) -> None:
    choice = StrategyChoice(name="raflora", options={"levels": levels})
    assert catalogue.check_strategy(choice, min_rank=2, max_rank=8) is None


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_form_learns_every_option_and_whether_the_strategy_serves(name: str) -> None:
    info = next(info for info in catalogue.strategies() if info.name == name)
    declared = {option.name: option.default for option in STRATEGIES[name].options}
    assert {option.name: option.default for option in info.options} == declared
    assert all(option.choices for option in info.options if option.kind == "choice")
    words = [word for option in info.options for word in (option.default, *option.choices)]
    assert {type(word) for word in words} <= {str, float, type(None)}, "an enum's member would carry its module along"
    assert (info.not_served == "") is (name in SERVED)
