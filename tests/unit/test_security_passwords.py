"""Passwords at rest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from access_cases import cheap_passwords

from glora_server.security.passwords import Argon2Passwords


@pytest.fixture
def passwords() -> Iterator[Argon2Passwords]:
    passwords = cheap_passwords()
    yield passwords
    passwords.close()


async def test_a_hash_tells_its_own_password_from_others(passwords: Argon2Passwords) -> None:
    first, second = await passwords.hash("correct horse"), await passwords.hash("correct horse")
    assert first != second, "salted"
    assert first.startswith("$argon2id$v=19$")
    assert await passwords.matches(first, "correct horse")
    assert not await passwords.matches(first, "correct horsf")
    assert not await passwords.matches(first, "")


async def test_nobody_has_no_password(passwords: Argon2Passwords) -> None:
    for guess in ("", "correct horse"):
        assert not await passwords.matches(None, guess)


async def test_the_parameters_are_those_of_rfc_9106_and_older_ones_are_known(passwords: Argon2Passwords) -> None:
    real = Argon2Passwords()
    try:
        weak, strong = await passwords.hash("correct horse"), await real.hash("correct horse")
        assert "$m=65536,t=3,p=4$" in strong
        assert real.outdated(weak)
        assert not real.outdated(strong)
        assert await real.matches(weak, "correct horse"), "the hash says how it was made"
    finally:
        real.close()


async def test_a_damaged_hash_is_no_wrong_password(passwords: Argon2Passwords) -> None:
    with pytest.raises(RuntimeError, match="damaged"):
        await passwords.matches("$argon2id$broken", "correct horse")
