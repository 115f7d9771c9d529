"""What the use cases of access share: the parts they need, names, secrets, waking who must be asked again."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from glora_server.coordinator.access_limits import SignInLimits
from glora_server.coordinator.hub import Signals
from glora_server.coordinator.people import ADMIN_TOKEN_NAME
from glora_server.coordinator.ports import Passwords, Store
from glora_wire.errors import GloraError, Reason

MIN_PASSWORD: Final = 10
MAX_PASSWORD: Final = 256
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")
_CHANGED: Final = "access"


@dataclass(kw_only=True)
class AccessBase:
    """The parts that are needed to know people."""

    store: Store
    passwords: Passwords
    clock: Callable[[], float]
    signals: Signals = field(default_factory=Signals)
    limits: SignInLimits = field(init=False)

    def __post_init__(self) -> None:
        """Count tries with a password from now on."""
        self.limits = SignInLimits(self.clock)

    @property
    def revision(self) -> int:
        """Grows whenever this process took something away from somebody."""
        return self.signals.revision(_CHANGED)

    async def changed(self, revision: int, timeout: float) -> int:  # noqa: ASYNC109 - a long wait has one
        """The revision as soon as it is another one, or after `timeout` seconds."""
        return await self.signals.wait(_CHANGED, revision, timeout)

    def _tell(self) -> None:
        """Wake those who hold a connection open, so that they ask whether they still may."""
        self.signals.notify(_CHANGED)


def sha256(secret: str) -> str:
    """Hex SHA-256 of a secret; a plain hash is enough for 256 random bits, there is no dictionary to try."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def user_name(text: str) -> str | None:
    """The name as it is stored (small letters); None where no user can have it."""
    name = text.strip().lower()
    return name if _NAME.fullmatch(name) and name != ADMIN_TOKEN_NAME else None


def stored_name(text: str) -> str:
    """The name to look for, also where nobody can have it."""
    return user_name(text) or text


def new_user_name(text: str) -> str:
    """The name as it is stored; raises NAME_INVALID."""
    name = user_name(text)
    if name is None:
        raise GloraError(
            Reason.NAME_INVALID,
            "A user's name has 1 to 64 letters, digits, '.', '_', '@' or '-', begins with a letter or a digit, and is "
            f"not {ADMIN_TOKEN_NAME}.",
        )
    return name


def normal_password(password: str) -> str:
    """The password as it is hashed: the same however a keyboard composes its letters."""
    return unicodedata.normalize("NFKC", password)


def checked_password(password: str, name: str) -> str:
    """The password as it is hashed; raises PASSWORD_REFUSED when it would be guessed, without repeating it."""
    normal = normal_password(password)
    if not MIN_PASSWORD <= len(normal) <= MAX_PASSWORD:
        raise _refused(f"it must have {MIN_PASSWORD} to {MAX_PASSWORD} characters")
    if name in normal.lower():
        raise _refused("it must not contain the user's name")
    if len(set(normal)) < 5:
        raise _refused("it must have at least 5 different characters")
    return normal


def _refused(what: str) -> GloraError:
    return GloraError(Reason.PASSWORD_REFUSED, f"This password is not taken: {what}.")
