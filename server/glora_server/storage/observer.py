"""What the store tells to whoever counts things; called in its threads, must be quick and must not fail."""

from __future__ import annotations

from typing import Protocol


class StoreObserver(Protocol):
    """Counts transactions and trouble."""

    def committed(self, *, seconds: float) -> None:
        """A transaction that changed something took so long, from begin to commit."""
        ...

    def failed(self, *, operation: str, kind: str) -> None:
        """The database itself failed: `operation` is read or write, `kind` full, lost, busy or other."""
        ...


class NobodyCounts:
    """An observer that ignores everything."""

    def committed(self, *, seconds: float) -> None:
        """Ignore."""

    def failed(self, *, operation: str, kind: str) -> None:
        """Ignore."""
