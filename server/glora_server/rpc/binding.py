"""Why a port cannot be taken, found out before gRPC tries: its own error says only that it failed."""

from __future__ import annotations

import errno
import socket
from typing import Final

from glora_wire.errors import GloraError, Reason

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


def target(host: str, port: int) -> str:
    """The address as gRPC spells it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_free(host: str, port: int, section: str) -> None:
    """Return when the port can be listened at; raises PORT_IN_USE, SETTINGS_INVALID naming "section.port" or ".host".

    Asks the name server for `host`, so call it in a thread.
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise GloraError(
            Reason.SETTINGS_INVALID, f"{section}.host: {host!r} is no address of this machine ({error}).", host=host
        ) from error
    for family, kind, protocol, _, address in places:
        if family in _FAMILIES:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                    probe.listen(1)
                except OSError as error:
                    raise _refusal(host, port, section, error) from error


def in_use(host: str, port: int, section: str) -> GloraError:
    """The error for a port that somebody else has."""
    return GloraError(
        Reason.PORT_IN_USE,
        f"Port {port} of {host} is in use by another program, perhaps another glora server. Stop that one, or choose "
        f"another port: {section}.port in the settings file or {_variable(section)}_PORT in the environment.",
        port=port,
        setting=f"{section}.port",
    )


def _refusal(host: str, port: int, section: str, error: OSError) -> GloraError:
    if error.errno == errno.EADDRINUSE:
        return in_use(host, port, section)
    if error.errno == errno.EACCES:
        what = f"{section}.port: this user may not listen at port {port}; choose one above 1023"
    else:
        what = f"{section}.host: cannot listen at {host} ({error.strerror or error})"
    return GloraError(Reason.SETTINGS_INVALID, f"{what}.", host=host, port=port)


def _variable(section: str) -> str:
    return f"GLORA__{section.upper()}_"
