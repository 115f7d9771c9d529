"""A real registry of people over a database in memory, with hashes that cost next to nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from glora_server.coordinator.access import Access, SessionTimes
from glora_server.security.passwords import Argon2Passwords
from glora_server.storage.store import SqlStore

PASSWORD = "eleven green bottles"
"""What every user of a test signs in with."""


def cheap_passwords() -> Argon2Passwords:
    """The real thing, with the least work that it does."""
    return Argon2Passwords(time_cost=1, memory_kib=8, parallelism=1)


@contextlib.contextmanager
def memory_access(
    admin_token: str, clock: Callable[[], float] = time.time, times: SessionTimes | None = None
) -> Iterator[Access]:
    """Access without any user while the context is open; `admin_token` is that of the data folder."""
    store, passwords = SqlStore.open("sqlite://", clock=clock), cheap_passwords()
    try:
        yield Access(
            store=store,
            passwords=passwords,
            clock=clock,
            admin_token=lambda token: token == admin_token,
            times=times or SessionTimes(),
        )
    finally:
        passwords.close()
        store.close_now()
