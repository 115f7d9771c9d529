"""The options by which every administrative command finds its server, and comes in.

Flags win over variables, both over a profile (`glora login` makes one), a profile over the defaults: the server on this
machine with the token of its data folder. A token is never sent to another server than the one that it was given for.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from glora_cli.profiles import Profile, load_profiles
from glora_cli.rest import Api, is_loopback_url
from glora_server.config import default_data_dir
from glora_server.security.admin_token import read_admin_token
from glora_wire.errors import GloraError, Reason

DEFAULT_URL: Final = "http://127.0.0.1:8080"
CA_NAME: Final = "ca.crt"
"""What a server with http.tls = "own" writes into its data folder."""
_PANEL: Final = "Which server"
_R = TypeVar("_R")

ServerUrl = Annotated[
    str | None,
    typer.Option(
        "--server",
        "--server-url",
        envvar="GLORA_URL",
        rich_help_panel=_PANEL,
        show_default=False,
        help=f"Address of the server's API (default: that of the profile, else {DEFAULT_URL}).",
    ),
]
_Token = Annotated[
    str,
    typer.Option(
        "--token",
        "--admin-token",
        envvar=["GLORA_TOKEN", "GLORA_ADMIN_TOKEN"],
        rich_help_panel=_PANEL,
        show_default=False,
        help="API token; left out, that of the profile, else admin.token of the data folder.",
    ),
]
_ProfileName = Annotated[
    str,
    typer.Option(
        "--profile",
        envvar="GLORA_PROFILE",
        rich_help_panel=_PANEL,
        show_default=False,
        help="A profile that `glora login` made (default: the one that `glora profile use` chose).",
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        envvar="GLORA_CA",
        rich_help_panel=_PANEL,
        show_default=False,
        help="Certificate of the authority that signed the server's: DATA_DIR/ca.crt of that server.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="GLORA_DATA_DIR",
        rich_help_panel=_PANEL,
        show_default=False,
        help="The server's data folder, on its own machine (default: ~/.local/share/glora).",
    ),
]
_OPTIONS: Final = tuple(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, default, annotation in (
        ("server_url", None, ServerUrl),
        ("api_token", "", _Token),
        ("profile_name", "", _ProfileName),
        ("ca_file", None, CaFile),
        ("data_dir", None, DataDir),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and how to come in."""

    url: str
    token: str
    ca: Path | None

    def open(self) -> Api:
        """A connection to it."""
        return Api(self.url, self.token, ca=self.ca)


def target(*, url: str | None, token: str, profile_name: str, ca: Path | None, data_dir: Path | None) -> Target:
    """What the options mean; raises SETTINGS_INVALID, DATA_DIR_UNUSABLE."""
    profile = _profile(profile_name, ignored=bool(token or data_dir))
    address = url if url is not None else (profile.url if profile is not None else DEFAULT_URL)
    here = profile if profile is not None and _same(profile.url, address) else None
    if profile_name and here is None and not token:
        raise GloraError(
            Reason.SETTINGS_INVALID,
            f"The profile {profile_name} is one of {profile.url if profile else 'another server'}, not of {address}; "
            "its token is not sent there. Leave one of both out.",
        )
    if ca is None and here is not None and here.ca:
        ca = Path(here.ca)
    return Target(
        url=address,
        token=token or (here.token if here is not None else _stored_token(address, data_dir)),
        ca=ca or local_ca(address, data_dir),
    )


def local_ca(url: str, data_dir: Path | None) -> Path | None:
    """The authority of the server on this machine, where `url` is one and uses it."""
    known = (data_dir or default_data_dir(os.environ)) / CA_NAME
    return known if url.startswith("https:") and is_loopback_url(url) and known.is_file() else None


def connected(command: Callable[..., _R]) -> Callable[..., _R]:
    """`command` without its first parameter, an Api, and with the options that make one instead."""

    @functools.wraps(command)
    def wrapper(
        *,
        server_url: str | None,
        api_token: str,
        profile_name: str,
        ca_file: Path | None,
        data_dir: Path | None,
        **given: object,
    ) -> _R:
        chosen = target(url=server_url, token=api_token, profile_name=profile_name, ca=ca_file, data_dir=data_dir)
        with chosen.open() as api:
            return command(api, **given)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    wrapper.__dict__["__signature__"] = inspect.Signature([*own, *_OPTIONS])
    wrapper.__annotations__ = {}
    return wrapper


def _profile(name: str, *, ignored: bool) -> Profile | None:
    """The profile of that name, else the one that was chosen, unless a token or a data folder was named."""
    if name:
        return load_profiles().named(name)
    if ignored:
        return None
    profiles = load_profiles()
    return profiles.profiles.get(profiles.current)


def _same(one: str, other: str) -> bool:
    return one.rstrip("/").lower() == other.rstrip("/").lower()


def _stored_token(url: str, data_dir: Path | None) -> str:
    folder = data_dir or default_data_dir(os.environ)
    try:
        return read_admin_token(folder)
    except GloraError as error:
        raise GloraError(
            Reason.DATA_DIR_UNUSABLE,
            f"No token for {url}: {error.message} Make one with `glora login --server {url}`, give one with --token or "
            "$GLORA_TOKEN, or name the server's data folder with --data-dir.",
        ) from None
