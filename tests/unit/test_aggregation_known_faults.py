"""Faults of released code of other federations (each changes results there), shown to be absent here."""

from dataclasses import replace

import pytest
import torch
from strategy_cases import D, N, contract_round, fold, model
from strategy_reference import delta_w, hetlora, mean_update, padded_average, raflora, shares

from glora_server.aggregation import STRATEGIES, ClientUpdate, check_options, readout
from glora_server.aggregation import errors as e


def test_fedit_is_not_the_first_client_times_its_weight() -> None:
    """FLoRA's repository: a misspelt accumulator makes its FedIT p_1·(first client)."""
    updates = contract_round("fedit", ranks=(4, 4, 4))
    b, a = padded_average(updates, shares(updates), 4)
    state = fold("fedit", updates, rank=4).state
    assert torch.allclose(state.extra["b"], b)
    assert torch.allclose(state.extra["a"], a)
    assert not torch.allclose(state.extra["b"], shares(updates)[0] * updates[0].scale ** 0.5 * updates[0].b, atol=0.1)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("shape", [(4, 4), (4, N), (D, 4)])
def test_a_rank_that_equals_a_dimension_is_not_mistaken_for_it(name: str, shape: tuple[int, int]) -> None:
    """FLoRA's repository finds the rank axis by shape[0] == rank; here B is out×r and A r×in, by position only."""
    d, n = shape
    updates = contract_round(name, ranks=(4, 4), d=d, n=n)
    state = fold(name, updates).state
    b, a = readout(state, 4, 1.0)
    assert (b.shape, a.shape) == ((d, 4), (4, n))
    if STRATEGIES[name].properties.exact and name != "florist":
        assert torch.allclose(model(state), mean_update(updates), atol=1e-10)


def test_the_residual_of_fedex_is_never_transposed() -> None:
    """FedEx's repository always transposes, right for Conv1D only and silent where the weight is square."""
    updates = contract_round("fedex", d=12, n=12)
    b, a = padded_average(updates, shares(updates), 4)
    residual = mean_update(updates) - b @ a
    step = STRATEGIES["fedex"].merge(fold("fedex", updates).state)
    assert step is not None
    assert torch.allclose(step.left @ step.right, residual, atol=1e-10)
    assert not torch.allclose(residual, residual.T, atol=0.1), "the case can tell one from the other"


def test_fedex_weights_its_clients() -> None:
    """FedEx's repository averages uniformly."""
    updates = contract_round("fedex")
    uniform = [replace(u, weight=1.0) for u in updates]
    assert torch.allclose(model(fold("fedex", updates).state), mean_update(updates), atol=1e-10)
    assert not torch.allclose(model(fold("fedex", updates).state), mean_update(uniform), atol=0.1)


def test_rank_balanced_weights_are_applied() -> None:
    """RB-LoRA's repository imports its weights, never applies them and pads with zeros by data size instead."""
    updates = contract_round("raflora", ranks=(2, 4, 8))
    state = fold("raflora", updates, rank=14).state
    assert torch.allclose(model(state), raflora(updates, range(1, 9)), atol=1e-10)
    zero_padded_products = mean_update(updates)
    b, a = padded_average(updates, shares(updates), 8)
    for unbalanced in (zero_padded_products, b @ a):
        assert not torch.allclose(model(state), unbalanced, atol=0.1)


def test_flora_stacks_with_weights() -> None:
    """RB-LoRA's FLoRA concatenates without weights."""
    updates = contract_round("flora")
    plain = torch.stack([delta_w(u) for u in updates]).sum(0)
    assert torch.allclose(model(fold("flora", updates).state), mean_update(updates), atol=1e-10)
    assert not torch.allclose(mean_update(updates), plain, atol=0.1)


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"fedsa", "rolora", "ffa", "fedsvd"}))
def test_scales_of_devices_count_before_anything_is_averaged(name: str) -> None:
    """RB-LoRA's repository drops s before averaging and divides by it afterwards; FlexLoRA's heterolora.py likewise.

    One update says the same with (s, B, A) and with (4s, B/2, A/2), so the results must agree.
    """
    updates = contract_round(name)
    other = [replace(updates[0], scale=4 * updates[0].scale, b=updates[0].b / 2, a=updates[0].a / 2), *updates[1:]]
    assert torch.allclose(model(fold(name, updates).state), model(fold(name, other).state), atol=1e-9)


@pytest.mark.parametrize("name", ["ffa", "fedsvd"])
def test_scales_of_devices_count_where_only_b_is_averaged(name: str) -> None:
    updates = contract_round(name)
    other = [replace(updates[0], scale=4 * updates[0].scale, b=updates[0].b / 4), *updates[1:]]
    assert torch.allclose(model(fold(name, updates).state), model(fold(name, other).state), atol=1e-9)


def test_hetlora_averages_with_scale_and_hands_out_at_the_plans_scale() -> None:
    """FlexLoRA's heterolora.py averages without scale and loads with a division by √(16/r), whatever alpha is."""
    updates = contract_round("hetlora", ranks=(2, 4, 3))
    state = fold("hetlora", updates, rank=4).state
    assert torch.allclose(model(state), hetlora(updates, 4), atol=1e-10)
    for scale in (0.5, 16 / 4, 7.0):
        assert torch.allclose(scale * torch.matmul(*readout(state, 4, scale)), model(state), atol=1e-10)


def test_fedrots_default_is_the_papers_soft_rotation() -> None:
    """FedRot's repository defaults to λ = 1.5, which means hard O(r); here λ ≤ 1 always and hard has its own word."""
    defaults = check_options("fedrot", {})
    assert (defaults["rotation"], defaults["rotate_lambda"]) == ("soft", 0.5)
    with pytest.raises(e.OptionError, match="at most 1"):
        check_options("fedrot", {"rotate_lambda": 1.5})


def test_flexlora_takes_any_alpha() -> None:
    """FlexLoRA's repository has α = 16 written in."""
    u = contract_round("flexlora", ranks=(4,))[0]
    for alpha in (1.0, 8.0, 16.0, 64.0):
        own = ClientUpdate(u.b, u.a, alpha / 4, 1.0)
        state = fold("flexlora", [own]).state
        assert torch.allclose(model(state), delta_w(own), atol=1e-9)
        assert torch.allclose(alpha / 4 * torch.matmul(*readout(state, 4, alpha / 4)), delta_w(own), atol=1e-9)
