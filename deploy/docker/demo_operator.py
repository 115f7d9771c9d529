"""Set the demo up and end: rows and a model for three devices, a run, and the token with which they join.

Everything is written into /demo, which the devices mount; the token comes last, so that who finds it finds the rest.
Repeated, it makes only what is missing. It waits for the server as long as it takes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from glora_cli.demo_corpus import collect_corpus
from glora_cli.demo_data import split_rows, write_rows
from glora_cli.demo_model import packaged_model
from glora_cli.demo_spec import RUN_NAME, DemoOptions, run_toml
from glora_cli.rest import Api
from glora_dashboard.models import NewTokenAnswer
from glora_dashboard.run_models import RunAnswer
from glora_server.security.admin_token import read_admin_token
from glora_wire.errors import GloraError, Kind, Reason

FOLDER: Final = Path("/demo")
RANKS: Final = (2, 4, 8)
HELD_OUT_ROWS: Final = 160
_TRY_AGAIN_SECONDS: Final = 3.0
_TOKEN_SECONDS: Final = 7 * 24 * 3600


def _main() -> None:
    url = os.environ.get("GLORA_URL", "http://server:8080")
    labels = _write_rows()
    model = FOLDER / "model"
    if not model.is_dir():
        _copy(packaged_model(), model)
    options = DemoOptions(
        rounds=int(os.environ.get("GLORA_DEMO_ROUNDS", "5")),
        ranks=RANKS,
        strategy="glora",
        steps=int(os.environ.get("GLORA_DEMO_STEPS", "30")),
        model=model,
        data=None,
        port=0,
    )
    with Api(url, _wait_for_token(Path(os.environ["GLORA_DATA_DIR"]))) as api:
        if _has_run(api):
            _say(f"The run {RUN_NAME} is there already.")
        else:
            _create_run(url, run_toml(options, labels))
        if not (FOLDER / "join.token").exists():
            _write_token(api)
    _say("The demo is set up; its devices do the rest.")


def _write_rows() -> tuple[str, ...]:
    """Write what every device holds, once: devices may be reading it, and another Python has other rows; the labels."""
    split = split_rows(collect_corpus(), len(RANKS))
    rows = FOLDER / "rows"
    if not rows.is_dir():
        half = FOLDER / "rows.new"
        half.mkdir(exist_ok=True)
        for rank, part in zip(RANKS, split.devices, strict=True):
            write_rows(half / f"rank-{rank}.jsonl", part)
        write_rows(half / "held-out.jsonl", split.held_out[:: max(1, len(split.held_out) // HELD_OUT_ROWS)])
        half.rename(rows)
    return split.labels


def _copy(source: Path, target: Path) -> None:
    """Copy a folder so that it is there as a whole or not at all."""
    half = target.with_name(f"{target.name}.new")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(source, half)
    half.rename(target)


def _wait_for_token(data_dir: Path) -> str:
    """The administration token, once the server has made it."""
    said = False
    while True:
        try:
            return read_admin_token(data_dir)
        except GloraError as error:
            if not said:
                _say(f"Waiting for the server: {error.message}")
            said = True
            time.sleep(_TRY_AGAIN_SECONDS)


def _has_run(api: Api) -> bool:
    """Whether the run was created earlier; waits until the server answers."""
    said = False
    while True:
        try:
            api.get(RunAnswer, f"/runs/{RUN_NAME}")
        except GloraError as error:
            if error.reason is Reason.RUN_UNKNOWN:
                return False
            if error.kind is not Kind.UNAVAILABLE:
                raise
            if not said:
                _say(f"Waiting for the server: {error.message}")
            said = True
            time.sleep(_TRY_AGAIN_SECONDS)
        else:
            return True


def _create_run(url: str, toml: str) -> None:
    spec = FOLDER / "run.toml"
    spec.write_text(toml, encoding="utf-8")
    command = ["glora", "run", "create", "--spec", str(spec), "--start", "--server-url", url]
    subprocess.run(command, check=True)  # noqa: S603 - our own command


def _write_token(api: Api) -> None:
    order = {"description": "devices of the demo", "uses": len(RANKS), "ttl_seconds": _TOKEN_SECONDS, "max_rank": 8}
    made = api.post(NewTokenAnswer, "/tokens", order)
    half = FOLDER / "join.token.new"
    half.touch(mode=0o600)
    half.write_text(made.join_token, encoding="ascii")
    half.rename(FOLDER / "join.token")


def _say(sentence: str) -> None:
    sys.stdout.write(f"{sentence}\n")


if __name__ == "__main__":
    try:
        _main()
    except GloraError as error:
        sys.exit(error.message)
