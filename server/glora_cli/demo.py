"""`glora demo`: a whole federation on this machine, with a real model and real text."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

from glora_cli.demo_federation import Federation
from glora_cli.demo_model import demo_model
from glora_cli.demo_report import Report, report_page
from glora_cli.demo_run import Processes, ending_cleanly
from glora_cli.demo_spec import DemoOptions
from glora_cli.demo_view import open_view
from glora_cli.group import single
from glora_cli.output import JsonFlag, console
from glora_server.coordinator.run_sections import MAX_RANK
from glora_wire.errors import GloraError, Reason

app = single()
_RANKS: Final = (2, 4, 8, 16)
_ADAPTER: Final = "glora-demo-adapter"


@app.command()
def demo(
    *,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of training.")] = 5,
    devices: Annotated[int, typer.Option(min=1, max=64, help="Training devices.")] = 4,
    ranks: Annotated[
        str, typer.Option(metavar="LIST", help="LoRA ranks of the devices; repeated in turn when they are fewer.")
    ] = ",".join(map(str, _RANKS)),
    strategy: Annotated[str, typer.Option(help="How updates are folded together: glora or fedit.")] = "glora",
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Optimizer steps of a device in a round.")] = 30,
    model: Annotated[
        str, typer.Option(metavar="FOLDER", help="Another base model: a folder or a hub name.", show_default=False)
    ] = "",
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Texts of your own: JSONL with "text" and "label_name".', show_default=False),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep everything: run.toml, rows, logs, database.")] = False,
    stay: Annotated[
        bool,
        typer.Option("--stay", help="Leave the server up at the end, to look around in the browser; Ctrl-C ends it."),
    ] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port; the next free one when it is in use.")] = 8080,
    as_json: JsonFlag = False,
) -> None:
    """Run a server, four devices and an evaluating one on this machine, for some minutes.

    Real processes, gRPC with mutual TLS, a real encoder, texts that every Python carries: nothing is downloaded. The
    trained adapter stays in ./glora-demo-adapter (or the next free name), as PEFT loads it.

    \b
    glora demo
    glora demo --rounds 10 --ranks 4,4,8 --strategy fedit
    glora demo --data mine.jsonl --model ./my-encoder --keep
    """
    options = DemoOptions(
        rounds=rounds,
        ranks=_ranks_of(ranks, devices),
        strategy=strategy,
        steps=steps,
        model=demo_model(model),
        data=data,
        port=port,
    )
    adapter = _free_folder(Path.cwd() / _ADAPTER)
    with ending_cleanly(), _folder(keep=keep) as folder, Processes(folder / "logs") as processes:
        with open_view(as_json=as_json) as view:
            if keep:
                view.say(f"everything is kept in {folder}")
            federation = Federation(options, folder, processes, view)
            report = federation.run(adapter, kept=keep)
        _tell(report, as_json=as_json)
        if stay:
            typer.echo(f"\nThe server stays up. {federation.sign_in} Ctrl-C ends everything.", err=as_json)
            processes.stay()


def _tell(report: Report, *, as_json: bool) -> None:
    if as_json:
        typer.echo(report.to_json())
    else:
        console().print(report_page(report))


@contextlib.contextmanager
def _folder(*, keep: bool) -> Iterator[Path]:
    """A new folder with one for logs, that is gone afterwards unless it is to be kept."""
    folder = Path(tempfile.mkdtemp(prefix="glora-demo-"))
    (folder / "logs").mkdir()
    try:
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _ranks_of(text: str, devices: int) -> tuple[int, ...]:
    """One rank per device, from "2,4,8,16"; raises BadParameter."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 1 <= int(word) <= MAX_RANK for word in words):
        raise typer.BadParameter(
            f"{text!r} is not a list of ranks from 1 to {MAX_RANK}; write for example 2,4,8,16.", param_hint="--ranks"
        )
    given = tuple(map(int, words))
    if given != _RANKS and len(given) > devices:
        raise typer.BadParameter(
            f"{len(given)} ranks are too many for {devices} devices; raise --devices or name fewer.",
            param_hint="--ranks",
        )
    return tuple(given[number % len(given)] for number in range(devices))


def _free_folder(wanted: Path) -> Path:
    """`wanted`, or `wanted-2` and so on when there is something already; nothing is ever overwritten."""
    if not os.access(wanted.parent, os.W_OK):
        raise GloraError(
            Reason.DATA_DIR_UNUSABLE,
            f"The adapter is to be written into {wanted.parent}, where this user may not write; change to another one.",
        )
    candidates = (wanted, *(wanted.with_name(f"{wanted.name}-{number}") for number in range(2, 10_000)))
    return next(folder for folder in candidates if not folder.exists())
