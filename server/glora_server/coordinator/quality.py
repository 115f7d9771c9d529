"""How well a round's updates went together, in four numbers for those who watch; the rest is kept by module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from glora_server.coordinator.observer import Quality

Values = Mapping[str, object]


def quality_of(modules: Sequence[Values]) -> Quality:
    """Means over the modules of what aggregation measured for each (Diagnostics as JSON); NaN where nothing was."""
    return Quality(
        captured_energy=_mean(_number(values.get("captured_energy")) for values in modules),
        truncation_error=_mean(_number(values.get("truncation_error")) for values in modules),
        eigengap=_mean(_eigengap(values) for values in modules),
        consensus=_mean(_consensus(values) for values in modules),
    )


def _eigengap(values: Values) -> float:
    """The eigengap relative to the largest eigenvalue; NaN for strategies without K."""
    eigenvalues = values.get("eigenvalues")
    largest = _number(eigenvalues[0]) if isinstance(eigenvalues, Sequence) and eigenvalues else math.nan
    return _number(values.get("eigengap")) / largest if largest > 0 else math.nan


def _consensus(values: Values) -> float:
    """Mean over devices, by their share, of the cosine between a device's change and the mean change."""
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


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _number(value: object) -> float:
    """The value as a finite number, else NaN (JSON has null for what was not finite)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan
