"""`glora simulate`: strategies compared on many virtual devices in one process, with the service's own code."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Annotated

import typer

from glora_cli.group import single
from glora_cli.output import JsonFlag, console
from glora_cli.simulate_folder import prepare_folder
from glora_cli.simulate_report import final_table, summaries, summary_json, write_report
from glora_cli.simulate_results import (
    Pair,
    Result,
    append_results,
    pair_of,
    read_results,
    settings_digest,
    wanted_rows,
)
from glora_cli.simulate_spec import DEMO_MODEL, SimSpec, parse_sim_toml
from glora_wire.errors import GloraError, Reason

app = single()
Say = Callable[[str], None]
Made = tuple[Result, ...] | str
"""The rows of one strategy with one seed, or the sentence that says why there are none."""
_RESULTS = "results.jsonl"
_NO_MODEL = frozenset({Reason.BASE_MODEL_MISSING, Reason.BASE_MODEL_MISMATCH})
"""A server's no in other commands; here no server is asked, and a key of the description is wrong."""


@app.command()
def simulate(
    *,
    spec: Annotated[Path, typer.Option("--spec", metavar="FILE", help="What to simulate (TOML).")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the results; ./simulation-NAME if not given.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that the paths of [data] start from; that of FILE if not given.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Processes at a time, one thread each.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the table only.")] = False,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw PNG files and a page.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Compare strategies on virtual devices: one base model in memory, their adapters on it in turn.

    Planning, checks, aggregation and readouts are the service's own code on real adapter files. Results are added to
    DIR/results.jsonl pair by pair (strategy and seed); a second start goes on where the first one was cut off.

    \b
    glora simulate --spec bench/accuracy/base.toml --data ~/texts --jobs 2
    """
    described = parse_sim_toml(_text(spec), source=str(spec))
    if plots:
        from glora_cli.simulate_plots import require_matplotlib

        require_matplotlib()
    folder = out or Path(f"simulation-{described.name}")
    say: Say = (lambda _line: None) if quiet or as_json else typer.echo
    try:
        rows, problems = run_all(described, data or spec.parent, folder / _RESULTS, jobs=jobs, say=say)
    except GloraError as error:
        if error.reason in _NO_MODEL:
            raise GloraError(Reason.SPEC_INVALID, f"{spec}, model.path: {error.message}") from error
        raise
    if rows:
        _show(described, rows, folder, plots=plots, as_json=as_json)
    if problems:
        shown = "\n".join(problems)
        raise GloraError(Reason.INTERNAL, f"{len(problems)} runs failed; a second start tries them again:\n{shown}")


def _show(spec: SimSpec, rows: Sequence[Result], folder: Path, *, plots: bool, as_json: bool) -> None:
    """Write the report and print its table."""
    found = summaries(spec, rows)
    write_report(spec, rows, folder, plots=plots)
    if as_json:
        typer.echo(summary_json(found))
    else:
        console().print(final_table(spec, found))
        typer.echo(f"{len(rows)} rows in {folder / _RESULTS}; report in {folder}.")


def run_all(
    spec: SimSpec, data: Path, results: Path, *, jobs: int, say: Say
) -> tuple[tuple[Result, ...], tuple[str, ...]]:
    """All rows of the simulation, those that are not in the file yet made now and added to it pair by pair.

    With them a sentence for each run that failed: hours of others are not lost for it. What would stop all of them is
    raised before the first one begins.
    """
    digest = _digests(spec, data)
    have = wanted_rows(read_results(results), spec, digest, results)
    done = {pair_of(row) for row in have}
    left = [(entry.title, seed) for seed in spec.seeds for entry in spec.strategies if (entry.title, seed) not in done]
    if left:
        _require_rows(spec, data)
    prepare_folder(results.parent)
    if done:
        say(f"{len(done)} of {len(done) + len(left)} runs are in {results} already.")
    rows, problems = list(have), []
    for number, made in enumerate(_made(spec, data, left, jobs), start=1):
        if isinstance(made, str):
            problems.append(made)
            say(f"[{number}/{len(left)}] {made}")
            continue
        append_results(results, made)
        rows += made
        say(_line(made, number, len(left)))
    order = {entry.title: place for place, entry in enumerate(spec.strategies)}
    ordered = sorted(rows, key=lambda row: (order[row.strategy], row.seed, row.round, row.rank))
    return tuple(ordered), tuple(problems)


def _made(spec: SimSpec, data: Path, pairs: Sequence[Pair], jobs: int) -> Iterator[Made]:
    """The rows of each pair as it is finished, or why it failed."""
    if not pairs:
        return
    jobs = min(jobs, len(pairs))
    if jobs == 1:
        _quiet_libraries()
        bench = _Process(spec, data)
        yield from map(bench.run, pairs)
        return
    # A forked child would inherit torch's threads half alive.
    context = multiprocessing.get_context("spawn")
    text = spec.model_dump_json()
    with ProcessPoolExecutor(jobs, context) as pool:
        futures = [pool.submit(_run_in_process, text, data, pair) for pair in pairs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise GloraError(
                Reason.INTERNAL,
                "A simulating process was ended from outside, probably for want of memory; go on with fewer --jobs.",
            ) from error
        finally:
            for future in futures:
                future.cancel()


class _Process:
    """What a process keeps from one pair to the next: the rows and the base model."""

    def __init__(self, spec: SimSpec, data: Path) -> None:
        import torch

        from glora_cli.demo_model import demo_model
        from glora_cli.simulate_data import read_corpus
        from glora_cli.simulate_devices import Bench
        from glora_cli.simulate_run import Setting
        from glora_client.manifest_builder import build_manifest
        from glora_client.plan import Task

        torch.set_num_threads(1)
        corpus = read_corpus(spec.data, data)
        folder = demo_model("" if spec.model.path == DEMO_MODEL else spec.model.path)
        manifest = build_manifest(
            str(folder),
            task=Task.SEQUENCE_CLASSIFICATION,
            target_modules=spec.model.target_modules,
            labels=corpus.labels,
            layers=spec.model.layers or None,
        )
        self._setting = Setting(spec=spec, manifest=manifest, corpus=corpus, digests=_digests(spec, data))
        self._bench = Bench(
            folder,
            manifest,
            corpus,
            max_length=spec.training.max_length,
            batch_size=spec.measuring.batch_size,
        )

    def run(self, pair: Pair) -> Made:
        """What one strategy with one seed gives."""
        from glora_cli.simulate_run import simulate_pair

        title, seed = pair
        entry = next(entry for entry in self._setting.spec.strategies if entry.title == title)
        try:
            return simulate_pair(self._setting, self._bench, entry, seed)
        except GloraError as error:
            return f"{title}, seed {seed}: {error.message}"


@cache
def _process_of(text: str, data: Path) -> _Process:
    """The one of a child process, made by its first run: an error in a pool's initialiser would lose its words."""
    _quiet_libraries()
    return _Process(SimSpec.model_validate_json(text), data)


def _run_in_process(text: str, data: Path, pair: Pair) -> Made:
    return _process_of(text, data).run(pair)


def _require_rows(spec: SimSpec, data: Path) -> None:
    from glora_cli.simulate_data import read_corpus, require_rows

    require_rows(len(read_corpus(spec.data, data).train), spec.data, spec.devices.count)


def _digests(spec: SimSpec, data: Path) -> dict[str, str]:
    from glora_cli.simulate_data import files_digest

    files = files_digest(spec.data, data)
    return {entry.title: settings_digest(spec, entry, files) for entry in spec.strategies}


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _line(rows: Sequence[Result], number: int, total: int) -> str:
    last = max(rows, key=lambda row: (row.round, row.rank))
    seconds = sum({row.round: row.seconds for row in rows}.values())
    score = "not measured" if last.accuracy is None else f"{100 * last.accuracy:.1f} %"
    return (
        f"[{number}/{total}] {time.strftime('%H:%M:%S')} {last.strategy}, seed {last.seed}: "
        f"{score} after round {last.round} ({seconds:.0f} s)"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GloraError(Reason.SPEC_INVALID, f"{path} cannot be read: {error}.") from error
