"""Means over the modules of what an aggregation says of each of them; what is missing or not finite does not count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Final

from glora_cli.simulate_results import Consensus, DeviceRecord

Module = Mapping[str, object]
"""The diagnostics of a module, as they are kept in JSON; empty for one that no update has."""
_END: Final = 0.0
"""What short lists go on with: directions that a module does not have."""


def mean(values: Sequence[float]) -> float | None:
    """Mean of the finite values; None when there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


def mean_of(modules: Sequence[Module], name: str) -> float | None:
    """Mean of a number over the modules that have it; None when none has."""
    return mean([float(value) for module in modules if isinstance(value := module.get(name), int | float)])


def mean_list(modules: Sequence[Module], name: str) -> tuple[float, ...]:
    """Means item by item; shorter lists count as ending in zeros."""
    lists = [value for module in modules if isinstance(value := module.get(name), list)]
    items = zip_longest(*lists, fillvalue=_END)
    return tuple(mean([float(value) for value in item if value is not None]) or 0.0 for item in items)


def consensus_of(modules: Sequence[Module]) -> Consensus | None:
    """How far the devices agreed in a round; None for a round without updates."""
    if not modules:
        return None
    angles = [value for module in modules if isinstance(value := module.get("angles"), Mapping)]
    devices: dict[str, list[Module]] = {}
    for module in modules:
        clients = module.get("clients")
        for client in clients if isinstance(clients, list) else ():
            devices.setdefault(str(client["device_id"]), []).append(client)
    return Consensus(
        eigenvalues=mean_list(modules, "eigenvalues"),
        mean_angle=mean_of(angles, "mean"),
        largest_angle=mean_of(angles, "largest"),
        devices=tuple(
            DeviceRecord(
                device=name,
                update_norm=mean_of(found, "update_norm"),
                cosine=mean_of(found, "cosine"),
                capture=mean_of(found, "capture"),
                influence=mean_of(found, "influence"),
            )
            for name, found in devices.items()
        ),
    )
