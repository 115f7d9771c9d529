"""Tries a call until it succeeds or somebody must act: by reason and the server's waiting time, never by text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from glora_client.channel import Backoff, Stop, is_passing
from glora_client.view import View
from glora_wire.errors import GloraError, Reason

_AGAIN: Final = frozenset(
    {
        Reason.DIGEST_CHANGED,
        Reason.DIGEST_MISMATCH,
        Reason.OFFSET_INVALID,
        Reason.STREAM_MALFORMED,
        Reason.UPLOAD_FENCED,
        Reason.UPLOAD_TRUNCATED,
    }
)
"""A transfer that asks anew where to resume may succeed; a few times, for the fault may be lasting."""
_MAX_AGAIN: Final = 5
_WORKED_SECONDS: Final = 10.0
"""A call that lasted this long had a server; the waiting starts small again."""

SESSION_ENDS: Final = frozenset(
    {Reason.DEVICE_REVOKED, Reason.DEVICE_UNKNOWN, Reason.CERTIFICATE_UNKNOWN, Reason.CERTIFICATE_EXPIRED}
)
"""Nothing that this client could do will help: it ends and says so."""

Answer = TypeVar("Answer")


class Persistence:
    """Repeats calls with full-jitter backoff for as long as the trouble can pass by itself."""

    def __init__(self, stop: Stop, view: View, backoff: Backoff) -> None:
        self._stop = stop
        self._view = view
        self._backoff = backoff
        self._troubled: Reason | None = None

    def call(self, action: Callable[[], Answer], *, wanted: Callable[[], bool] = lambda: True) -> Answer:
        """What `action` returns in the end; gives up with the last error when the work is no longer `wanted`.

        Raises Stopped, and GloraError for what does not pass.
        """
        attempt = again = 0
        while True:
            started = time.monotonic()
            try:
                answer = action()
            except GloraError as error:
                again += error.reason in _AGAIN
                passing = is_passing(error) or (error.reason in _AGAIN and again <= _MAX_AGAIN)
                if not passing or not wanted():
                    raise
                if time.monotonic() - started > _WORKED_SECONDS:
                    attempt = 0
                self._wait(error, attempt)
                attempt += 1
            else:
                self._recovered()
                return answer

    def _wait(self, error: GloraError, attempt: int) -> None:
        if self._troubled is not error.reason:
            self._troubled = error.reason
            self._view.line(f"{error.message} Trying again until it works.")
        jitter = self._backoff.seconds(attempt)
        self._stop.wait(jitter if error.retry_after is None else error.retry_after + jitter / 4)

    def _recovered(self) -> None:
        if self._troubled is not None:
            self._troubled = None
            self._view.line("The server answers again.")
