"""The rules of the gate: which paths are open, which names this server answers to, which pages may use its cookie."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import Scope

from glora_wire.errors import GloraError, Reason

SESSION_COOKIE: Final = "glora_session"
LOGIN_PATH: Final = "/login"
LOGIN_STYLE_PATH: Final = "/login.css"
SIGN_IN_PATH: Final = "/api/v1/sign-in"
"""Where the command line makes a token with a password."""
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", LOGIN_PATH, LOGIN_STYLE_PATH, "/logout", SIGN_IN_PATH})
"""What anybody may ask for; compared letter by letter, so that no spelling of another path is among them."""
_METRICS_PATH: Final = "/metrics"
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_SCHEMES: Final = {"ws": "http", "wss": "https"}


@dataclass(frozen=True, slots=True)
class GateRules:
    """What the settings say about the gate; `public_names` are names of this server besides localhost."""

    public_names: frozenset[str] = frozenset()
    metrics_open: bool = False

    @classmethod
    def of(cls, public_names: Iterable[str], *, metrics_open: bool) -> GateRules:
        """The rules for names in any spelling."""
        return cls(frozenset(map(_plain, public_names)), metrics_open)

    def is_open(self, path: str) -> bool:
        """Whether anybody may ask for the path."""
        return path in OPEN_PATHS or (self.metrics_open and path == _METRICS_PATH)

    def check_host(self, headers: Headers) -> None:
        """Refuse names that are not this server's; raises HOST_REFUSED.

        A page of a stranger can point a name of its own at this address (DNS rebinding); its requests then count as
        same-origin, but carry that name. It cannot do so with an address in figures, so that those are all taken.
        """
        name = _plain(_host_of(headers.get("host", "")))
        if name == "localhost" or name.endswith(".localhost") or name in self.public_names or _is_address(name):
            return
        raise GloraError(
            Reason.HOST_REFUSED,
            f"This server does not go by the name {name!r}. Use its address, or add the name to http.public_names.",
            name=name,
        )


def check_same_origin(scope: Scope, headers: Headers) -> None:
    """Refuse what another site's page asks with this browser's cookie; raises ORIGIN_REFUSED.

    What changes something, and every websocket, must say that it comes from this server. What only reads may say
    nothing (a person typed the address, or a browser of old), but must not say that it comes from elsewhere, unless
    somebody followed a link.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is not None:
        good = origin.lower() == own_origin(scope, headers)
    elif scope["type"] == "websocket":
        good = False
    elif scope["method"] not in _SAFE:
        good = site == "same-origin"
    else:
        good = site in {None, "none", "same-origin"} or headers.get("sec-fetch-mode") == "navigate"
    if not good:
        raise GloraError(
            Reason.ORIGIN_REFUSED,
            f"This request did not come from a page of this server ({own_origin(scope, headers)}). Behind a proxy, "
            "name it in http.proxies, so that what it says about the address is believed.",
        )


def own_origin(scope: Scope, headers: Headers) -> str:
    """The origin of this server as the browser knows it."""
    scheme = str(scope.get("scheme", "http"))
    return f"{_SCHEMES.get(scheme, scheme)}://{headers.get('host', '').lower()}"


def is_encrypted(scope: Scope) -> bool:
    """Whether the browser reached this server through TLS."""
    return scope.get("scheme") in {"https", "wss"}


def wants_page(scope: Scope, headers: Headers) -> bool:
    """Whether a person is waiting for a page, rather than a program for an answer."""
    if scope["method"] not in {"GET", "HEAD"} or scope["path"].lower().startswith("/api"):
        return False
    return headers.get("sec-fetch-mode") == "navigate" or "text/html" in headers.get("accept", "")


def login_address(scope: Scope) -> str:
    """Where to sign in, and come back to what was asked for."""
    query = scope.get("query_string", b"").decode("latin-1")
    wanted = scope["path"] + (f"?{query}" if query else "")
    return LOGIN_PATH if wanted == "/" else f"{LOGIN_PATH}?next={quote(wanted, safe='')}"


def safe_next(address: str) -> str:
    """The address, when it is a path of this server and not the login's; else the front page."""
    plain = all(32 < ord(letter) < 127 for letter in address)
    local = address.startswith("/") and not address.startswith("//") and "\\" not in address
    return address if plain and local and not address.startswith((LOGIN_PATH, "/logout")) else "/"


def _host_of(header: str) -> str:
    if header.startswith("["):
        name, closed, _ = header[1:].partition("]")
        return name if closed else header
    return header.partition(":")[0] if header.count(":") <= 1 else header


def _plain(name: str) -> str:
    return name.strip().lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
