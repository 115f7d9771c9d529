"""What a round tells of itself beyond its state, against dense matrices: bias, influence, the gap of a small space."""

import pytest
import torch
from strategy_cases import contract_round, fold, model
from strategy_reference import delta_w, mean_update, shares

from glora_server.aggregation import STRATEGIES, ClientUpdate, OptionValue

ALL = sorted(set(STRATEGIES) - {"fedsa"})  # which has no model to be compared
EXACT = [name for name in ALL if STRATEGIES[name].properties.exact and name != "glora"]

WHOLE: dict[str, dict[str, OptionValue]] = {"florist": {"energy": 1.0}}


@pytest.mark.parametrize("name", ALL)
def test_bias_is_what_no_larger_rank_mends(name: str) -> None:
    """With room for everything the whole error is bias; with less, the bias stays as it was."""
    updates, options = contract_round(name), WHOLE.get(name, {})
    mean, wide = mean_update(updates), fold(name, updates, rank=14, options=options)
    error = float((model(wide.state) - mean).norm() / mean.norm())
    if name != "hetlora":  # whose diagnostics compare with the mean of its own weights
        assert wide.diagnostics.truncation_error == pytest.approx(error, abs=1e-9)
    assert wide.diagnostics.aggregation_bias == pytest.approx(wide.diagnostics.truncation_error, abs=1e-9)
    if name in EXACT:
        assert wide.diagnostics.aggregation_bias < 1e-12
    narrow = fold(name, updates, rank=4, options=options).diagnostics
    assert narrow.aggregation_bias == pytest.approx(wide.diagnostics.aggregation_bias, abs=1e-9)
    assert narrow.truncation_error >= narrow.aggregation_bias - 1e-9


@pytest.mark.parametrize("name", ["flexlora", "glora", "fedit"])
def test_influence_is_how_far_the_mean_moves_without_a_device(name: str) -> None:
    updates = contract_round(name, ranks=(4, 4, 4))
    mean, weights = mean_update(updates), shares(updates)
    for i, client in enumerate(fold(name, updates).diagnostics.clients):
        others = sum(w * delta_w(u) for j, (w, u) in enumerate(zip(weights, updates, strict=True)) if j != i)
        without = others / (1.0 - weights[i])
        assert client.influence == pytest.approx(float((mean - without).norm() / mean.norm()), rel=1e-9)


def test_influence_of_a_device_alone_is_one_and_of_an_idle_round_none() -> None:
    (first, second) = contract_round("flexlora", ranks=(4, 4))
    assert fold("flexlora", [first]).diagnostics.clients[0].influence == 1.0
    idle = [ClientUpdate(torch.zeros_like(u.b), u.a, u.scale, 1.0) for u in (first, second)]
    assert [client.influence for client in fold("flexlora", idle).diagnostics.clients] == [0.0, 0.0]


def test_the_gap_of_a_space_that_fits_into_the_rank_is_its_least_eigenvalue() -> None:
    """Not λ_R − λ_{R+1} = 0 − 0, which would call the clearest space of all unstable."""
    seen = fold("glora", contract_round("glora", ranks=(2, 2)), rank=12).diagnostics
    least = min(value for value in seen.eigenvalues if value > 1e-9)
    assert seen.eigengap == pytest.approx(least)
    cut = fold("glora", contract_round("glora", ranks=(2, 2)), rank=3).diagnostics
    assert cut.eigengap == pytest.approx(seen.eigenvalues[2] - seen.eigenvalues[3])
