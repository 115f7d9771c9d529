"""What the coordinator tells to whoever counts things (metrics); nothing here can fail or be waited for."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from glora_server.rounds.round import Round
from glora_wire.errors import Refusal


class SignIn(StrEnum):
    """What became of an attempt to sign in."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    """Wrong name or password, or the user is disabled."""
    LIMITED = "limited"
    """Not even looked at: too many attempts."""


class Observer(Protocol):
    """Counts what happens."""

    def round_moved(self, before: Round, after: Round) -> None:
        """A round took a step."""
        ...

    def upload_judged(self, refusal: Refusal | None) -> None:
        """An update was accepted (None) or rejected."""
        ...

    def aggregated(self, *, seconds: float, commit_seconds: float, updates: int) -> None:
        """A round was folded into a new version; `commit_seconds` of all `seconds` went into publishing it."""
        ...

    def signed_in(self, outcome: SignIn) -> None:
        """Somebody tried to sign in."""
        ...


class NobodyWatches:
    """An observer that ignores everything."""

    def round_moved(self, before: Round, after: Round) -> None:
        """Ignore."""

    def upload_judged(self, refusal: Refusal | None) -> None:
        """Ignore."""

    def aggregated(self, *, seconds: float, commit_seconds: float, updates: int) -> None:
        """Ignore."""

    def signed_in(self, outcome: SignIn) -> None:
        """Ignore."""
