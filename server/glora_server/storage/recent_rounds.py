"""Rounds as the database has them, remembered between transactions.

Every step of a device moves its round, and to read the assignments of all its devices for each of them makes a round
quadratic in the number of devices. A round changes with its row version only, assignments included, so a row version
that was committed says what the round is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from glora_server.rounds.ids import RoundId
from glora_server.rounds.round import Round

_REMEMBERED: Final = 16


class RecentRounds:
    """The last few rounds that were read or saved; safe to use from several threads."""

    def __init__(self) -> None:
        self._rounds: OrderedDict[RoundId, Round] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, round_id: RoundId, row_version: int) -> Round | None:
        """The round at that row version, where it is known."""
        with self._lock:
            found = self._rounds.get(round_id)
        return found if found is not None and found.row_version == row_version else None

    def learn(self, committed: Iterable[Round]) -> None:
        """Remember rounds as they were committed; never what may still be rolled back: its number is given again."""
        with self._lock:
            for round_ in committed:
                known = self._rounds.get(round_.id)
                if known is None or known.row_version <= round_.row_version:
                    self._rounds[round_.id] = round_
                    self._rounds.move_to_end(round_.id)
            while len(self._rounds) > _REMEMBERED:
                self._rounds.popitem(last=False)
