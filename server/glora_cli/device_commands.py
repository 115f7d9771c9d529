"""`glora device …`: what devices may do, and the tokens that they join with."""

from __future__ import annotations

from typing import Annotated

import typer

from glora_cli.connection import connected
from glora_cli.group import group
from glora_cli.output import (
    JsonFlag,
    YesFlag,
    make_sure,
    moment,
    share,
    show_json,
    show_json_list,
    show_pairs,
    show_table,
    size,
)
from glora_cli.rest import Api, at
from glora_cli.token_commands import app as token_app
from glora_dashboard.models import AssignmentAnswer, DeviceAnswer, DeviceRecordAnswer

app = group(
    "Enrol, list, approve and revoke devices.",
    "glora device token create --max-rank 8   print a token; the device joins with it",
    "glora device list                        who is there, and what they are doing",
    "glora device suspend pi-7                no more work for pi-7, until approved again",
)
app.add_typer(token_app, name="token")
_NAME = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the device.")]


def list_devices(api: Api, *, as_json: JsonFlag = False) -> None:
    """List devices: state, rank, whether they are there and what they are doing."""
    devices = api.every(DeviceAnswer, "/devices")
    if as_json:
        show_json_list(devices)
        return
    rows = [
        (
            device.name,
            device.state,
            device.granted_rank,
            "online" if device.online else f"seen {moment(device.last_seen_at)}",
            device.profile.training_rows,
            doing(device),
            device.tags,
        )
        for device in devices
    ]
    empty = "No device has joined yet; make a token with: glora device token create"
    show_table(("NAME", "STATE", "RANK", "THERE", "ROWS", "DOING", "TAGS"), rows, empty)


def show_device(api: Api, name: _NAME, *, as_json: JsonFlag = False) -> None:
    """Show one device."""
    device = api.get(DeviceAnswer, at("devices", name))
    if as_json:
        show_json(device)
        return
    profile = device.profile
    show_pairs(
        [
            ("name", device.name),
            ("id", device.id),
            ("state", device.state),
            ("rank", f"{device.granted_rank} granted, {device.declared_rank} declared"),
            ("tags", device.tags),
            ("there", "online" if device.online else f"last seen {moment(device.last_seen_at)}"),
            ("doing", doing(device)),
            ("enrolled", moment(device.created_at)),
            ("certificate until", moment(device.certificate_expires_at)),
            ("machine", f"{profile.platform}, {profile.cpu_count} cores, {size(profile.memory_bytes)}"),
            ("accelerators", profile.accelerators),
            ("rows", f"{profile.training_rows} to train, {profile.evaluation_rows} to evaluate"),
            ("version", profile.software_version),
        ]
    )


def approve_device(api: Api, name: _NAME, *, as_json: JsonFlag = False) -> None:
    """Let a pending or suspended device work."""
    _report(api.post(DeviceRecordAnswer, at("devices", name, "approve")), as_json=as_json)


def suspend_device(api: Api, name: _NAME, *, as_json: JsonFlag = False) -> None:
    """Give a device no work until it is approved again."""
    _report(api.post(DeviceRecordAnswer, at("devices", name, "suspend")), as_json=as_json)


def revoke_device(
    api: Api,
    name: _NAME,
    *,
    yes: YesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Refuse a device for good: its certificate counts no more, at once."""
    make_sure(f"Revoke {name}? It cannot be undone.", yes=yes)
    _report(api.post(DeviceRecordAnswer, at("devices", name, "revoke")), as_json=as_json)


def set_device_rank(
    api: Api,
    name: _NAME,
    rank: Annotated[int, typer.Argument(min=1, max=4096, help="Largest rank that it is handed.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Grant a device another rank, from its next assignment on."""
    _report(api.post(DeviceRecordAnswer, at("devices", name, "rank"), {"rank": rank}), as_json=as_json)


def doing(device: DeviceAnswer) -> str:
    """What a device is doing, in a few words."""
    if device.current is None:
        return f"{device.measuring}: measuring" if device.measuring else ""
    return f"{device.run}: {progress(device.current)}"


def progress(assignment: AssignmentAnswer) -> str:
    """How far an assignment is, in a few words."""
    report = assignment.progress
    if report is None:
        return assignment.phase
    return f"{report.phase} {share(report.done / report.total)}" if report.total else report.phase


def _report(device: DeviceRecordAnswer, *, as_json: bool) -> None:
    if as_json:
        show_json(device)
    else:
        typer.echo(f"{device.name}: {device.state}, rank {device.granted_rank}")


app.command("list")(connected(list_devices))
app.command("show")(connected(show_device))
app.command("approve")(connected(approve_device))
app.command("suspend")(connected(suspend_device))
app.command("revoke")(connected(revoke_device))
app.command("set-rank")(connected(set_device_rank))
