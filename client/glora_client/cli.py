"""`glora client`: join, run, status. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from glora_wire.errors import GloraError, Reason

app = typer.Typer(
    name="client",
    no_args_is_help=True,
    help="The device's side: join a server once, then run for ever. Data never leaves the device.",
)

_REFUSED = frozenset(
    {
        Reason.DEVICE_REVOKED,
        Reason.DEVICE_UNKNOWN,
        Reason.CERTIFICATE_UNKNOWN,
        Reason.CERTIFICATE_EXPIRED,
        Reason.CA_PIN_MISMATCH,
        Reason.TOKEN_UNKNOWN,
        Reason.TOKEN_EXPIRED,
        Reason.TOKEN_USED_UP,
        Reason.TOKEN_REVOKED,
        Reason.NAME_TAKEN,
        Reason.RANK_NOT_ALLOWED,
    }
)
_JOIN_HELP = """Turn a join token into this device's identity. Needed once.

Example:

  glora client join --server coordinator.example --token glora_abc… --name pi-7 --rank 8

The token comes from `glora device token create`. The private key is made here and never leaves the state folder.
"""
_RUN_HELP = """Work for the server until stopped: wait, train or evaluate, send the adapter, again.

Example:

  glora client run --model sentence-transformers/all-MiniLM-L6-v2 --data train.jsonl --eval-data dev.jsonl

Rows have `text` (and `text_b`) with `label` or `label_name`; for causal models `instruction`, `input` and `response`.
Files end in .jsonl, .csv, .tsv or .parquet; `datasets:NAME[:SPLIT]` names a data set. A device without --data only
evaluates. Ctrl-C ends it cleanly; the next start goes on where it was. Exit status: 0 stopped, 2 wrong usage or input,
3 refused by the server (revoked, or join again).
"""
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="Default: $GLORA_CLIENT_STATE, else ~/.local/state/glora.")
]
RankText = Annotated[
    str, typer.Option("--rank", help="Largest LoRA rank of this device, or 'auto' (from free memory).")
]


@app.command(help=_JOIN_HELP)
def join(
    *,
    server: Annotated[str, typer.Option(help="HOST, or HOST:PORT when enrolment is not on 7444.")],
    token: Annotated[str, typer.Option(help="The whole word that `glora device token create` printed.")],
    name: Annotated[str, typer.Option(help="What people will see; unique among devices.")],
    rank: RankText = "8",
    model: Annotated[str | None, typer.Option(help="Base model; only needed for --rank auto.")] = None,
    state_dir: StateDir = None,
) -> None:
    """Turn a join token into this device's identity."""

    def act() -> None:
        from glora_client.capabilities import profile  # noqa: PLC0415
        from glora_client.identity import join as enrol  # noqa: PLC0415
        from glora_client.state import StateFolder, default_folder  # noqa: PLC0415

        number = _rank(rank, model)
        state = StateFolder(state_dir or default_folder())
        try:
            joined = enrol(state, server=server, token=token, name=name, rank=number, profile=profile(rank=number))
        finally:
            state.close()
        identity = joined.identity
        typer.echo(f"Joined as {identity.name} ({identity.device}), rank up to {identity.rank}.")
        if joined.approval_pending:
            typer.echo(f"An operator must approve it first: glora device approve {identity.name}")
        typer.echo("Next: glora client run --model PATH_OR_NAME --data train.jsonl --eval-data dev.jsonl")

    _exiting(act)


