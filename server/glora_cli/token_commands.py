"""`glora device token …`: join tokens."""

from __future__ import annotations

import time
from typing import Annotated, Final

import typer

from glora_cli.connection import connected
from glora_cli.group import group
from glora_cli.output import JsonFlag, moment, show_json, show_json_list, show_table
from glora_cli.rest import Api, at
from glora_cli.values import seconds
from glora_dashboard.models import NewTokenAnswer, SystemAnswer, TokenAnswer

DEFAULT_ENROLMENT_PORT: Final = 7444
app = group(
    "Make, list and revoke join tokens.",
    "glora device token create --uses 3 --max-rank 8 --expires 2h --tag lab",
    "glora device token list",
)


def create_token(
    api: Api,
    *,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    uses: Annotated[int, typer.Option(min=1, help="Devices that may join with it.")] = 1,
    expires: Annotated[str, typer.Option(metavar="TIME", help="How long it is valid: 30m, 24h, 7d.")] = "24h",
    max_rank: Annotated[int, typer.Option(min=1, max=4096, help="Largest rank that its devices are granted.")] = 16,
    tag: Annotated[list[str] | None, typer.Option(help="A tag that its devices get; may be repeated.")] = None,
    hold: Annotated[bool, typer.Option("--hold", help="Its devices wait for `glora device approve`.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a join token and print it; it is not shown again.

    \b
    TOKEN=$(glora device token create --max-rank 8)
    glora client join --server HOST --token "$TOKEN" --name pi-7      (on the device)
    """
    made = api.post(
        NewTokenAnswer,
        "/tokens",
        {
            "description": description,
            "uses": uses,
            "ttl_seconds": seconds(expires),
            "max_rank": max_rank,
            "tags": tag or [],
            "approve": not hold,
        },
    )
    if as_json:
        show_json(made)
        return
    typer.echo(made.join_token)
    place = _join_at(api)
    devices = "one device" if made.max_uses == 1 else f"{made.max_uses} devices"
    typer.echo(
        f"For {devices}, rank up to {made.max_rank}, until {moment(made.expires_at)}. On the device:\n"
        f"  glora client join --server {place} --token TOKEN --name NAME",
        err=True,
    )


def list_tokens(api: Api, *, as_json: JsonFlag = False) -> None:
    """List join tokens; what they are, never their text."""
    tokens = api.every(TokenAnswer, "/tokens")
    if as_json:
        show_json_list(tokens)
        return
    rows = [
        (
            token.id,
            _state(token),
            f"{token.uses}/{token.max_uses}",
            token.max_rank,
            moment(token.expires_at),
            token.tags,
            token.description,
        )
        for token in tokens
    ]
    empty = "There are no tokens; make one with: glora device token create"
    show_table(("ID", "STATE", "USED", "MAX RANK", "EXPIRES", "TAGS", "DESCRIPTION"), rows, empty)


def revoke_token(
    api: Api,
    token_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the token.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Let no further device join with a token; devices that joined stay."""
    token = api.post(TokenAnswer, at("tokens", token_id, "revoke"))
    if as_json:
        show_json(token)
    else:
        typer.echo(f"{token.id}: revoked")


def _join_at(api: Api) -> str:
    """Where devices join, as far as this machine can tell: the host under which it reaches the server itself."""
    port = api.get(SystemAnswer, "/system").enrolment_port
    return api.host if port == DEFAULT_ENROLMENT_PORT else f"{api.host}:{port}"


def _state(token: TokenAnswer) -> str:
    if token.revoked:
        return "revoked"
    if token.uses >= token.max_uses:
        return "used up"
    return "expired" if token.expires_at <= time.time() else "valid"


app.command("create")(connected(create_token))
app.command("list")(connected(list_tokens))
app.command("revoke")(connected(revoke_token))
