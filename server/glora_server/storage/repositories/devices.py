"""Devices and join tokens."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import bindparam, or_, update

from glora_server.coordinator.model import Device, DeviceState, Listing, Page, Profile, TokenRecord
from glora_server.rounds.ids import DeviceId, TokenId
from glora_server.storage.models import DeviceRow, TokenRow
from glora_server.storage.repositories.rows import (
    Order,
    Session,
    add_row,
    add_unless_there,
    built,
    columns_of,
    page_of,
    rows_where,
    save_row,
    values_of,
)
from glora_wire.errors import GloraError, Reason


class DeviceRepository:
    """Enrolled devices."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, device: Device) -> None:
        """Store a new device; raises NAME_TAKEN, and STALE_STATE when its key was enrolled a moment ago."""
        if add_unless_there(self._session, DeviceRow, values_of(device)):
            return
        if self.by_key(device.key_sha256) is not None:
            raise GloraError(Reason.STALE_STATE, "A device with this key has just been enrolled; ask again.")
        raise _name_taken(device.name)

    def get(self, device_id: DeviceId) -> Device:
        """The device; raises DEVICE_UNKNOWN."""
        row = self._session.first(rows_where(DeviceRow, "id"), {"id": device_id}, lock=True)
        if row is None:
            raise _unknown(device_id)
        return built(Device, row)

    def by_name(self, name: str) -> Device:
        """The device of that name or id, not revoked ones first; raises DEVICE_UNKNOWN."""
        statement = (
            columns_of(DeviceRow)
            .where(or_(DeviceRow.name == name, DeviceRow.id == name))
            .order_by(DeviceRow.state == DeviceState.REVOKED, DeviceRow.created_at.desc())
            .limit(1)
        )
        row = self._session.first(statement, lock=True)
        if row is None:
            raise _unknown(name)
        return built(Device, row)

    def by_key(self, key_sha256: str) -> Device | None:
        """The device of that public key."""
        row = self._session.first(rows_where(DeviceRow, "key_sha256"), {"key_sha256": key_sha256}, lock=True)
        return None if row is None else built(Device, row)

    def save(self, device: Device) -> Device:
        """Store a change; returns it with its new row version; raises STALE_STATE, NAME_TAKEN."""
        if device.state is not DeviceState.REVOKED:
            taken = columns_of(DeviceRow).where(
                DeviceRow.name == device.name, DeviceRow.id != device.id, DeviceRow.state != DeviceState.REVOKED
            )
            if self._session.first(taken) is not None:
                raise _name_taken(device.name)
        return save_row(self._session, DeviceRow, device, what=f"The device {device.name!r}")

    def seen(self, seen: Mapping[DeviceId, tuple[float, Profile]]) -> None:
        """Store last signs of life and profiles, whatever the row version."""
        if not seen:
            return
        statement = (
            update(DeviceRow)
            .where(DeviceRow.id == bindparam("device"))
            .values(last_seen_at=bindparam("at"), profile=bindparam("said"))
        )
        # Always in the same order, so that two replicas can not block each other.
        values = [{"device": device, "at": seen[device][0], "said": seen[device][1]} for device in sorted(seen)]
        self._session.connection.execute(statement, values)

    def all(self) -> tuple[Device, ...]:
        """Every device that is not revoked, in order of enrolment."""
        statement = (
            columns_of(DeviceRow)
            .where(DeviceRow.state != DeviceState.REVOKED)
            .order_by(DeviceRow.created_at, DeviceRow.id)
        )
        return tuple(built(Device, row) for row in self._session.rows(statement))


class TokenRepository:
    """Join tokens."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, token: TokenRecord) -> None:
        """Store a new token."""
        add_row(self._session, TokenRow, values_of(token))

    def get(self, token_id: TokenId) -> TokenRecord:
        """The token; raises TOKEN_UNKNOWN."""
        row = self._session.first(rows_where(TokenRow, "id"), {"id": token_id}, lock=True)
        if row is None:
            raise GloraError(
                Reason.TOKEN_UNKNOWN,
                f"There is no join token {token_id!r}; see `glora device token list`.",
                token=token_id,
            )
        return built(TokenRecord, row)

    def save(self, token: TokenRecord) -> TokenRecord:
        """Store a change; raises STALE_STATE."""
        return save_row(self._session, TokenRow, token, what=f"The join token {token.id}")

    def list(self, page: Page) -> Listing[TokenRecord]:
        """Tokens, newest first."""
        order = Order((TokenRow.created_at, TokenRow.id), (float, str), descending=True)
        return page_of(self._session, columns_of(TokenRow), order, page, lambda row: built(TokenRecord, row))


def _unknown(name: str) -> GloraError:
    return GloraError(Reason.DEVICE_UNKNOWN, f"There is no device {name!r}; see `glora device list`.", device=name)


def _name_taken(name: str) -> GloraError:
    return GloraError(
        Reason.NAME_TAKEN, f"Another device is named {name!r}; choose another name, or revoke that device.", name=name
    )
