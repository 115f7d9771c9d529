"""`glora doctor`: look at this machine and say what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from glora_cli import doctor
from glora_cli.doctor import Check, Level
from glora_cli.failures import BROKEN
from glora_cli.group import single
from glora_wire.errors import GloraError

app = single()
_COLOURS: Final = {Level.OK: "green", Level.NOTE: "yellow", Level.BROKEN: "red"}


@app.command()
def examine(
    *,
    model: Annotated[str, typer.Option(metavar="DIR", help="Folder of a base model to look at, too.")] = "",
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="The server's settings.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", metavar="DIR", help="The server's data folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Check versions, ports, disk, database, certificates, GPU and base model, and say what to do.

    The exit code is 1 when something is broken.

    \b
    glora doctor
    glora doctor --data-dir /srv/glora --model ~/models/MiniLM --json
    """
    checks = list(_checks(model, config, data_dir))
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _print(checks)
    if any(check.level is Level.BROKEN for check in checks):
        raise typer.Exit(BROKEN)


def _checks(model: str, config: Path | None, data_dir: Path | None) -> Iterator[Check]:
    yield doctor.check_python()
    yield doctor.check_clock()
    for extra in ("", "server", "client"):
        yield from doctor.check_packages(extra)
    device = "auto"
    try:
        from glora_cli.doctor_server import check_server
        from glora_server.config import Settings

        settings = Settings.load(config, data_dir)
        device = settings.worker.device
        yield from check_server(settings)
    except ModuleNotFoundError as error:
        yield doctor.note("server", f"not looked at, because {error.name} is missing", "pip install 'glora[server]'")
    except GloraError as error:
        yield doctor.broken("settings", error.message, "correct the settings and run `glora doctor` again")
    yield doctor.check_gpu(device)
    if model:
        yield doctor.check_model(model)


def _print(checks: list[Check]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        text = f"{check.message}\n→ {check.advice}" if check.advice else check.message
        table.add_row(f"[{_COLOURS[check.level]}]{check.level}[/]", check.name, text.replace("[", r"\["))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
