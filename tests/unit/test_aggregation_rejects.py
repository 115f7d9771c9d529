"""Input that aggregation refuses, each with its own reason and a sentence."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from glora_server.aggregation import (
    ClientUpdate,
    aggregate,
    aggregate_with_options,
    canonical_state,
    check_options,
    dense_average,
    empty_state,
)
from glora_server.aggregation import errors as e


def update(
    d: int = 6, n: int = 5, r: int = 2, *, weight: float = 1.0, dtype: torch.dtype = torch.float32
) -> ClientUpdate:
    g = torch.Generator().manual_seed(1)
    return ClientUpdate(torch.randn(d, r, generator=g).to(dtype), torch.randn(r, n, generator=g).to(dtype), 2.0, weight)


def broken(factor: str, value: float) -> ClientUpdate:
    one = update()
    tensor = (one.b if factor == "b" else one.a).clone()
    tensor[1, 1] = value
    return replace(one, b=tensor) if factor == "b" else replace(one, a=tensor)


def elsewhere() -> ClientUpdate:
    return replace(update(), b=update().b.to("meta"), a=update().a.to("meta"))


def sent_one_b(*updates: ClientUpdate) -> list[ClientUpdate]:
    """Updates whose devices were sent the same tensor B, and each its own A."""
    return [replace(update(), sent=(updates[0].b, one.a)) for one in updates]


BAD: list[tuple[str, Callable[[], list[ClientUpdate]], type[e.AggregationError]]] = [
    ("nothing", list, e.EmptyUpdatesError),
    ("nan in b", lambda: [update(), broken("b", math.nan)], e.NonFiniteError),
    ("inf in a", lambda: [update(), broken("a", math.inf)], e.NonFiniteError),
    ("ranks of b and a differ", lambda: [replace(update(), a=torch.ones(3, 5))], e.ShapeError),
    ("a vector", lambda: [replace(update(), b=torch.ones(6))], e.ShapeError),
    ("rank zero", lambda: [update(r=0)], e.ShapeError),
    ("other module", lambda: [update(), update(d=7)], e.ShapeError),
    ("negative weight", lambda: [update(), update(weight=-1.0)], e.WeightError),
    ("nan weight", lambda: [update(), update(weight=math.nan)], e.WeightError),
    ("all weights zero", lambda: [update(weight=0.0)], e.WeightError),
    ("mixed dtypes", lambda: [update(), update(dtype=torch.float64)], e.DtypeError),
    ("b and a of two dtypes", lambda: [replace(update(), a=update().a.double())], e.DtypeError),
    ("integers", lambda: [update(dtype=torch.int64)], e.DtypeError),
    ("two devices", lambda: [update(), elsewhere()], e.DeviceError),
    ("b and a on two devices", lambda: [replace(update(), a=elsewhere().a)], e.DeviceError),
    ("sent on another device", lambda: [replace(update(), sent=(elsewhere().b, elsewhere().a))], e.DeviceError),
    ("zero scale", lambda: [replace(update(), scale=0.0)], e.ScaleError),
    ("bad scale of sent", lambda: [replace(update(), sent_scale=-1.0)], e.ScaleError),
    ("sent for another module", lambda: [replace(update(), sent=(torch.ones(4, 2), torch.ones(2, 5)))], e.ShapeError),
    ("nan in one A of two that were sent one B", lambda: sent_one_b(broken("a", math.nan), update()), e.NonFiniteError),
    ("nan in sent", lambda: [replace(update(), sent=(broken("b", math.nan).b, update().a))], e.NonFiniteError),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
@pytest.mark.parametrize("strategy", ["glora", "fedit"])
def test_bad_updates_are_refused_with_their_own_error(
    strategy: str, make: Callable[[], list[ClientUpdate]], error: type[e.AggregationError]
) -> None:
    options = {"rule": "replace"} if strategy == "glora" else {}
    with pytest.raises(error) as caught:
        aggregate_with_options(strategy, None, make(), rank=4, options=options)
    assert type(caught.value) is error
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("rule", ["delta", "frozen_tail"])
def test_delta_rules_need_what_was_sent_even_in_the_first_round(rule: str) -> None:
    with pytest.raises(e.MissingSentError, match="update 0"):
        aggregate("glora", None, [update()], rank=4, rule=rule)


def test_the_default_rule_is_delta() -> None:
    with pytest.raises(e.MissingSentError):
        aggregate("glora", None, [update()], rank=4)


def test_state_must_fit_module_and_strategy() -> None:
    with pytest.raises(e.ShapeError, match="another module"):
        aggregate("glora", empty_state(7, 5), [update()], rank=4, rule="replace")
    with pytest.raises(e.StateError, match="fedit"):
        aggregate("glora", empty_state(6, 5, strategy="fedit"), [update()], rank=4, rule="replace")


def test_rank_strategy_and_options_are_checked() -> None:
    with pytest.raises(e.RankError):
        aggregate("glora", None, [update()], rank=0, rule="replace")
    with pytest.raises(e.UnknownStrategyError, match="fedex, fedit, fedrot"):
        aggregate("nosuch", None, [update()], rank=4)
    with pytest.raises(e.OptionError, match="subspace, rule, eta"):
        aggregate("glora", None, [update()], rank=4, ruel="replace")
    with pytest.raises(e.OptionError, match="no options"):
        aggregate("fedit", None, [update()], rank=4, rule="replace")


@pytest.mark.parametrize(
    "options",
    [{"rule": "other"}, {"rule": 3}, {"eta": 0.0}, {"eta": True}, {"eta": "1"}, {"eta": math.inf}, {"rank_tol": 1.5},
     {"ridge_tau": None}, {"accuracy": "rough"}, {"subspace": "svd"}],
)  # fmt: skip
def test_option_values_are_checked(options: dict[str, str | float | None]) -> None:
    with pytest.raises(e.OptionError, match=next(iter(options))):
        check_options("glora", options)


def test_check_options_fills_defaults() -> None:
    assert check_options("glora", {"eta": 2}) == {
        "subspace": "projector",
        "rule": "delta",
        "eta": 2.0,
        "accuracy": "exact",
        "rank_tol": None,
        "ridge_tau": 0.1,
        "votes": "equal",
        "anchor": None,
        "energy": None,
    }


def test_every_error_has_its_own_reason() -> None:
    family = e.AggregationError.__subclasses__()
    reasons = [kind.reason for kind in family]
    assert len(set(reasons)) == len(reasons) > 10
    assert all(reason == reason.upper() and kind.__doc__ for reason, kind in zip(reasons, family, strict=True))


def test_a_canonical_state_needs_factors() -> None:
    with pytest.raises(e.ShapeError, match="The state"):
        canonical_state(torch.ones(3, 2), torch.ones(3, 2), rank=2)


def test_dense_tensors_are_averaged_in_float64_with_normalised_weights() -> None:
    tensors = [torch.full((2, 3), value, dtype=torch.bfloat16) for value in (1.0, 1.0078125)]
    mean = dense_average(tensors, [1, 3])
    assert mean.dtype == torch.bfloat16
    assert torch.equal(mean, torch.full((2, 3), 1.0 + 0.75 * 0.0078125).to(torch.bfloat16))


def test_many_float32_terms_do_not_lose_digits() -> None:
    g = torch.Generator().manual_seed(3)
    tensors = [1000 + torch.randn(50, generator=g) for _ in range(300)]
    expected = torch.stack([t.double() for t in tensors]).mean(0).float()
    one_ulp = 6.2e-5
    assert torch.allclose(dense_average(tensors, [1.0] * 300), expected, rtol=0, atol=one_ulp)


def test_huge_weights_do_not_overflow() -> None:
    assert torch.equal(dense_average([torch.zeros(2), torch.ones(2)], [1.7e308, 1.7e308]), torch.full((2,), 0.5))


@pytest.mark.parametrize(
    ("tensors", "weights", "error"),
    [
        ([], [], e.EmptyUpdatesError),
        ([torch.ones(2)], [1.0, 2.0], e.ShapeError),
        ([torch.ones(2), torch.ones(3)], [1.0, 1.0], e.ShapeError),
        ([torch.ones(2), torch.ones(2).double()], [1.0, 1.0], e.DtypeError),
        ([torch.ones(2, dtype=torch.int64)], [1.0], e.DtypeError),
        ([torch.ones(2), torch.ones(2, device="meta")], [1.0, 1.0], e.DeviceError),
        ([torch.tensor([1.0, math.nan])], [1.0], e.NonFiniteError),
        ([torch.ones(2)], [0.0], e.WeightError),
    ],
)
def test_bad_dense_tensors_are_refused(
    tensors: list[torch.Tensor], weights: list[float], error: type[e.AggregationError]
) -> None:
    with pytest.raises(error):
        dense_average(tensors, weights)
