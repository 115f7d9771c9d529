"""Passwords at rest: argon2id, in a few threads of its own, so that tries to sign in cannot use up the machine."""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError
from argon2.low_level import Type

_THREADS: Final = 2
"""Each hash takes 64 MiB for its time."""


class Argon2Passwords:
    """The port Passwords; the parameters are RFC 9106's for machines with little memory, and stand in each hash."""

    def __init__(self, *, time_cost: int = 3, memory_kib: int = 65536, parallelism: int = 4) -> None:
        self._hasher = PasswordHasher(
            time_cost=time_cost, memory_cost=memory_kib, parallelism=parallelism, hash_len=32, salt_len=16, type=Type.ID
        )
        self._nobodys = self._hasher.hash(secrets.token_urlsafe(32))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="glora-passwords")

    async def hash(self, password: str) -> str:
        """The PHC string: algorithm, parameters, salt, hash."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._hasher.hash, password)

    async def matches(self, password_hash: str | None, password: str) -> bool:
        """Whether the password made the hash; without one, False after the same work."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._matches, password_hash, password)

    def outdated(self, password_hash: str) -> bool:
        """Whether the hash was made with other parameters than these."""
        return self._hasher.check_needs_rehash(password_hash)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _matches(self, password_hash: str | None, password: str) -> bool:
        try:
            right = self._hasher.verify(password_hash or self._nobodys, password)
        except VerifyMismatchError:
            return False
        except (VerificationError, InvalidHashError) as error:
            raise RuntimeError("a stored password hash is damaged; set that password again") from error
        return right and password_hash is not None
