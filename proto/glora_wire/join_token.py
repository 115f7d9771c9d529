"""Join tokens: one word to paste, with everything that a device needs to trust the server and to be trusted once.

    glora_<id>_<secret>_<pin>_<check>

id: 12 characters of lower-case base32, not secret; secret: 32 random bytes in hex; pin: SHA-256 of the CA certificate
in hex; check: 8 hex digits that tell a typo or a truncated paste from a token that the server does not know.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from base64 import b32encode
from dataclasses import dataclass, field
from typing import Final, Self

from glora_wire.errors import GloraError, Reason

_PREFIX: Final = "glora"
_ID: Final = re.compile(r"[a-z2-7]{12}")
_HEX_32_BYTES: Final = re.compile(r"[0-9a-f]{64}")
_PARTS: Final = 5
_CHECK_DIGITS: Final = 8
_MAX_CHARACTERS: Final = 1024


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A token's public id, its secret (32 bytes; not in the repr) and the SHA-256 (hex) of the CA certificate in DER.

    Raises ValueError when a part has the wrong form.
    """

    token_id: str
    secret: bytes = field(repr=False)
    ca_sha256: str

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.token_id):
            raise ValueError("a token id has 12 characters of lower-case base32")
        if len(self.secret) != 32:
            raise ValueError("a token secret has 32 bytes")
        if not _HEX_32_BYTES.fullmatch(self.ca_sha256):
            raise ValueError("a CA pin has 64 lower-case hex digits")

    @classmethod
    def new(cls, ca_sha256: str) -> Self:
        """A fresh token for the CA with this SHA-256 (hex)."""
        token_id = b32encode(secrets.token_bytes(8)).decode().lower()[:12]
        return cls(token_id, secrets.token_bytes(32), ca_sha256)

    def format(self) -> str:
        """The token as one word, safe in URLs and shells; it contains the secret."""
        body = f"{_PREFIX}_{self.token_id}_{self.secret.hex()}_{self.ca_sha256}"
        return f"{body}_{_check(body)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The token in `text` (surrounding blanks are ignored); raises GloraError TOKEN_MALFORMED."""
        word = text.strip()
        if not word.startswith(f"{_PREFIX}_") or len(word) > _MAX_CHARACTERS:
            raise _malformed(f"It does not look like a join token, which starts with '{_PREFIX}_'")
        parts = word.split("_")
        if len(parts) < _PARTS:
            raise _malformed("The join token is incomplete")
        if len(parts) > _PARTS or any(character.isspace() for character in word):
            raise _malformed("There is something after the join token or inside it")
        body, _, check = word.rpartition("_")
        if not hmac.compare_digest(check.encode(), _check(body).encode()):
            raise _malformed("The join token has a typo or lacks its end (its check digits do not fit)")
        try:
            return cls(parts[1], bytes.fromhex(parts[2]), parts[3])
        except ValueError as error:
            raise _malformed(f"The join token has a part of the wrong form ({error})") from error


def _check(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:_CHECK_DIGITS]


def _malformed(what: str) -> GloraError:
    return GloraError(Reason.TOKEN_MALFORMED, f"{what}; copy the whole word that `glora device token create` printed.")
