"""Long polls that end at once when the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from glora_wire.errors import GloraError, Reason

T = TypeVar("T")


class Polls:
    """The calls that wait for something to happen."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[object]] = set()
        self._stopped = False

    async def run(self, waiting: Coroutine[object, object, T]) -> T:
        """The result of `waiting`; raises SHUTTING_DOWN when the server stops first.

        When the caller is cancelled because its client went away, `waiting` is cancelled with it.
        """
        if self._stopped:
            waiting.close()
            raise _shutting_down()
        task = asyncio.create_task(waiting)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._stopped and (caller is None or not caller.cancelling()):
                raise _shutting_down() from None
            raise

    def stop(self) -> None:
        """End all that wait now, and refuse new ones."""
        self._stopped = True
        for task in tuple(self._running):
            task.cancel()


def _shutting_down() -> GloraError:
    return GloraError(Reason.SHUTTING_DOWN, "The server is stopping; ask again in a moment.")
