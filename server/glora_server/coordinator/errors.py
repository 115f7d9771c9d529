"""Errors that several use cases raise alike."""

from __future__ import annotations

import errno
from typing import TypeVar

from glora_server.coordinator.model import Device, Run
from glora_server.coordinator.people import Principal, Role
from glora_server.rounds.assignment import Assignment
from glora_wire.errors import GloraError, Reason

Changing = TypeVar("Changing", Device, Run)


def require_role(principal: Principal, role: Role) -> Principal:
    """The principal, when their role includes `role`; raises ROLE_TOO_LOW."""
    if not principal.role.includes(role):
        raise GloraError(
            Reason.ROLE_TOO_LOW,
            f"{principal.name} has the role {principal.role} here, and this needs {role}; ask an admin.",
            role=role,
        )
    return principal


def api_token_unknown(token_id: str) -> GloraError:
    """There is no such API token, or it is somebody else's: who asks cannot tell which."""
    return GloraError(
        Reason.API_TOKEN_UNKNOWN, f"There is no API token {token_id!r}; see `glora api-token list`.", token=token_id
    )


def not_yours(assignment_id: str) -> GloraError:
    """A device asked for an assignment that is not its own: it learns no more than that it does not exist."""
    return GloraError(
        Reason.ASSIGNMENT_UNKNOWN, f"There is no assignment {assignment_id} for this device.", assignment=assignment_id
    )


def assignment_closed(assignment: Assignment) -> GloraError:
    """A device went on with an assignment of which nothing is expected any more."""
    return GloraError(
        Reason.ASSIGNMENT_CLOSED,
        f"The assignment is {assignment.phase.value}: {assignment.message or 'its round is over'}",
        assignment=assignment.id,
        phase=assignment.phase.value,
    )


def storage_error(error: OSError) -> GloraError:
    """What a failed write means for the one who sent the bytes."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return GloraError(
            Reason.STORAGE_FULL, "The server's disk is full; the operator has been told, try again later."
        )
    return GloraError(Reason.INTERNAL, f"The server could not store the bytes: {error.strerror}.")


def unchanged(record: Changing, expected: int | None) -> Changing:
    """The record, when it has the row version that whoever changes it knows (None: any); raises STALE_STATE."""
    if expected is None or record.row_version == expected:
        return record
    raise GloraError(
        Reason.STALE_STATE,
        f"{record.name} was changed since you looked at it (its row_version is {record.row_version}, not {expected}); "
        "look at it again and repeat the change.",
        row_version=record.row_version,
        expected=expected,
    )
