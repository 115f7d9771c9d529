"""Rows of the audit: who did what, from where, and what it was before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping

from glora_server.coordinator.model import AuditEntry
from glora_server.coordinator.people import Principal
from glora_server.coordinator.ports import UnitOfWork


def note(
    uow: UnitOfWork,
    actor: Principal,
    action: str,
    target: str,
    *,
    at: float,
    before: Mapping[str, object] | None = None,
    after: Mapping[str, object] | None = None,
    **details: object,
) -> None:
    """Append an entry, in the transaction of what it tells; `before`, `after` and `details` hold no secrets."""
    uow.audit.add(
        AuditEntry(
            at=at,
            actor=actor.name,
            origin=actor.origin,
            action=action,
            target=target,
            before_json=json.dumps(before),
            after_json=json.dumps(after),
            details_json=json.dumps(details),
        )
    )
