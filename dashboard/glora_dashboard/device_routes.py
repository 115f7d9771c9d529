"""/api/v1/devices and /api/v1/tokens."""

from __future__ import annotations

from fastapi import APIRouter

from glora_dashboard.bodies import DevicesQuery, GrantedRank, Name, NewToken, PageQuery
from glora_dashboard.device_models import AgreementAnswer, WorkAnswer
from glora_dashboard.etags import IfMatch
from glora_dashboard.models import DeviceAnswer, DeviceRecordAnswer, NewTokenAnswer, PageAnswer, TokenAnswer
from glora_dashboard.permission import Operator, least
from glora_dashboard.ports import Commands, Queries
from glora_server.coordinator.people import Role


def device_routes(commands: Commands, queries: Queries) -> APIRouter:
    """Routes that list devices and change what they may do."""
    routes = APIRouter(prefix="/devices", tags=["devices"])

    @routes.get("", dependencies=[least(Role.VIEWER)])
    async def list_devices(page: PageQuery, wanted: DevicesQuery) -> PageAnswer[DeviceAnswer]:
        """Devices in the order that is asked for; the revoked ones only with state=revoked."""
        listing = await queries.devices(page, wanted)
        return PageAnswer(items=[DeviceAnswer.of(view) for view in listing.items], next_page_token=listing.next_token)

    @routes.get("/{name}", dependencies=[least(Role.VIEWER)])
    async def show_device(name: Name) -> DeviceAnswer:
        """One device and what it is doing."""
        return DeviceAnswer.of(await queries.device(name))

    @routes.get("/{name}/agreement", dependencies=[least(Role.VIEWER)])
    async def show_agreement(name: Name) -> AgreementAnswer:
        """How the device's rounds ended, and how far its updates agreed with the others'."""
        return AgreementAnswer.of(await queries.device_detail(name))

    @routes.get("/{name}/assignments", dependencies=[least(Role.VIEWER)])
    async def list_work(name: Name, page: PageQuery) -> PageAnswer[WorkAnswer]:
        """What the device was asked to do, newest first."""
        listing = await queries.device_history(name, page)
        items = [WorkAnswer.of_work(work) for work in listing.items]
        return PageAnswer(items=items, next_page_token=listing.next_token)

    @routes.post("/{name}/approve")
    async def approve_device(actor: Operator, name: Name, expected: IfMatch) -> DeviceRecordAnswer:
        """Let a pending or suspended device work."""
        return DeviceRecordAnswer.of_device(await commands.approve_device(actor, name, expected=expected))

    @routes.post("/{name}/suspend")
    async def suspend_device(actor: Operator, name: Name, expected: IfMatch) -> DeviceRecordAnswer:
        """Give a device no work until it is approved again."""
        return DeviceRecordAnswer.of_device(await commands.suspend_device(actor, name, expected=expected))

    @routes.post("/{name}/revoke")
    async def revoke_device(actor: Operator, name: Name, expected: IfMatch) -> DeviceRecordAnswer:
        """Refuse a device for good; it would have to join again with another name."""
        return DeviceRecordAnswer.of_device(await commands.revoke_device(actor, name, expected=expected))

    @routes.post("/{name}/rank")
    async def set_device_rank(actor: Operator, name: Name, body: GrantedRank, expected: IfMatch) -> DeviceRecordAnswer:
        """Grant another rank, from the device's next assignment on."""
        return DeviceRecordAnswer.of_device(await commands.set_device_rank(actor, name, body.rank, expected=expected))

    return routes


def token_routes(commands: Commands, queries: Queries) -> APIRouter:
    """Routes that make, list and revoke join tokens."""
    routes = APIRouter(prefix="/tokens", tags=["tokens"])

    @routes.get("", dependencies=[least(Role.OPERATOR)])
    async def list_tokens(page: PageQuery) -> PageAnswer[TokenAnswer]:
        """Join tokens, newest first."""
        listing = await queries.tokens(page)
        return PageAnswer(items=[TokenAnswer.of(token) for token in listing.items], next_page_token=listing.next_token)

    @routes.post("", status_code=201)
    async def create_token(actor: Operator, body: NewToken) -> NewTokenAnswer:
        """Make a join token; the answer is the only place where its text is shown."""
        record, text = await commands.create_token(
            actor,
            description=body.description,
            uses=body.uses,
            ttl_seconds=body.ttl_seconds,
            max_rank=body.max_rank,
            tags=body.tags,
            approve=body.approve,
        )
        return NewTokenAnswer(**TokenAnswer.of(record).model_dump(), join_token=text)

    @routes.post("/{token_id}/revoke")
    async def revoke_token(actor: Operator, token_id: Name) -> TokenAnswer:
        """Let no further device join with it."""
        return TokenAnswer.of(await commands.revoke_token(actor, token_id))

    return routes
