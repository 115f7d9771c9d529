"""How well a round's updates went together, in a few numbers for those who watch; the rest is kept by module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Values = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A number over the modules of a version: its mean, least and largest; NaN where no module has it."""

    mean: float
    least: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What aggregation measured, over the modules of a version.

    Of the mean M: `captured_energy` ‖S'‖²/‖M‖², `truncation_error` ‖S' − M‖/‖M‖, `aggregation_bias` the part of that
    which no larger rank would mend, `mean_norm` ‖M‖. Of the common space: `eigengap` at its end, relative to the
    largest eigenvalue, `angle` the largest principal angle to the previous version in radians, `coverage` the share of
    the weight that could train the server's last direction. Over devices, by their share: `consensus` the cosine
    between a device's change and the mean change, `capture` the part of its update inside the common space,
    `influence` how far the mean change would move without it. Of the state: `effective_rank` exp(−Σ q ln q) of the
    singular values of S', q = σ/Σσ (Roy and Vetterli 2007).
    """

    captured_energy: Spread
    truncation_error: Spread
    aggregation_bias: Spread
    mean_norm: Spread
    eigengap: Spread
    angle: Spread
    coverage: Spread
    consensus: Spread
    capture: Spread
    influence: Spread
    effective_rank: Spread


def quality_of(modules: Sequence[Values]) -> Quality:
    """Of what aggregation measured for each module (Diagnostics as JSON)."""
    return Quality(
        captured_energy=_spread(_number(values.get("captured_energy")) for values in modules),
        truncation_error=_spread(_number(values.get("truncation_error")) for values in modules),
        aggregation_bias=_spread(_number(values.get("aggregation_bias")) for values in modules),
        mean_norm=_spread(_number(values.get("mean_norm")) for values in modules),
        eigengap=_spread(_eigengap(values) for values in modules),
        angle=_spread(_angle(values) for values in modules),
        coverage=_spread(_coverage(values) for values in modules),
        consensus=_spread(consensus_of(values) for values in modules),
        capture=_spread(_over_devices(values, "capture") for values in modules),
        influence=_spread(_over_devices(values, "influence") for values in modules),
        effective_rank=_spread(_effective_rank(values) for values in modules),
    )


def _eigengap(values: Values) -> float:
    """The eigengap relative to the largest eigenvalue; NaN for strategies without K."""
    eigenvalues = values.get("eigenvalues")
    largest = _number(eigenvalues[0]) if isinstance(eigenvalues, Sequence) and eigenvalues else math.nan
    return _number(values.get("eigengap")) / largest if largest > 0 else math.nan


def _angle(values: Values) -> float:
    """NaN for the first version, which has nothing to be compared with."""
    angles = values.get("angles")
    return _number(angles.get("largest")) if isinstance(angles, Mapping) else math.nan


def _coverage(values: Values) -> float:
    """w_R, the least of the falling w_j."""
    coverage = values.get("coverage")
    return _number(coverage[-1]) if isinstance(coverage, Sequence) and coverage else math.nan


def consensus_of(values: Values) -> float:
    """Mean over devices, by their share, of the cosine between a device's change and the mean change; NaN: unknown.

    The mean contains each device's own change: n changes of one size and share that have nothing in common have 1/√n.
    """
    return _over_devices(values, "change_cosine")


def _over_devices(values: Values, name: str) -> float:
    """Mean over devices, by their share; NaN: unknown."""
    clients = values.get("clients")
    if not isinstance(clients, Sequence):
        return math.nan
    pairs = [
        (_number(client.get("share")), _number(client.get(name))) for client in clients if isinstance(client, Mapping)
    ]
    known = [(share, value) for share, value in pairs if not math.isnan(share + value)]
    total = math.fsum(share for share, _ in known)
    return math.fsum(share * value for share, value in known) / total if total > 0 else math.nan


def _effective_rank(values: Values) -> float:
    """From 1 (one direction has everything) to the number of singular values; NaN of the zero state."""
    sigma = values.get("sigma")
    if not isinstance(sigma, Sequence):
        return math.nan
    return effective_rank(map(_number, sigma))


def effective_rank(weights: Iterable[float]) -> float:
    """exp of the entropy of the weights as shares of their sum; those that are not above 0 do not count; NaN: none."""
    known = [value for value in weights if value > 0]
    total = math.fsum(known)
    return math.exp(-math.fsum(s / total * math.log(s / total) for s in known)) if known else math.nan


def _spread(values: Iterable[float]) -> Spread:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Spread(mean=math.nan, least=math.nan, largest=math.nan)
    return Spread(mean=math.fsum(known) / len(known), least=min(known), largest=max(known))


def _number(value: object) -> float:
    """The value as a finite number, else NaN (JSON has null for what was not finite)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan
