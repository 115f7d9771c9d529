"""Secrets of join tokens at rest: only their hash is kept."""

from __future__ import annotations

import hashlib
import hmac


def secret_sha256(secret_hex: str) -> str:
    """Hex SHA-256 of a token's secret in the spelling that travels (64 hex digits).

    A plain hash is enough: the secret is 32 random bytes, so there is no dictionary to try.
    """
    return hashlib.sha256(secret_hex.encode()).hexdigest()


def secret_matches(secret_hex: str, stored_sha256: str) -> bool:
    """Whether the secret is the one with the stored hash; takes the same time either way."""
    return hmac.compare_digest(secret_sha256(secret_hex).encode(), stored_sha256.encode())
