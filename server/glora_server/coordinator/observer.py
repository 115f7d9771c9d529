"""What the coordinator tells to whoever counts things (metrics); nothing here can fail or be waited for."""

from __future__ import annotations

from typing import Protocol

from glora_server.rounds.round import Round
from glora_wire.errors import Refusal


class Observer(Protocol):
    """Counts what happens."""

    def round_moved(self, before: Round, after: Round) -> None:
        """A round took a step."""
        ...

    def upload_judged(self, refusal: Refusal | None) -> None:
        """An update was accepted (None) or rejected."""
        ...

    def aggregated(self, *, seconds: float, updates: int) -> None:
        """A round was folded into a new version."""
        ...


class NobodyWatches:
    """An observer that ignores everything."""

    def round_moved(self, before: Round, after: Round) -> None:
        """Ignore."""

    def upload_judged(self, refusal: Refusal | None) -> None:
        """Ignore."""

    def aggregated(self, *, seconds: float, updates: int) -> None:
        """Ignore."""
