"""Every strategy beside glora against its dense reference, on drawn shapes, ranks, scales, weights and dtypes."""

from dataclasses import replace

import pytest
import torch
from dense_reference import truncated
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import Case, cases, randn, regauged
from strategy_cases import contract_round, fold, model
from strategy_reference import (
    delta_w,
    fedrot,
    hetlora,
    lora_fair_closed,
    mean_update,
    padded_average,
    raflora,
    shares,
)
from torch import Tensor

from glora_server.aggregation import STRATEGIES, ClientUpdate, readout

few = settings(max_examples=25, deadline=None)
dtypes = st.sampled_from((torch.float64, torch.float32))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64, *, size: float = 0.0) -> bool:
    """Relative to the expectation, or to the size of what was summed up where that may cancel."""
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    scale = max(float(torch.linalg.matrix_norm(expected)), size)
    return float(torch.linalg.matrix_norm(actual - expected)) <= tolerance * max(scale, 1e-300)


def size_of(updates: list[ClientUpdate]) -> float:
    return max(float(delta_w(u).norm()) for u in updates)


def equal(case: Case) -> Case:
    return replace(case, ranks=(case.ranks[0],) * len(case.ranks))


@given(case=cases(), dtype=dtypes)
@few
def test_strategies_on_the_mean(case: Case, dtype: torch.dtype) -> None:
    updates = case.updates(dtype)
    mean, size = mean_update(updates), size_of(updates)
    cut = fold("flexlora", updates, rank=case.rank).state
    best = float((truncated(mean, case.rank) - mean).norm())
    assert float((model(cut) - mean).norm()) <= best + 1e-5 * size
    for name in ("flora", "flexlora"):
        whole = model(fold(name, updates, rank=case.rank if name == "flora" else 32).state)
        assert close(whole, mean, dtype, size=size)
    expected = raflora(updates, range(1, 9))
    assert close(model(fold("raflora", updates, rank=64).state), expected, dtype, size=size)


@given(case=cases(), dtype=dtypes)
@few
def test_strategies_on_padded_factors(case: Case, dtype: torch.dtype) -> None:
    updates = case.updates(dtype)
    b, a = padded_average(updates, shares(updates), 8)
    assert close(model(fold("fedit", updates, rank=8).state), b @ a, dtype, size=size_of(updates))
    found = model(fold("hetlora", updates, rank=8).state)
    assert close(found, hetlora(updates, 8), dtype, size=size_of(updates))


@given(case=cases(), dtype=dtypes, strength=st.floats(1e-4, 10.0))
@few
def test_strategies_on_factors_of_one_rank(case: Case, dtype: torch.dtype, strength: float) -> None:
    updates = equal(case).updates(dtype)
    size = size_of(updates)
    found = fold("lora_fair", updates, rank=8, fair_lambda=strength).state
    assert close(model(found), lora_fair_closed(updates, strength), dtype, size=size)
    assert close(model(fold("fedex", updates, rank=8).state), mean_update(updates), dtype, size=size)


@given(case=cases(), kind=st.sampled_from(("orthogonal", "special")), round_index=st.integers(1, 4))
@few
def test_fedrot_on_drawn_references(case: Case, kind: str, round_index: int) -> None:
    r = min(case.ranks[0], case.d, case.n)
    g = case.generator()
    start = ClientUpdate(randn(g, case.d, r), randn(g, r, case.n), 1.0, 1.0)
    state = fold("fedrot", [start], rank=8).state
    updates = replace(case, seed=case.seed + 1, ranks=(r,) * len(case.ranks)).updates()
    found = fold("fedrot", updates, state=state, rank=8, round_index=round_index, rotation=kind).state
    expected = fedrot(updates, (start.b, start.a), on_a=round_index % 2 == 1, rotation=kind)
    # Procrustes is ill conditioned where two small singular values of the overlap nearly cancel (det −1) or vanish.
    overlaps = [u.a @ start.a.T if round_index % 2 else u.b.T @ start.b for u in updates]
    margin = min(_margin(m) for m in overlaps)
    assert float((model(found) - expected).norm()) <= 1e-11 * size_of(updates) / margin


def _margin(m: Tensor) -> float:
    sigma = torch.linalg.svdvals(m)
    last = sigma[-2:] if len(sigma) > 1 else torch.cat([sigma, sigma[:0]])
    gap = float(last[0] - last[-1]) if len(sigma) > 1 else float(sigma[0])
    return max(min(gap, float(sigma[-1])) / float(sigma[0]), 1e-12)


@given(case=cases(), name=st.sampled_from(("ffa", "fedsvd", "rolora")), dtype=dtypes, both=st.booleans())
@few
def test_strategies_with_a_common_factor_over_three_rounds(
    case: Case, name: str, dtype: torch.dtype, both: bool
) -> None:
    ranks = case.ranks if STRATEGIES[name].properties.mixed_ranks else equal(case).ranks
    state = None
    for t in range(3):
        whole, given_ = (
            contract_round(
                name,
                seed=case.seed + t,
                ranks=ranks,
                state=state,
                round_index=t,
                d=case.d,
                n=case.n,
                dtype=dtype,
                both=w,
            )
            for w in (True, both)
        )
        state = fold(name, given_, state=state, rank=8, round_index=t).state
        # float32: the device's frozen factor is the rounded one, which is what `sent` tells
        assert close(model(state), mean_update(whole), dtype, size=size_of(whole))


@given(case=cases(), condition=st.sampled_from((10.0, 1e3, 1e6)))
@few
def test_float32_uploads_in_bad_gauges(case: Case, condition: float) -> None:
    """What the wire rounded cannot come back, but arithmetic adds no more: compared at the float32 factors as sent."""
    updates = regauged(case.updates(torch.float32), case.generator(), condition)
    size = sum(float((u.b.double().norm(dim=0) * u.a.double().norm(dim=1)).sum()) * u.scale for u in updates)
    for name in ("flexlora", "flora", "raflora"):
        expected = raflora(updates, range(1, 9)) if name == "raflora" else mean_update(updates)
        found = model(fold(name, updates, rank=32).state)
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm()) + 1e-12 * size


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_readouts_keep_the_dtype_of_the_state(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        state = fold(name, contract_round(name, dtype=dtype)).state
        assert {t.dtype for t in readout(state, 3, 1.0)} == {dtype}
