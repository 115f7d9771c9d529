"""`glora user …`: who may sign in, and what they may do."""

from __future__ import annotations

from typing import Annotated

import typer

from glora_cli.connection import connected
from glora_cli.group import group
from glora_cli.login_command import PasswordStdin, read_password
from glora_cli.output import JsonFlag, YesFlag, make_sure, moment, show_json, show_json_list, show_table
from glora_cli.rest import Api, at
from glora_dashboard.access_models import UserAnswer
from glora_server.coordinator.people import Role

app = group(
    "Say who may come in: viewers look, operators run the federation, admins care for users.",
    "glora user create ada --role operator",
    "glora user set-role ada admin",
    "glora user set-password admin",
    "glora user list",
)
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the user.")]


def create_user(
    api: Api,
    name: _Name,
    *,
    role: Annotated[Role, typer.Option(help="What the user may do.")] = Role.VIEWER,
    password_stdin: PasswordStdin = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a user; the password is asked for, and best changed by the user at once."""
    password = read_password(f"Password for {name}", from_stdin=password_stdin, twice=True)
    _tell(api.post(UserAnswer, "/users", {"name": name, "role": role, "password": password}), as_json=as_json)


def list_users(api: Api, *, as_json: JsonFlag = False) -> None:
    """List users."""
    users = api.every(UserAnswer, "/users")
    if as_json:
        show_json_list(users)
        return
    rows = [(user.name, user.role, _state(user), moment(user.last_sign_in_at)) for user in users]
    show_table(("NAME", "ROLE", "STATE", "SIGNED IN"), rows, "There are no users.")


def set_role(
    api: Api, name: _Name, role: Annotated[Role, typer.Argument(help="The new role.")], *, as_json: JsonFlag = False
) -> None:
    """Give another role; the user must sign in again."""
    _tell(api.post(UserAnswer, at("users", name, "role"), {"role": role}), as_json=as_json)


def set_password(api: Api, name: _Name, *, password_stdin: PasswordStdin = False, as_json: JsonFlag = False) -> None:
    """Set another password; the user must sign in again. Works with admin.token, also when nobody can sign in."""
    password = read_password(f"New password for {name}", from_stdin=password_stdin, twice=True)
    _tell(api.post(UserAnswer, at("users", name, "password"), {"password": password}), as_json=as_json)


def disable_user(api: Api, name: _Name, *, as_json: JsonFlag = False) -> None:
    """Let nobody in by this name, at once: neither with the password nor with a token."""
    _tell(api.post(UserAnswer, at("users", name, "disable")), as_json=as_json)


def enable_user(api: Api, name: _Name, *, as_json: JsonFlag = False) -> None:
    """Let a disabled user in again; tokens that were not revoked hold again."""
    _tell(api.post(UserAnswer, at("users", name, "enable")), as_json=as_json)


def remove_user(api: Api, name: _Name, *, yes: YesFlag = False, as_json: JsonFlag = False) -> None:
    """Forget a user with all sessions and API tokens; the audit keeps the name."""
    make_sure(f"Remove the user {name} with all API tokens?", yes=yes)
    user = api.post(UserAnswer, at("users", name, "remove"))
    if as_json:
        show_json(user)
    else:
        typer.echo(f"{user.name}: removed")


def _tell(user: UserAnswer, *, as_json: bool) -> None:
    if as_json:
        show_json(user)
    else:
        typer.echo(f"{user.name}: {user.role}, {_state(user)}")


def _state(user: UserAnswer) -> str:
    return "disabled" if user.disabled else "enabled"


for _name, _command in (
    ("create", create_user),
    ("list", list_users),
    ("set-role", set_role),
    ("set-password", set_password),
    ("disable", disable_user),
    ("enable", enable_user),
    ("remove", remove_user),
):
    app.command(_name)(connected(_command))
