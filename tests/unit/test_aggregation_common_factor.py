"""Strategies with a factor that devices share or keep: ffa, fedsvd, rolora, fedsa; and updates with one factor."""

from dataclasses import replace

import pytest
import torch
from lora_cases import randn
from strategy_cases import D, N, contract_round, fold, model
from strategy_reference import delta_w, mean_update, shares

from glora_server.aggregation import (
    STRATEGIES,
    ClientUpdate,
    InitSource,
    LayerState,
    TrainMask,
    UploadSet,
    aggregate,
    empty_state,
    readout,
)
from glora_server.aggregation import errors as e
from glora_server.aggregation.strategies.fedsvd import turned_basis


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_ffa_is_exact_for_mixed_ranks_with_a_nested_a() -> None:
    updates = contract_round("ffa", ranks=(2, 6, 4))
    state = fold("ffa", updates).state
    assert torch.allclose(model(state), mean_update(updates), atol=1e-12)
    assert torch.equal(state.extra["a"], updates[1].a)
    padded = [torch.cat([u.scale * u.b, torch.zeros(D, 6 - u.rank, dtype=u.b.dtype)], dim=1) for u in updates]
    expected = torch.stack([p * b for p, b in zip(shares(updates), padded, strict=True)]).sum(0)
    assert torch.allclose(state.extra["b"], expected)


def test_ffa_hands_out_the_same_a_in_every_version_and_nested_across_ranks() -> None:
    start = empty_state(D, N, strategy="ffa", dtype=torch.float64)
    first = readout(start, 8, 1.0, seed=5, module="m", version=0)[1]
    assert torch.equal(first[:3], readout(start, 3, 2.0, seed=5, module="m", version=4)[1])
    assert not torch.equal(first, readout(start, 8, 1.0, seed=6, module="m")[1])
    state = fold("ffa", contract_round("ffa", ranks=(2, 3))).state
    later = readout(state, 8, 1.0, seed=5, module="m", version=9)[1]
    assert torch.equal(later, first), "rows beyond those seen so far continue A_0"


def test_ffa_keeps_a_as_it_travelled_so_that_narrow_wires_stay_exact() -> None:
    updates = contract_round("ffa", ranks=(4, 4), dtype=torch.bfloat16, both=False)
    state = fold("ffa", updates).state
    whole = contract_round("ffa", ranks=(4, 4), dtype=torch.bfloat16)
    assert torch.allclose(model(state), mean_update(whole), atol=1e-5)


def test_ffa_needs_to_know_the_common_a_once() -> None:
    updates = [replace(u, sent=None) for u in contract_round("ffa", both=False)]
    with pytest.raises(e.ContractError, match="sent="):
        fold("ffa", updates)
    state = fold("ffa", contract_round("ffa")).state
    assert torch.allclose(model(fold("ffa", updates, state=state, round_index=1).state), model(state))


def test_ffa_refuses_a_rank_beyond_the_a_that_is_known() -> None:
    wide = replace(contract_round("ffa", ranks=(6,), both=False)[0], sent=None)
    with pytest.raises(e.ContractError):
        fold("ffa", [*contract_round("ffa", ranks=(2, 2)), wide])


@pytest.mark.parametrize("name", ["ffa", "fedsvd", "rolora"])
def test_an_a_that_was_trained_against_the_contract_is_refused(name: str) -> None:
    updates = contract_round(name, ranks=(4, 4))
    trained = replace(updates[1], a=updates[1].a + 0.01 * randn(generator(), *updates[1].a.shape))
    with pytest.raises(e.ContractError, match="Update 1 has a factor A of its own"):
        fold(name, [updates[0], trained])


@pytest.mark.parametrize("refresh", [1, 3])
def test_fedsvd_turns_the_basis_and_keeps_the_product(refresh: int) -> None:
    state: LayerState | None = None
    for t in range(4):
        updates = contract_round("fedsvd", seed=t, state=state, round_index=t)
        state = fold("fedsvd", updates, state=state, round_index=t, refresh=refresh).state
        assert torch.allclose(model(state), mean_update(updates), atol=1e-10)
        a, b = state.extra["a"], state.extra["b"]
        if (t + 1) % refresh == 0:
            assert torch.allclose(a @ a.T, torch.eye(4, dtype=a.dtype), atol=1e-12)
            assert torch.allclose(b.norm(dim=0), torch.linalg.svdvals(mean_update(updates))[:4])
        else:
            assert torch.equal(a, updates[0].a)
        assert torch.allclose(2.0 * torch.matmul(*readout(state, 4, 2.0)), mean_update(updates), atol=1e-10)


def test_a_refresh_must_be_a_whole_number() -> None:
    with pytest.raises(e.OptionError, match="whole"):
        fold("fedsvd", contract_round("fedsvd"), refresh=1.5)


