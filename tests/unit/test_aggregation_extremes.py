"""Numbers at the ends of what a dtype holds: the right result or a sentence, never an infinity that goes unseen."""

from dataclasses import replace

import pytest
import torch
from lora_cases import randn
from strategy_cases import contract_round, fold, model, orthogonally_regauged

from glora_server.aggregation import STRATEGIES, ClientUpdate, OptionValue, aggregate, readout
from glora_server.aggregation import errors as e

D, N, R = 24, 20, 4
FACTORS_ON_BOTH_SIDES = ["fedit", "fedrot", "fedex", "flexlora", "flora", "florist", "glora", "hetlora", "raflora"]


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sized(size: float, dtype: torch.dtype = torch.float32, count: int = 3) -> list[ClientUpdate]:
    """Updates with factors of that size."""
    g = generator()
    return [
        ClientUpdate(
            (size * randn(g, D, R)).to(dtype), (size * randn(g, R, N)).to(dtype), 1.0, 1.0 + i
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("name", FACTORS_ON_BOTH_SIDES)
def test_a_state_that_its_dtype_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(e.NonFiniteError, match=r"singular value of \S+e\+5\d, which torch.float32 cannot hold"):
        fold(name, sized(1e25), rank=R)


@pytest.mark.parametrize("name", FACTORS_ON_BOTH_SIDES)
def test_a_state_below_all_numbers_of_its_dtype_is_the_zero_state(name: str) -> None:
    state = fold(name, sized(1e-25), rank=R).state
    assert state.rank == 0
    b, a = readout(state, R, 1.0)
    assert bool(torch.isfinite(a).all())
    assert float((b @ a).abs().max()) < 1e-40


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"lora_fair"}))  # whose λ has the unit of A
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_float64_rounds_of_any_reasonable_size_are_right(name: str, size: float) -> None:
    """Sizes that overflow float32, and whose squares are far from one."""
    plain, scaled = (contract_round(name, dtype=torch.float64) for _ in range(2))
    no_gauge = STRATEGIES[name].properties.no_gauge  # its common A is checked, so only B may grow
    scaled = [replace(u, b=u.b * size, a=u.a if no_gauge else u.a * size) for u in scaled]
    factor = size if no_gauge else size * size
    expected, found = model(fold(name, plain).state), model(fold(name, scaled).state)
    assert torch.allclose(found / factor, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_float64_factors_whose_products_overflow_are_refused(name: str) -> None:
    updates = contract_round(name, dtype=torch.float64)
    updates[1] = replace(updates[1], b=updates[1].b * 1e90, a=updates[1].a * 1e90)
    with pytest.raises(e.NonFiniteError, match=r"Update 1 has numbers whose products reach"):
        fold(name, updates)


@pytest.mark.parametrize("size", [1e-14, 1e-10, 1.0, 1e18])
def test_fedrot_rotates_whatever_the_size_of_the_factors(size: float) -> None:
    """The overlap with the reference neither underflows nor overflows: rotated copies are found as they were."""
    plain = contract_round("fedrot", ranks=(R, R), dtype=torch.float32)
    plain = [replace(plain[0], b=plain[0].b * size, a=plain[0].a / size, weight=u.weight) for u in plain]
    before = fold("fedrot", plain, rank=R).state
    wide = [replace(u, b=u.b.double(), a=u.a.double()) for u in plain]
    turned = [replace(u, b=u.b.float(), a=u.a.float()) for u in orthogonally_regauged(wide, generator(3))]
    options: dict[str, OptionValue] = {"rotation": "orthogonal"}
    for round_index in (1, 2):
        found = model(fold("fedrot", turned, rank=R, state=before, round_index=round_index, options=options).state)
        expected = plain[0].scale * plain[0].b.double() @ plain[0].a.double()
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_an_exactly_cancelling_mean_counts_as_zero() -> None:
    """Not as the rounding noise that it is computed as: nothing was lost, and nobody agrees with it."""
    b, a = randn(generator(), D, R), randn(generator(2), R, N)
    opposite = [ClientUpdate(b, a, 1.0, 1.0), ClientUpdate(-b, a, 1.0, 1.0)]
    for name in ("glora", "flexlora", "flora"):
        seen = fold(name, opposite, rank=R).diagnostics
        assert (seen.mean_norm, seen.captured_energy, seen.truncation_error) == (0.0, 1.0, 0.0)
        assert [client.cosine for client in seen.clients] == [0.0, 0.0]


@pytest.mark.parametrize("rank", [2.5, 2.0, True, 0, -1])
def test_a_rank_is_a_whole_number(rank: float) -> None:
    with pytest.raises(e.RankError, match="whole number from 1"):
        aggregate("flexlora", None, sized(1.0), rank=rank)  # type: ignore[arg-type]
    state = aggregate("flexlora", None, sized(1.0), rank=R).state
    with pytest.raises(e.RankError, match="whole number from 1"):
        readout(state, rank, 1.0)  # type: ignore[arg-type]
