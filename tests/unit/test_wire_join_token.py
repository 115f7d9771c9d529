"""Join tokens: a typo, a cut and a stranger are told apart."""

from __future__ import annotations

import re

import pytest

from glora_wire.errors import GloraError, Reason
from glora_wire.join_token import JoinToken

PIN = "ab" * 32


def test_round_trip_and_form() -> None:
    token = JoinToken.new(PIN)
    text = token.format()
    assert JoinToken.parse(text) == token
    assert JoinToken.parse(f"  {text}\n") == token
    assert re.fullmatch(r"glora_[a-z2-7]{12}_[0-9a-f]{64}_[0-9a-f]{64}_[0-9a-f]{8}", text)
    assert token.ca_sha256 == PIN
    assert token.secret.hex() not in repr(token)


def test_tokens_differ() -> None:
    tokens = {JoinToken.new(PIN).format() for _ in range(50)}
    assert len({text.split("_")[1] for text in tokens}) == 50
    assert len({text.split("_")[2] for text in tokens}) == 50


def test_every_truncation_and_every_typo_is_malformed() -> None:
    text = JoinToken.new(PIN).format()
    broken = [text[:end] for end in range(len(text))]
    broken += [text[:at] + ("x" if text[at] != "x" else "y") + text[at + 1 :] for at in range(len(text))]
    broken += [f"{text}0", f"{text}_0", f"{text} {text}", text.replace("_", " ", 1), text.upper(), "x" * 10_000]
    for word in broken:
        with pytest.raises(GloraError) as caught:
            JoinToken.parse(word)
        assert caught.value.reason is Reason.TOKEN_MALFORMED
        assert "glora device token create" in caught.value.message
        assert text.split("_")[2] not in caught.value.message


@pytest.mark.parametrize(
    ("token_id", "secret", "pin"),
    [
        ("short", bytes(32), PIN),
        ("a" * 12, bytes(31), PIN),
        ("a" * 12, bytes(32), PIN.upper()),
        ("A" * 12, bytes(32), PIN),
    ],
)
def test_impossible_parts(token_id: str, secret: bytes, pin: str) -> None:
    with pytest.raises(ValueError, match=r"token|pin"):
        JoinToken(token_id, secret, pin)
