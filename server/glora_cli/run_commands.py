"""`glora run …`: create, watch and steer runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from glora_cli.connection import connected
from glora_cli.group import group
from glora_cli.manifest import build_manifest, read_manifest
from glora_cli.output import JsonFlag, YesFlag, make_sure, moment, show_json, show_json_list, show_table
from glora_cli.rest import Api, at
from glora_cli.run_view import print_run, standing
from glora_cli.values import assignments, seconds
from glora_cli.watch import watch_run
from glora_dashboard.run_models import RoundRecordAnswer, RunAnswer
from glora_server.coordinator.run_spec import RunSpec, parse_run_toml
from glora_wire.errors import GloraError, Reason

app = group(
    "Create, watch and steer runs.",
    "glora run create --spec run.toml --start   begin a run",
    "glora run watch demo                       see it live, until it ends",
    "glora run edit demo quorum=3 rounds=20     change its policy while it is going on",
    "glora run extend demo 15m                  give the devices of this round more time",
)
_NAME = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the run.")]


def create_run(
    api: Api,
    *,
    spec: Annotated[Path, typer.Option(metavar="FILE", help="The run's description, TOML.")],
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Manifest of the base model; left out, it is made from the model."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Base model on this machine, in place of model.path of the spec.")
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Create a run from its description.

    \b
    run.toml needs no more than this:
      name = "demo"
      [model]
      path = "sentence-transformers/all-MiniLM-L6-v2"
      labels = ["negative", "positive"]
    """
    described = with_labels(read_spec(spec), spec.parent)
    if model is not None:
        described = described.model_copy(update={"model": described.model.model_copy(update={"path": model})})
    found = build_manifest(described) if manifest is None else read_manifest(manifest)
    body = {"spec": json.loads(described.to_json()), "manifest": json.loads(found.to_json()), "start": start}
    run = api.post(RunAnswer, "/runs", body)
    if as_json:
        show_json(run)
        return
    typer.echo(f"{run.name}: {run.phase}, {len(found.modules)} modules, rank up to {run.max_rank}")
    follow = "watch" if start else "start"
    typer.echo(f"Next: glora run {follow} {run.name}", err=True)


def read_spec(path: Path) -> RunSpec:
    """The run that a TOML file describes; raises SPEC_INVALID with a line for every mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GloraError(Reason.SPEC_INVALID, f"The description {path} cannot be read: {error}.") from None
    return parse_run_toml(text, source=str(path))


def with_labels(spec: RunSpec, folder: Path) -> RunSpec:
    """The same run with the labels of its label_file (a path seen from `folder`) written out."""
    if not spec.model.label_file:
        return spec
    path = folder / spec.model.label_file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GloraError(Reason.SPEC_INVALID, f"model.label_file: {path} cannot be read: {error}.") from None
    model: dict[str, object] = {**spec.model.model_dump(mode="json"), "label_file": ""}
    model["labels"] = [line.strip() for line in lines if line.strip()]
    document: dict[str, object] = {**spec.model_dump(mode="json"), "model": model}
    return RunSpec.from_json(json.dumps(document), source=str(path))


def start_run(api: Api, name: _NAME, *, as_json: JsonFlag = False) -> None:
    """Start a run that was created."""
    _report(api.post(RunAnswer, at("runs", name, "start")), as_json=as_json)


def pause_run(api: Api, name: _NAME, *, as_json: JsonFlag = False) -> None:
    """Open no further round; a round that is open goes on, so that no work is lost."""
    _report(api.post(RunAnswer, at("runs", name, "pause")), as_json=as_json)


def resume_run(api: Api, name: _NAME, *, as_json: JsonFlag = False) -> None:
    """Open rounds again."""
    _report(api.post(RunAnswer, at("runs", name, "resume")), as_json=as_json)


def abort_run(
    api: Api,
    name: _NAME,
    *,
    reason: Annotated[str, typer.Option(help="Why; devices and the audit are told.")] = "",
    yes: YesFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """End a run and its open round for good; its versions stay and can be exported."""
    make_sure(f"Abort {name}? It cannot be undone.", yes=yes)
    _report(api.post(RunAnswer, at("runs", name, "abort"), {"reason": reason}), as_json=as_json)


def extend_round(
    api: Api,
    name: _NAME,
    time: Annotated[str, typer.Argument(metavar="TIME", help="How much later: 90s, 15m, 2h.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Move the deadline of the open round."""
    round_ = api.post(RoundRecordAnswer, at("runs", name, "extend"), {"seconds": seconds(time)})
    if as_json:
        show_json(round_)
    else:
        typer.echo(f"{name}, round {round_.number}: deadline {moment(round_.deadline_at)}")


def edit_run(
    api: Api,
    name: _NAME,
    changes: Annotated[list[str], typer.Argument(metavar="KEY=VALUE…", help="Keys of the policy, values as in TOML.")],
    *,
    as_json: JsonFlag = False,
) -> None:
    """Change a run's policy, from its next round on.

    \b
    glora run edit demo quorum=3 deadline_seconds=600 too_few=wait
    glora run edit demo 'tags=["lab"]' sampling=rank
    """
    run = api.patch(RunAnswer, at("runs", name, "policy"), {"changes": assignments(changes)})
    _report(run, as_json=as_json)


def list_runs(api: Api, *, as_json: JsonFlag = False) -> None:
    """List runs, newest first."""
    runs = api.every(RunAnswer, "/runs")
    if as_json:
        show_json_list(runs)
        return
    rows = [
        (run.name, run.phase, f"{run.rounds_done}/{run.rounds}", run.strategy, run.max_rank, standing(run))
        for run in runs
    ]
    empty = "There are no runs; create one with: glora run create --spec run.toml --start"
    show_table(("NAME", "PHASE", "ROUNDS", "STRATEGY", "RANK", "NOW"), rows, empty)


def show_run(api: Api, name: _NAME, *, as_json: JsonFlag = False) -> None:
    """Show a run: where it stands, who is in its round, why it waits, how good it is."""
    run = api.get(RunAnswer, at("runs", name))
    if as_json:
        show_json(run)
    else:
        print_run(run)


def watch(api: Api, name: _NAME, *, as_json: JsonFlag = False) -> None:
    """Follow a run until it ends; exit code 0 when it completed, 1 when it failed or was aborted.

    A live view on a terminal, lines elsewhere; with --json one object for every change.
    """
    raise typer.Exit(watch_run(api, name, as_json=as_json))


def _report(run: RunAnswer, *, as_json: bool) -> None:
    if as_json:
        show_json(run)
    else:
        typer.echo(f"{run.name}: {run.phase}, {standing(run)}")


app.command("create")(connected(create_run))
app.command("start")(connected(start_run))
app.command("list")(connected(list_runs))
app.command("show")(connected(show_run))
app.command("watch")(connected(watch))
app.command("edit")(connected(edit_run))
app.command("pause")(connected(pause_run))
app.command("resume")(connected(resume_run))
app.command("extend")(connected(extend_round))
app.command("abort")(connected(abort_run))
