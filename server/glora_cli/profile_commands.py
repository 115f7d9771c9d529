"""`glora profile …`: the servers that were signed in to."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import BaseModel

from glora_cli.group import group
from glora_cli.output import JsonFlag, show_json_list, show_table
from glora_cli.profiles import load_profiles, save_profiles

app = group(
    "Servers that you signed in to with `glora login`.",
    "glora profile list",
    "glora profile use fl.example.org",
    "glora --help                                    --profile NAME goes with every command",
)
_Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the profile.")]


class _Shown(BaseModel):
    name: str
    url: str
    user: str
    ca: str
    current: bool


@app.command("list")
def list_profiles(*, as_json: JsonFlag = False) -> None:
    """List profiles; never their tokens."""
    profiles = load_profiles()
    shown = [
        _Shown(name=name, url=known.url, user=known.user, ca=known.ca, current=name == profiles.current)
        for name, known in sorted(profiles.profiles.items())
    ]
    if as_json:
        show_json_list(shown)
        return
    rows = [("*" if line.current else "", line.name, line.url, line.user, line.ca) for line in shown]
    show_table(("", "NAME", "SERVER", "USER", "CA"), rows, "There are no profiles; make one with: glora login")


@app.command("use")
def use_profile(name: _Name) -> None:
    """Let commands use a profile where none is named."""
    save_profiles(load_profiles().using(name))
    typer.echo(f"{name}: used from now on")


@app.command("remove")
def remove_profile(name: _Name) -> None:
    """Forget a profile; its token holds until it ends or is revoked (glora api-token revoke)."""
    save_profiles(load_profiles().without(name))
    typer.echo(f"{name}: removed")
