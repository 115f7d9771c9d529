from __future__ import annotations

import math

import pytest

from glora_dashboard.pages import format as fmt


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_400, "99.4 kB"),
        (99_600, "100 kB"),
        (999_900, "1.0 MB"),
        (1.5e15, "1.5 PB"),
        (5e18, "5000 PB"),
    ],
)
def test_sizes_are_in_powers_of_a_thousand(count: float, words: str) -> None:
    assert fmt.size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.25, "0.2 s"),
        (1.5, "1.5 s"),
        (45, "45 s"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (86400 * 4, "4 d"),
        (86400 + 3600, "1 d 1 h"),
        (-5, "0 s"),
    ],
)
def test_spans_have_two_units_at_most(seconds: float, words: str) -> None:
    assert fmt.span(seconds) == words


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_not_known_is_a_dash(value: float | None) -> None:
    assert fmt.percent(value) == fmt.number(value) == fmt.span(value) == fmt.NONE


def test_numbers_and_shares() -> None:
    assert fmt.percent(0.98765) == "98.8 %"
    assert fmt.number(0.012345) == "0.0123"
    assert [fmt.loss(value) for value in (0.69, 0.6904, None, math.nan)] == ["0.690", "0.690", fmt.NONE, fmt.NONE]
    assert fmt.number(12345.6) == "12,346"
    assert fmt.count(1, "device") == "1 device"
    assert fmt.count(1024, "device") == "1,024 devices"
    assert fmt.count(2, "device is", "devices are") == "2 devices are"


def test_moments_are_written_by_the_browser() -> None:
    assert str(fmt.moment(12.5, mode="until")) == '<g-time at="12.500" mode="until"></g-time>'
    assert str(fmt.moment(None)) == fmt.NONE
