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

    `captured_energy` ‖S'‖²/‖M‖² and `truncation_error` ‖S' − M‖/‖M‖ of the mean M, `eigengap` at the server's rank
    relative to the largest eigenvalue, `consensus` the mean cosine between a device's change and the mean change,
    `effective_rank` exp(−Σ q ln q) of the singular values of S', q = σ/Σσ (Roy and Vetterli 2007).
    """

    captured_energy: Spread
    truncation_error: Spread
    eigengap: Spread
    consensus: Spread
    effective_rank: Spread


def quality_of(modules: Sequence[Values]) -> Quality:
    """Of what aggregation measured for each module (Diagnostics as JSON)."""
    return Quality(
        captured_energy=_spread(_number(values.get("captured_energy")) for values in modules),
        truncation_error=_spread(_number(values.get("truncation_error")) for values in modules),
        eigengap=_spread(_eigengap(values) for values in modules),
        consensus=_spread(consensus_of(values) for values in modules),
        effective_rank=_spread(_effective_rank(values) for values in modules),
    )


def _eigengap(values: Values) -> float:
    """The eigengap relative to the largest eigenvalue; NaN for strategies without K."""
    eigenvalues = values.get("eigenvalues")
    largest = _number(eigenvalues[0]) if isinstance(eigenvalues, Sequence) and eigenvalues else math.nan
    return _number(values.get("eigengap")) / largest if largest > 0 else math.nan


def consensus_of(values: Values) -> float:
    """Mean over devices, by their share, of the cosine between a device's change and the mean change; NaN: unknown.

    The mean contains each device's own change: n changes of one size and share that have nothing in common have 1/√n.
    """
    clients = values.get("clients")
    if not isinstance(clients, Sequence):
        return math.nan
    pairs = [
        (_number(client.get("share")), _number(client.get("change_cosine")))
        for client in clients
        if isinstance(client, Mapping)
    ]
    known = [(share, cosine) for share, cosine in pairs if not math.isnan(share + cosine)]
    total = math.fsum(share for share, _ in known)
    return math.fsum(share * cosine for share, cosine in known) / total if total > 0 else math.nan


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
