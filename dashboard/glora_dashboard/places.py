"""How many requests of one kind may go on at the same time."""

from __future__ import annotations

from glora_wire.errors import GloraError, Reason


class Places:
    """Places for `most` requests; `what` says in the refusal what goes on ("exports are going on")."""

    def __init__(self, most: int, what: str) -> None:
        self._most = most
        self._what = what
        self._taken = 0

    def take(self) -> None:
        """Begin one; raises TOO_MANY_REQUESTS."""
        if self._taken >= self._most:
            raise GloraError(Reason.TOO_MANY_REQUESTS, f"{self._taken} {self._what} already; try again in a moment.")
        self._taken += 1

    def give_back(self) -> None:
        """One is over."""
        self._taken -= 1
