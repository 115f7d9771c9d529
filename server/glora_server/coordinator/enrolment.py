"""How a device becomes a member, and stays one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import structlog

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.messages import EnrolmentRecord, EnrolRequestRecord
from glora_server.coordinator.model import AuditEntry, Device, DeviceState, TokenRecord
from glora_server.coordinator.ports import Authority, IssuedCertificate, Store, UnitOfWork
from glora_server.coordinator.token_secrets import secret_matches
from glora_server.rounds.ids import DeviceId, TokenId
from glora_wire.errors import GloraError, Reason

log = structlog.get_logger(__name__)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(slots=True, kw_only=True)
class EnrolmentService:
    """The use cases of EnrolmentService."""

    store: Store
    authority: Authority
    hub: Hub
    clock: Callable[[], float]

    async def enrol(self, request: EnrolRequestRecord, peer: str) -> EnrolmentRecord:
        """A device with a certificate; the same key asking again gets the same ones and uses no turn of the token."""
        if _NAME.fullmatch(request.name) is None:
            raise GloraError(
                Reason.NAME_INVALID,
                f"{request.name!r} cannot be a device name: use 1 to 64 letters, digits, '.', '_' and '-', "
                "not starting with a sign.",
            )
        key = self.authority.key_of(request.certificate_request_pem)
        device_id = DeviceId(f"d{hashlib.sha256(key.encode()).hexdigest()[:11]}")
        certificate = self.authority.issue(request.certificate_request_pem, device_id, request.name)
        fresh = self._fresh(request, key, certificate, device_id)
        device = await self.store.write(partial(self._enrol, request, key, fresh, peer))
        self.hub.device_changed(device.id)
        log.info("device_enrolled", device=device.id, name=device.name, peer=peer, state=device.state.value)
        return self._record(device)

    async def renew(self, device: Device, certificate_request_pem: str) -> EnrolmentRecord:
        """A new certificate for the same device and key; raises CSR_INVALID for another key."""
        if self.authority.key_of(certificate_request_pem) != device.key_sha256:
            raise GloraError(
                Reason.CSR_INVALID, "The request holds another key than the device's; a device is its key: join again."
            )
        issued = self.authority.issue(certificate_request_pem, device.id, device.name)
        saved = await self.store.write(lambda uow: uow.devices.save(_certified(uow.devices.get(device.id), issued)))
        log.info("certificate_renewed", device=device.id, name=device.name)
        return self._record(saved)

    def _enrol(self, request: EnrolRequestRecord, key: str, fresh: Device, peer: str, uow: UnitOfWork) -> Device:
        """The stored device: the known one with its good certificate, or `fresh` at the cost of a turn of the token."""
        known = uow.devices.by_key(key)
        if known is not None and known.state is DeviceState.REVOKED:
            raise GloraError(
                Reason.DEVICE_REVOKED,
                f"Device {known.name} was revoked; join with a new state folder and a new token.",
            )
        token = self._token(uow, request)
        if known is not None and known.token_id == token.id and known.certificate_expires_at > self.clock():
            return known
        self._check_token(token, request)
        uow.tokens.save(replace(token, uses=token.uses + 1))
        details = {"device": fresh.id, "peer": peer, "again": known is not None}
        uow.audit.add(
            AuditEntry(
                at=self.clock(),
                actor=f"token:{token.id}",
                action="device.enrol",
                target=request.name,
                details_json=json.dumps(details),
            )
        )
        if known is not None:
            return uow.devices.save(_certified(replace(known, token_id=token.id), fresh))
        granted = _granted(fresh, token)
        uow.devices.add(granted)
        return granted

    def _token(self, uow: UnitOfWork, request: EnrolRequestRecord) -> TokenRecord:
        """The token of the request; raises TOKEN_UNKNOWN for a wrong id and a wrong secret alike."""
        try:
            token = uow.tokens.get(TokenId(request.token_id))
        except GloraError as error:
            raise _unknown_token() from error
        if not secret_matches(request.token_secret, token.secret_sha256):
            raise _unknown_token()
        return token

    def _check_token(self, token: TokenRecord, request: EnrolRequestRecord) -> None:
        if token.revoked:
            raise GloraError(Reason.TOKEN_REVOKED, "The join token was revoked; ask the operator for a new one.")
        if self.clock() >= token.expires_at:
            raise GloraError(Reason.TOKEN_EXPIRED, "The join token has expired; ask the operator for a new one.")
        if token.uses >= token.max_uses:
            raise GloraError(
                Reason.TOKEN_USED_UP,
                f"The join token was used {token.uses} of {token.max_uses} times; ask the operator for a new one.",
            )
        if request.max_rank > token.max_rank:
            raise GloraError(
                Reason.RANK_NOT_ALLOWED,
                f"The join token allows rank {token.max_rank} at most, the device asks for {request.max_rank}; "
                f"join with --rank {token.max_rank}, or ask the operator for another token.",
                allowed=token.max_rank,
            )

    def _fresh(self, request: EnrolRequestRecord, key: str, issued: IssuedCertificate, device_id: DeviceId) -> Device:
        return Device(
            id=device_id,
            name=request.name,
            state=DeviceState.PENDING,
            declared_rank=request.max_rank,
            granted_rank=request.max_rank,
            token_id=None,
            key_sha256=key,
            certificate_pem=issued.pem,
            certificate_serial=issued.serial,
            certificate_expires_at=issued.expires_at,
            created_at=self.clock(),
            profile=request.profile,
        )

    def _record(self, device: Device) -> EnrolmentRecord:
        return EnrolmentRecord(
            device=device,
            certificate_pem=device.certificate_pem,
            authority_pem=self.authority.certificate_pem,
            expires_at=device.certificate_expires_at,
            approval_pending=device.state is DeviceState.PENDING,
        )


def _granted(device: Device, token: TokenRecord) -> Device:
    """The device with what its token gives."""
    return replace(
        device,
        state=DeviceState.APPROVED if token.approve else DeviceState.PENDING,
        granted_rank=device.declared_rank or token.max_rank,
        tags=token.tags,
        token_id=token.id,
    )


def _certified(device: Device, other: Device | IssuedCertificate) -> Device:
    """The device with another certificate."""
    if isinstance(other, Device):
        other = IssuedCertificate(
            pem=other.certificate_pem, serial=other.certificate_serial, expires_at=other.certificate_expires_at
        )
    return replace(
        device,
        certificate_pem=other.pem,
        certificate_serial=other.serial,
        certificate_expires_at=other.expires_at,
    )


def _unknown_token() -> GloraError:
    return GloraError(
        Reason.TOKEN_UNKNOWN, "The server does not know this join token; check that it was made on this server."
    )