@app.command(help=_RUN_HELP)
def run(
    *,
    model: Annotated[str, typer.Option(help="Folder of the base model, or its name on the hub.")],
    data: Annotated[str | None, typer.Option(help="Rows to train on.")] = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Held-out rows to evaluate on.")] = None,
    state_dir: StateDir = None,
    threads: Annotated[
        int, typer.Option(help="torch threads; 1 where devices share a machine; 0: torch's choice.")
    ] = 0,
    run_name: Annotated[str, typer.Option("--run", help="Work for this run only.")] = "",
    evaluate_only: Annotated[bool, typer.Option("--evaluate-only", help="Never train, even with --data.")] = False,
    fit: Annotated[str | None, typer.Option(help="A training function of your own, as module:function.")] = None,
    quantization: Annotated[str, typer.Option(help="none, int8 or nf4 (needs bitsandbytes).")] = "none",
    rank: Annotated[str | None, typer.Option(help="Train at most this rank, or 'auto'. Default: as joined.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End when the run that was worked for has ended.")] = False,
) -> None:
    """Work for the server until stopped."""

    def act() -> None:
        from glora_client.agent import AgentOptions, prepare  # noqa: PLC0415
        from glora_client.channel import Stop  # noqa: PLC0415
        from glora_client.state import default_folder  # noqa: PLC0415
        from glora_client.view import make_view  # noqa: PLC0415
        from glora_wire.buffers import keep_buffers  # noqa: PLC0415

        keep_buffers(arenas=1)
        if quantization not in {"none", "int8", "nf4"}:
            raise GloraError(Reason.CONFIG_INVALID, f"--quantization {quantization!r} is not one of none, int8, nf4.")
        options = AgentOptions(
            state_dir=state_dir or default_folder(),
            model=model,
            data=None if evaluate_only else data,
            evaluation_data=eval_data,
            threads=threads,
            run_name=run_name,
            fit=fit,
            quantization=quantization,
            rank=None if rank is None else _rank(rank, model),
            once=once,
        )
        stop = Stop()
        with make_view() as view:
            _until_signalled(prepare(options, view, stop).run, stop.set)

    _exiting(act)


@app.command()
def status(
    *, state_dir: StateDir = None, as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False
) -> None:
    """Show who this device is and what it has in hand."""

    def act() -> None:
        from glora_client.state import StateFolder, default_folder, not_joined  # noqa: PLC0415

        folder = state_dir or default_folder()
        if not folder.is_dir():
            raise not_joined(folder)
        state = StateFolder(folder, lock=False)
        identity, update = state.identity(), state.update()
        if identity is None:
            raise not_joined(folder)
        if as_json:
            waiting = None if update is None else {"run": update.run_name, "round": update.round_number}
            typer.echo(json.dumps({"state_dir": str(folder), **asdict(identity), "update_waiting": waiting}))
            return
        days = (identity.expires_at - time.time()) / 86400
        typer.echo(f"device       {identity.name} ({identity.device})")
        typer.echo(f"server       {identity.host}:{identity.port}")
        typer.echo(f"rank         up to {identity.rank}")
        typer.echo(f"certificate  {f'valid for {days:.1f} days' if days > 0 else 'expired; join again'}")
        typer.echo(
            "update       none waiting"
            if update is None
            else f"update       round {update.round_number} of {update.run_name} waits to be sent"
        )

    _exiting(act)


def _rank(text: str, model: str | None) -> int:
    """The rank that the person asked for; raises GloraError RANK_NOT_ALLOWED or BASE_MODEL_MISSING."""
    if text == "auto":
        from glora_client.capabilities import advise_rank  # noqa: PLC0415
        from glora_client.model_path import resolve_model  # noqa: PLC0415

        if model is None:
            raise GloraError(Reason.BASE_MODEL_MISSING, "--rank auto needs --model, for its size decides.")
        return advise_rank(resolve_model(model))
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a whole number from 1 nor 'auto'", param_hint="--rank")
    return int(text)


def _exiting(act: Callable[[], None]) -> None:
    """Do it; trouble becomes one sentence and an exit status."""
    try:
        act()
    except GloraError as error:
        _fail(error)


def _fail(error: GloraError) -> NoReturn:
    typer.echo(f"{error.message} ({error.reason.value})", err=True)
    sys.stdout.flush()
    raise typer.Exit(3 if error.reason in _REFUSED else 2)


def _until_signalled(work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Do the work in a thread, so that SIGINT and SIGTERM reach the main thread at once, whatever the work waits for.

    Re-raises what the work raised.
    """
    failures: list[BaseException] = []

    def target() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - carried to the main thread
            failures.append(error)

    def handler(_number: int, _frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=target, name="session")
    thread.start()
    thread.join()
    for number, old in before.items():
        signal.signal(number, old)
    if failures:
        raise failures[0]
