"""People for tests."""

from __future__ import annotations

from glora_server.coordinator.people import Credential, Principal, Role


def principal(name: str, role: Role = Role.ADMIN) -> Principal:
    """Somebody who signed in with a browser."""
    return Principal(name=name, role=role, credential=Credential.SESSION, credential_id=f"s-{name}", origin="192.0.2.7")


ADMIN = principal("admin")
EVE = principal("eve", Role.OPERATOR)