@pytest.mark.parametrize("rank", [1, 3])
def test_fedsvd_of_a_deficient_mean_keeps_directions_that_can_be_trained(rank: int) -> None:
    g = generator()
    b = randn(g, 9, rank) @ randn(g, rank, 4)
    a = randn(g, 4, 7)
    new_b, new_a = turned_basis(b, a)
    assert torch.allclose(new_b @ new_a, b @ a, atol=1e-12)
    assert torch.allclose(new_a @ new_a.T, torch.eye(4, dtype=a.dtype), atol=1e-12)
    zero = torch.zeros_like(b)
    assert turned_basis(zero, a)[1] is a
    tall = randn(g, 3, 4)  # d < r: three directions turn, the fourth stays
    new_b, new_a = turned_basis(tall, a)
    assert new_a.shape == a.shape
    assert torch.allclose(new_b @ new_a, tall @ a, atol=1e-12)


def test_rolora_trains_one_factor_at_a_time_and_each_round_is_exact() -> None:
    state: LayerState | None = None
    for t in range(4):
        contract = STRATEGIES["rolora"].contract({}, round_index=t)
        expected = (TrainMask.B, UploadSet.B) if t % 2 == 0 else (TrainMask.A, UploadSet.A)
        assert (contract.train, contract.upload) == expected
        updates = contract_round("rolora", seed=t, state=state, round_index=t)
        before = state
        state = fold("rolora", updates, state=state, round_index=t).state
        assert torch.allclose(model(state), mean_update(updates), atol=1e-10)
        if before is not None:
            frozen = "a" if t % 2 == 0 else "b"
            assert torch.allclose(state.extra[frozen], before.extra[frozen], atol=1e-12)


def test_rolora_honours_a_scale_of_the_devices_own() -> None:
    state = fold("rolora", contract_round("rolora")).state
    u = contract_round("rolora", state=state, round_index=1, ranks=(4,))[0]
    own = replace(u, scale=2 * u.scale, sent_scale=u.scale)
    new = fold("rolora", [own], state=state, round_index=1).state
    assert torch.allclose(model(new), delta_w(own), atol=1e-10)


def test_rolora_refuses_a_b_that_was_trained_in_the_round_of_a() -> None:
    state = fold("rolora", contract_round("rolora")).state
    updates = contract_round("rolora", state=state, round_index=1)
    with pytest.raises(e.ContractError, match="factor B of its own"):
        fold("rolora", [replace(updates[0], b=updates[0].b * 1.1)], state=state, round_index=1)


def test_fedsa_averages_a_and_has_no_global_model() -> None:
    updates = contract_round("fedsa", both=False)
    result = fold("fedsa", updates)
    expected = torch.stack([p * u.a for p, u in zip(shares(updates), updates, strict=True)]).sum(0)
    assert torch.allclose(result.state.extra["a"], expected)
    assert result.state.rank == 0
    assert (result.state.u.shape, result.state.a.shape) == ((D, 0), (0, N))
    b, a = readout(result.state, 4, 3.0)
    assert not bool(b.any())
    assert torch.allclose(a, expected), "scales stay with the devices"
    assert result.diagnostics.mean_norm == pytest.approx(float(expected.norm()))
    assert STRATEGIES["fedsa"].contract({}).keeps_b


def test_fedsa_takes_an_absent_b_and_a_zero_b_for_what_they_are() -> None:
    """A zero B says ΔW = 0 to strategies that want B; an absent one is refused by them and expected by fedsa."""
    absent = ClientUpdate.only_a(randn(generator(), 4, N), 1.0, 1.0, out_features=D)
    zero = replace(absent, b=torch.zeros(D, 4, dtype=torch.float64))
    assert (absent.has_b, absent.has_a, absent.rank) == (False, True, 4)
    assert torch.equal(fold("fedsa", [absent]).state.extra["a"], fold("fedsa", [zero]).state.extra["a"])
    assert fold("fedit", [zero]).state.rank == 0
    with pytest.raises(e.ContractError, match="has no B"):
        fold("fedit", [absent])


def test_updates_with_one_factor_are_still_checked() -> None:
    good = ClientUpdate.only_b(randn(generator(), D, 3), 1.0, 1.0, in_features=N)
    assert (good.has_b, good.has_a, good.rank, good.a.shape) == (True, False, 3, (0, N))
    for bad, error in (
        (replace(good, a=torch.zeros(0, N + 1, dtype=torch.float64)), e.ShapeError),
        (replace(good, a=torch.zeros(0, N)), e.DtypeError),
        (replace(good, b=good.b[:, :0]), e.ShapeError),
        (replace(good, a=torch.zeros(2, N, dtype=torch.float64)), e.ShapeError),
        (replace(good, b=good.b * torch.nan), e.NonFiniteError),
    ):
        with pytest.raises(error):
            aggregate("ffa", None, [contract_round("ffa")[0], bad], rank=12)


def test_contracts_say_where_devices_start() -> None:
    starts = {name: STRATEGIES[name].contract({}).init for name in ("ffa", "fedsvd", "rolora", "fedsa")}
    assert starts["ffa"] is InitSource.COMMON_A
    assert {starts[name] for name in ("fedsvd", "rolora", "fedsa")} == {InitSource.READOUT}
