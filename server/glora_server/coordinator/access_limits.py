"""How often somebody may try to sign in, in bounded memory.

Two buckets are asked: that of the address, and that of the user name. The second would let strangers keep a user out by
failing on purpose, so it does not count for addresses from which that user signed in before.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from glora_wire.errors import GloraError, Reason

_REMEMBERED: Final = 4096
_V6_SITE: Final = 64
"""Who has one IPv6 address has the whole /64."""
_WRITTEN_AT_ONCE: Final = 100
_WRITTEN_SECONDS: Final = 60.0
"""Refusals that the audit takes: so many at once, then one in so many seconds."""


class TooSoonError(GloraError):
    """TOO_MANY_REQUESTS with the time after which it is worth trying again."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(Reason.TOO_MANY_REQUESTS, message, seconds=math.ceil(seconds))
        self._seconds = seconds

    @property
    def retry_after(self) -> float:
        """Seconds until the next try is let through."""
        return self._seconds


@dataclass(slots=True)
class _Bucket:
    tries: float
    at: float


class Buckets:
    """`burst` tries at once for each key, then one in `seconds`.

    Remembers `keys` of them; the one that was silent longest is forgotten (and starts with a full bucket).
    """

    def __init__(self, burst: int, seconds: float, keys: int = _REMEMBERED) -> None:
        self._burst = float(burst)
        self._seconds = seconds
        self._keys = keys
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def wait(self, key: str, now: float) -> float:
        """Seconds until the key may try; 0: now."""
        return max(0.0, (1.0 - self._filled(key, now).tries) * self._seconds)

    def take(self, key: str, now: float) -> None:
        """Count one try."""
        self._filled(key, now).tries -= 1.0

    def give_back(self, key: str, now: float) -> None:
        """Count a try no longer: it was a good one."""
        bucket = self._filled(key, now)
        bucket.tries = min(self._burst, bucket.tries + 1.0)

    def _filled(self, key: str, now: float) -> _Bucket:
        bucket = self._buckets.pop(key, None) or _Bucket(self._burst, now)
        bucket.tries = min(self._burst, bucket.tries + max(0.0, now - bucket.at) / self._seconds)
        bucket.at = now
        self._buckets[key] = bucket
        if len(self._buckets) > self._keys:
            self._buckets.popitem(last=False)
        return bucket


class SignInLimits:
    """Counts tries before they are judged, so that tries at the same time cannot slip through; good ones come back."""

    def __init__(self, clock: Callable[[], float], *, per_address: int = 10, per_user: int = 10) -> None:
        self._clock = clock
        self._addresses = Buckets(per_address, 6.0)
        self._users = Buckets(per_user, 30.0)
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._written = Buckets(_WRITTEN_AT_ONCE, _WRITTEN_SECONDS)
        self._unwritten = 0

    def take(self, user: str, origin: str) -> None:
        """Count a try; raises TooSoonError, counting nothing, when there were too many."""
        now, address = self._clock(), network_of(origin)
        counts_for_user = (user, address) not in self._known
        wait = self._addresses.wait(address, now)
        if counts_for_user:
            wait = max(wait, self._users.wait(user, now))
        if wait > 0:
            raise TooSoonError(
                f"Too many tries to sign in; wait {math.ceil(wait)} seconds and try again.", max(1.0, wait)
            )
        self._addresses.take(address, now)
        if counts_for_user:
            self._users.take(user, now)

    def succeeded(self, user: str, origin: str) -> None:
        """Take back a try that was good, and remember from where."""
        now, address = self._clock(), network_of(origin)
        self._addresses.give_back(address, now)
        if (user, address) not in self._known:
            self._users.give_back(user, now)
        self._known[user, address] = None
        self._known.move_to_end((user, address))
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def unwritten(self) -> int | None:
        """How many refusals the audit left out since the last that it took, if it takes another one; None: it does not.

        One measure for all: a stranger has as many addresses and names as they like, and the database has an end.
        """
        now = self._clock()
        if self._written.wait("", now) > 0:
            self._unwritten += 1
            return None
        self._written.take("", now)
        left_out, self._unwritten = self._unwritten, 0
        return left_out


def network_of(origin: str) -> str:
    """The address that is counted: an IPv4 address as it is, an IPv6 address as its /64, other texts as they are."""
    try:
        address = ipaddress.ip_address(origin.partition("%")[0])
    except ValueError:
        return origin
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, _V6_SITE), strict=False))
