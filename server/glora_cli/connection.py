"""The options by which every administrative command finds its server."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from glora_cli.rest import Api
from glora_server.config import default_data_dir
from glora_server.security.admin_token import read_admin_token
from glora_wire.errors import GloraError, Reason

DEFAULT_URL: Final = "http://127.0.0.1:8080"
_PANEL: Final = "Which server"
_R = TypeVar("_R")

_ServerUrl = Annotated[
    str, typer.Option("--server-url", envvar="GLORA_URL", rich_help_panel=_PANEL, help="Address of the server's API.")
]
_AdminToken = Annotated[
    str,
    typer.Option(
        "--admin-token",
        envvar="GLORA_ADMIN_TOKEN",
        rich_help_panel=_PANEL,
        show_default=False,
        help="Administration token; left out, admin.token of the data folder is read.",
    ),
]
_DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="GLORA_DATA_DIR",
        rich_help_panel=_PANEL,
        show_default=False,
        help="The server's data folder, on its own machine (default: ~/.local/share/glora).",
    ),
]
_OPTIONS: Final = (
    inspect.Parameter("server_url", inspect.Parameter.KEYWORD_ONLY, default=DEFAULT_URL, annotation=_ServerUrl),
    inspect.Parameter("admin_token", inspect.Parameter.KEYWORD_ONLY, default="", annotation=_AdminToken),
    inspect.Parameter("data_dir", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_DataDir),
)


def connected(command: Callable[..., _R]) -> Callable[..., _R]:
    """`command` without its first parameter, an Api, and with the options that make one instead."""

    @functools.wraps(command)
    def wrapper(*, server_url: str, admin_token: str, data_dir: Path | None, **given: object) -> _R:
        with Api(server_url, admin_token or _stored_token(data_dir)) as api:
            return command(api, **given)

    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    wrapper.__dict__["__signature__"] = inspect.Signature([*own, *_OPTIONS])
    wrapper.__annotations__ = {}
    return wrapper


def _stored_token(data_dir: Path | None) -> str:
    folder = data_dir or default_data_dir(os.environ)
    try:
        return read_admin_token(folder)
    except GloraError as error:
        raise GloraError(
            Reason.DATA_DIR_UNUSABLE,
            f"No administration token: {error.message} Give one with --admin-token or $GLORA_ADMIN_TOKEN, or name the "
            "server's data folder with --data-dir.",
        ) from None
