"""The `glora` command. Subcommands are imported when they are used: `glora --help` and `glora client` stay light."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from typing import Annotated, Final, NamedTuple

import typer

from glora_cli.failures import run_guarded
from glora_cli.group import group
from glora_wire.errors import GloraError, Reason

OUR_PACKAGES: Final = frozenset({"glora_cli", "glora_server", "glora_client", "glora_dashboard", "glora_wire", "glora"})


class Subcommand(NamedTuple):
    """Where a subcommand lives, and what it needs."""

    name: str
    module: str
    extra: str
    help: str


SUBCOMMANDS: Final = (
    Subcommand("demo", "glora_cli.demo", "demo", "Run a whole federation on this machine, with a real model."),
    Subcommand("server", "glora_cli.server_command", "server", "Run the server."),
    Subcommand("client", "glora_client.cli", "client", "Join a server and train (on a device)."),
    Subcommand("device", "glora_cli.device_commands", "server", "Enrol, list, approve and revoke devices."),
    Subcommand("run", "glora_cli.run_commands", "server", "Create, watch and steer runs."),
    Subcommand("export", "glora_cli.export_command", "server", "Download an adapter that PEFT can load."),
    Subcommand("login", "glora_cli.login_command", "server", "Sign in to a server, once for each machine."),
    Subcommand("profile", "glora_cli.profile_commands", "server", "Choose between servers that you signed in to."),
    Subcommand("user", "glora_cli.user_commands", "server", "Say who may come in, and what they may do."),
    Subcommand("api-token", "glora_cli.api_token_commands", "server", "Make tokens for programs, and revoke them."),
    Subcommand("simulate", "glora_cli.simulate", "demo", "Compare strategies on virtual devices, in one process."),
    Subcommand("db", "glora_cli.db_commands", "server", "Look after the database."),
    Subcommand("doctor", "glora_cli.doctor_command", "client", "Check this machine and say what to do."),
)

app = group(
    "Federated LoRA fine-tuning on devices that keep their data. Every command has a --help of its own.",
    "glora demo                                              see it work, on this machine",
    "glora server                                            run a server",
    "glora client join --server HOST --token T --name pi-7   on a device, once",
    "glora client run --model PATH --data train.jsonl        on a device, for ever",
    "glora run create --spec run.toml --start                begin a run",
    "glora export RUN --rank 8 --out DIR                     get its adapter",
)


def main() -> None:
    """Run the command line of this process and exit."""
    # Else gRPC's core prints lines of its own to stderr, one for each failed handshake; ours say it in words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    sys.exit(run_guarded(app))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"glora {installed_version('glora')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a subcommand."""


def _add(subcommand: Subcommand) -> None:
    """Add a command that hands all its arguments to the real one, which is imported only then."""

    def forward(context: typer.Context) -> None:
        with telling_what_to_install(subcommand):
            load(subcommand)(args=context.args, prog_name=f"glora {subcommand.name}")

    app.command(
        subcommand.name,
        help=subcommand.help,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    )(forward)


@contextmanager
def telling_what_to_install(subcommand: Subcommand) -> Iterator[None]:
    """Raises SETTINGS_INVALID naming the extra when the body misses a package, as it loads or as it runs."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OUR_PACKAGES:
            raise
        raise GloraError(
            Reason.SETTINGS_INVALID,
            f"`glora {subcommand.name}` needs the package {missing}, which is not installed here: "
            f"pip install 'glora[{subcommand.extra}]'.",
            package=missing,
        ) from None


def load(subcommand: Subcommand) -> typer.Typer:
    """The subcommand's application; raises SETTINGS_INVALID naming the extra when a package is missing."""
    with telling_what_to_install(subcommand):
        loaded = importlib.import_module(subcommand.module).app
    if not isinstance(loaded, typer.Typer):
        raise TypeError(f"{subcommand.module}.app is not a typer application")
    return loaded


for _subcommand in SUBCOMMANDS:
    _add(_subcommand)
