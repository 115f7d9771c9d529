"""Giving a job to the worker again when the worker died."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from glora_server.coordinator.ports import WorkerLostError
from glora_wire.errors import GloraError, Reason

T = TypeVar("T")
log = structlog.get_logger(__name__)
_TRIES = 3


async def retrying(job: Callable[[], Awaitable[T]]) -> T:
    """The job's result; gives it to a new worker when one dies, and raises AGGREGATION_FAILED after three deaths."""
    for attempt in range(1, _TRIES + 1):
        try:
            return await job()
        except WorkerLostError as error:
            log.warning("worker_lost", attempt=attempt, of=_TRIES, error=str(error))
    raise GloraError(
        Reason.AGGREGATION_FAILED,
        f"The numerics worker died {_TRIES} times in a row at the same job; it is probably out of memory. "
        "Give the server more memory, or lower lora.max_rank.",
        tries=_TRIES,
    )
