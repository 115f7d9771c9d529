"""What the coordinator tells to whoever counts things (metrics); nothing here can fail or be waited for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from glora_server.rounds.round import Round
from glora_wire.errors import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What aggregation measured, as means over the modules of a version; NaN where nothing was measured.

    `captured_energy` ‖S'‖²/‖M‖² and `truncation_error` ‖S' − M‖/‖M‖ of the mean M, `eigengap` at the server's rank
    relative to the largest eigenvalue, `consensus` the mean cosine between a device's change and the mean change.
    """

    captured_energy: float
    truncation_error: float
    eigengap: float
    consensus: float


class Observer(Protocol):
    """Counts what happens."""

    def round_moved(self, before: Round, after: Round) -> None:
        """A round took a step."""
        ...

    def upload_judged(self, refusal: Refusal | None) -> None:
        """An update was accepted (None) or rejected."""
        ...

    def aggregated(self, *, seconds: float, updates: int, quality: Quality) -> None:
        """A round was folded into a new version."""
        ...


class NobodyWatches:
    """An observer that ignores everything."""

    def round_moved(self, before: Round, after: Round) -> None:
        """Ignore."""

    def upload_judged(self, refusal: Refusal | None) -> None:
        """Ignore."""

    def aggregated(self, *, seconds: float, updates: int, quality: Quality) -> None:
        """Ignore."""
