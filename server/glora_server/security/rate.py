"""A limit on how often one address may call, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import unquote

from glora_server.coordinator.access_limits import Buckets, network_of
from glora_wire.errors import GloraError, Reason


class RateLimiter:
    """A bucket for each of `max_peers` addresses: `burst` calls at once, then `per_second` on average."""

    def __init__(
        self,
        *,
        per_second: float = 5.0,
        burst: int = 60,
        max_peers: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._buckets = Buckets(burst, 1.0 / per_second, max_peers)

    def check(self, peer: str) -> None:
        """Count one call of the peer ("ipv4:1.2.3.4:5678"); raises TOO_MANY_REQUESTS when it was one too many."""
        key, now = address_of(peer), self._clock()
        if self._buckets.wait(key, now) > 0:
            raise GloraError(
                Reason.TOO_MANY_REQUESTS,
                f"Too many requests came from {key}; wait a little and try again.",
                address=key,
            )
        self._buckets.take(key, now)


def address_of(peer: str) -> str:
    """The address of a gRPC peer without its port; an IPv6 address stands for its /64; other peers as they are."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    if kind not in ("ipv4", "ipv6"):
        return peer
    return network_of(host) if host else peer
