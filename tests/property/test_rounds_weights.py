"""Weights of devices: a distribution, proportional where no cap holds, capped where that is possible."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glora_server.rounds.weights import weights

ROWS = st.lists(st.integers(1, 10**9), min_size=1, max_size=40)
SHARES = st.floats(0.001, 1.0)


@given(rows=ROWS, share=SHARES, most=st.integers(0, 10**6))
def test_weights_are_a_distribution_below_the_cap(rows: list[int], share: float, most: int) -> None:
    found = weights(rows, max_rows=most, max_share=share)
    assert len(found) == len(rows)
    assert all(weight > 0 for weight in found)
    assert math.isclose(math.fsum(found), 1.0, rel_tol=1e-9)
    assert max(found) <= max(share, 1 / len(rows)) * (1 + 1e-9)


@given(rows=ROWS)
def test_without_caps_weights_are_the_shares_of_rows(rows: list[int]) -> None:
    total = sum(rows)
    assert weights(rows) == pytest.approx([count / total for count in rows], rel=1e-9)


@given(rows=ROWS, share=SHARES)
def test_more_rows_never_weigh_less_and_order_does_not_matter(rows: list[int], share: float) -> None:
    found = weights(rows, max_share=share)
    pairs = sorted(zip(rows, found, strict=True))
    for (_, lighter), (_, heavier) in pairwise(pairs):
        assert lighter <= heavier * (1 + 1e-9)
    assert weights(rows[::-1], max_share=share) == pytest.approx(found[::-1], rel=1e-9)


@given(rows=ROWS, share=SHARES)
def test_those_below_the_cap_keep_their_proportions(rows: list[int], share: float) -> None:
    found = weights(rows, max_share=share)
    free = [(count, weight) for count, weight in zip(rows, found, strict=True) if weight < share * (1 - 1e-6)]
    if share * len(rows) > 1 and len(free) > 1:
        ratios = [weight / count for count, weight in free]
        assert max(ratios) == pytest.approx(min(ratios), rel=1e-6)


@given(rows=ROWS)
def test_a_cap_of_one_row_makes_everyone_equal(rows: list[int]) -> None:
    assert weights(rows, max_rows=1) == pytest.approx([1 / len(rows)] * len(rows))


@pytest.mark.parametrize("rows", [[], [3, 0], [-1]])
def test_nobody_and_nothing_have_no_weights(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one device"):
        weights(rows)
