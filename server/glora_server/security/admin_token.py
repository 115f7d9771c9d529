"""The bearer token of the administration interface: a file that only the server's user may read."""

from __future__ import annotations

import hmac
import re
import secrets
from pathlib import Path
from typing import Final, Self

from glora_server.security.private_files import create_private, read_private
from glora_wire.errors import GloraError, Reason

FILE_NAME: Final = "admin.token"
_FORM: Final = re.compile(r"[A-Za-z0-9_-]{32,256}")


class AdminToken:
    """The token; its text is kept out of the repr and out of every error."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "AdminToken(...)"

    @classmethod
    def open(cls, data_dir: Path) -> Self:
        """The token of the data folder, made on the first start; raises DATA_DIR_UNUSABLE."""
        path = data_dir / FILE_NAME
        if read_private(path) is None:
            create_private(path, f"{secrets.token_urlsafe(32)}\n".encode())
        return cls(read_admin_token(data_dir))

    def matches(self, offered: str) -> bool:
        """Whether `offered` is the token; takes the same time however much of it is right."""
        return hmac.compare_digest(offered.encode(), self._text.encode())

    def require(self, authorization: str | None) -> None:
        """Return when the HTTP header is "Bearer TOKEN"; raises ADMIN_TOKEN_INVALID."""
        scheme, _, offered = (authorization or "").partition(" ")
        if scheme.lower() == "bearer" and self.matches(offered.strip()):
            return
        what = "The administration token is wrong" if authorization else "This needs the administration token"
        raise GloraError(
            Reason.ADMIN_TOKEN_INVALID,
            f"{what}. It stands in the file {FILE_NAME} of the server's data folder, which the user that runs the "
            "server can read.",
        )


def read_admin_token(data_dir: Path) -> str:
    """The text of the token of an existing data folder; raises DATA_DIR_UNUSABLE (also where there is none)."""
    path = data_dir / FILE_NAME
    content = read_private(path)
    if content is None:
        raise GloraError(
            Reason.DATA_DIR_UNUSABLE,
            f"There is no {path}; the server writes it when it starts for the first time.",
            path=path,
        )
    text = content.decode("ascii", errors="replace").strip()
    if not _FORM.fullmatch(text):
        raise GloraError(
            Reason.DATA_DIR_UNUSABLE,
            f"{path} does not hold a token (one word of 32 to 256 letters, digits, '-' and '_'). Delete it and start "
            "the server again, which makes a new one.",
            path=path,
        )
    return text
