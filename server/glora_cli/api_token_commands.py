"""`glora api-token …`: bearer tokens for programs."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from glora_cli.connection import connected
from glora_cli.group import group
from glora_cli.output import JsonFlag, moment, show_json, show_json_list, show_table
from glora_cli.rest import Api, at
from glora_cli.values import seconds
from glora_dashboard.access_models import ApiTokenAnswer, NewApiTokenAnswer
from glora_server.coordinator.people import Role

app = group(
    "Tokens with which programs use the API; devices join with `glora device token` instead.",
    "glora api-token create --name prometheus --role viewer --expires 365d",
    "glora api-token list",
    "glora api-token revoke ID",
)


def create_api_token(
    api: Api,
    *,
    name: Annotated[str, typer.Option(help="What it is for.")],
    role: Annotated[Role, typer.Option(help="What it may do at most.")] = Role.VIEWER,
    expires: Annotated[str, typer.Option(metavar="TIME", help='How long it holds: 12h, 30d, "never".')] = "90d",
    user: Annotated[str, typer.Option(help="Whose it is (default: your own; admins only).")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Make an API token and print it; it is not shown again."""
    body = {
        "name": name,
        "role": role,
        "ttl_seconds": None if expires == "never" else seconds(expires),
        "user": user or None,
    }
    made = api.post(NewApiTokenAnswer, "/api-tokens", body)
    if as_json:
        show_json(made)
        return
    typer.echo(made.token)
    end = "for ever" if made.expires_at is None else f"until {moment(made.expires_at)}"
    typer.echo(f"For {made.user}, {made.role}, {end}. Revoke it with: glora api-token revoke {made.id}", err=True)


def list_api_tokens(
    api: Api,
    *,
    user: Annotated[str, typer.Option(help="Only tokens of this user (admins).")] = "",
    as_json: JsonFlag = False,
) -> None:
    """List API tokens: your own, or as an admin everybody's; never their text."""
    tokens = api.every(ApiTokenAnswer, "/api-tokens", {"user": user} if user else None)
    if as_json:
        show_json_list(tokens)
        return
    rows = [
        (
            token.id,
            token.user,
            token.name,
            token.role,
            _state(token),
            moment(token.expires_at),
            moment(token.used_at),
        )
        for token in tokens
    ]
    columns = ("ID", "USER", "NAME", "ROLE", "STATE", "EXPIRES", "USED")
    show_table(columns, rows, "There are no API tokens; make one with: glora api-token create --name …")


def revoke_api_token(
    api: Api,
    token_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the token.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Refuse a token from now on."""
    token = api.post(ApiTokenAnswer, at("api-tokens", token_id, "revoke"))
    if as_json:
        show_json(token)
    else:
        typer.echo(f"{token.id}: revoked")


def _state(token: ApiTokenAnswer) -> str:
    if token.revoked:
        return "revoked"
    return "expired" if token.expires_at is not None and token.expires_at <= time.time() else "valid"


app.command("create")(connected(create_api_token))
app.command("list")(connected(list_api_tokens))
app.command("revoke")(connected(revoke_api_token))
