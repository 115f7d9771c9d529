"""A limit on how often one address may call, in bounded memory."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from glora_wire.errors import GloraError, Reason

_V6_SITE: Final = 64
"""Who has one IPv6 address has the whole /64."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class RateLimiter:
    """A token bucket for each address: `burst` calls at once, then `per_second` on average.

    Remembers `max_peers` addresses; the one that was silent longest is forgotten (and starts with a full bucket).
    """

    def __init__(
        self,
        *,
        per_second: float = 5.0,
        burst: int = 60,
        max_peers: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._max_peers = max_peers
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def check(self, peer: str) -> None:
        """Count one call of the peer ("ipv4:1.2.3.4:5678"); raises TOO_MANY_REQUESTS when it was one too many."""
        key, now = address_of(peer), self._clock()
        bucket = self._buckets.pop(key, None) or _Bucket(self._burst, now)
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.at) * self._per_second)
        bucket.at = now
        self._buckets[key] = bucket
        if len(self._buckets) > self._max_peers:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1.0:
            raise GloraError(
                Reason.TOO_MANY_REQUESTS,
                f"Too many requests came from {key}; wait a little and try again.",
                address=key,
            )
        bucket.tokens -= 1.0


def address_of(peer: str) -> str:
    """The address of a gRPC peer without its port; an IPv6 address stands for its /64; other peers as they are."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    if kind not in ("ipv4", "ipv6"):
        return peer
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _V6_SITE), strict=False))
