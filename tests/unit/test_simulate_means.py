"""Means over modules of what an aggregation says: short lists, numbers that are not finite, devices in some modules."""

from __future__ import annotations

from glora_cli.simulate_means import Module, consensus_of, mean_list, mean_of
from glora_cli.simulate_results import Consensus, DeviceRecord


def _device(name: str, norm: float | None) -> dict[str, object]:
    return {"device_id": name, "update_norm": norm, "cosine": 0.5, "capture": 1.0, "votes": 2}


def test_numbers_that_are_missing_or_not_finite_do_not_count() -> None:
    modules: tuple[Module, ...] = ({"eigengap": 1.0}, {"eigengap": None}, {}, {"eigengap": 2.0})
    assert mean_of(modules, "eigengap") == 1.5
    assert mean_of(modules, "mean_norm") is None


def test_short_lists_end_in_zeros_and_gaps_do_not_count() -> None:
    modules: tuple[Module, ...] = ({"sigma": [2.0, 4.0]}, {"sigma": [4.0]}, {"sigma": [None, 2.0]}, {})
    assert mean_list(modules, "sigma") == (3.0, 2.0)
    assert mean_list(({"sigma": [None]},), "sigma") == (0.0,)
    assert mean_list((), "sigma") == ()


def test_a_device_is_averaged_over_the_modules_that_it_has() -> None:
    modules: tuple[Module, ...] = (
        {"eigenvalues": [1.0, 0.5], "angles": None, "clients": [_device("a", 1.0), _device("b", 2.0)]},
        {"eigenvalues": [0.5], "angles": {"largest": 1.0, "mean": 0.25}, "clients": [_device("b", 4.0)]},
        {},
    )
    assert consensus_of(modules) == Consensus(
        eigenvalues=(0.75, 0.25),
        mean_angle=0.25,
        largest_angle=1.0,
        devices=(
            DeviceRecord(device="a", update_norm=1.0, cosine=0.5, capture=1.0),
            DeviceRecord(device="b", update_norm=3.0, cosine=0.5, capture=1.0),
        ),
    )


def test_a_norm_that_is_not_finite_is_none() -> None:
    found = consensus_of(({"clients": [_device("a", None)]},))
    assert found is not None
    assert found.devices[0].update_norm is None


def test_there_is_no_record_of_a_round_without_updates() -> None:
    assert consensus_of(()) is None
