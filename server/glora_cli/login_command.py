"""`glora login`: a user name and a password for an API token, kept in a profile."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from glora_cli.connection import DEFAULT_URL, CaFile, DataDir, ServerUrl, local_ca
from glora_cli.group import single
from glora_cli.output import moment
from glora_cli.profiles import Profile, load_profiles, profiles_path, save_profiles
from glora_cli.rest import Api, is_loopback_url
from glora_cli.values import seconds
from glora_dashboard.access_models import NewApiTokenAnswer
from glora_server.coordinator.people import Role
from glora_wire.errors import GloraError, Reason

app = single()
PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from the first line of standard input.")
]


@app.command()
def login(
    *,
    server_url: ServerUrl = None,
    user: Annotated[str, typer.Option(help="User name (asked for when it is left out).")] = "",
    profile: Annotated[str, typer.Option(help="Name of the profile (default: the server's host).")] = "",
    role: Annotated[
        Role | None, typer.Option(help="What the token may do at most (default: what the user may).")
    ] = None,
    expires: Annotated[str, typer.Option(metavar="TIME", help="How long the token holds: 12h, 30d.")] = "90d",
    ca_file: CaFile = None,
    data_dir: DataDir = None,
    password_stdin: PasswordStdin = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Send the password over http:// all the same.")] = False,
) -> None:
    """Sign in to a server: ask for user and password, make an API token, keep it in a profile.

    \b
    glora login --server https://fl.example.org:8080 --ca ca.crt
    glora run list                                  uses the profile from now on
    """
    url = (DEFAULT_URL if server_url is None else server_url).rstrip("/")
    if url.startswith("http:") and not is_loopback_url(url) and not insecure:
        raise GloraError(
            Reason.SETTINGS_INVALID,
            f"{url} would show the password to the network: use https:// (http.tls of the server), a tunnel "
            "(ssh -L 8080:localhost:8080 HOST), or --insecure if you know that network.",
        )
    ca = ca_file or local_ca(url, data_dir)
    if not user:
        require_terminal("give --user NAME")
    name = user or typer.prompt("User name", err=True)
    secret = read_password("Password", from_stdin=password_stdin)
    body = {
        "username": name,
        "password": secret,
        "token_name": f"glora login, {_person()}@{socket.gethostname()}"[:100],
        "role": role,
        "ttl_seconds": seconds(expires),
    }
    with Api(url, "", ca=ca) as api:
        made = api.post(NewApiTokenAnswer, "/sign-in", body)
    chosen = profile or urlsplit(url).hostname or url
    kept = Profile(url=url, token=made.token, user=made.user, ca="" if ca is None else str(Path(ca).absolute()))
    save_profiles(load_profiles().with_profile(chosen, kept))
    typer.echo(
        f"Signed in to {url} as {made.user} ({made.role}), until {moment(made.expires_at)}. Profile {chosen} in "
        f"{profiles_path()}."
    )


def _person() -> str:
    """Who runs this; the number where the user has no name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def read_password(what: str, *, from_stdin: bool, twice: bool = False) -> str:
    """A password from the terminal, not shown, or the first line of standard input; raises REQUEST_INVALID."""
    if from_stdin:
        text = sys.stdin.readline().rstrip("\r\n")
        if not text:
            raise GloraError(Reason.REQUEST_INVALID, "There is no password on standard input.")
        return text
    require_terminal("give --password-stdin and write the password to standard input")
    answer = typer.prompt(what, hide_input=True, confirmation_prompt=twice, err=True)
    return str(answer)


def require_terminal(instead: str) -> None:
    """Raises REQUEST_INVALID where nobody can be asked; `instead` says what to do."""
    if not sys.stdin.isatty():
        raise GloraError(Reason.REQUEST_INVALID, f"There is no terminal to ask at: {instead}.")
