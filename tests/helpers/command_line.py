"""The `glora` command inside of this process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from glora_cli.failures import run_guarded
from glora_cli.main import app


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def glora(capsys: pytest.CaptureFixture[str], *words: str) -> Outcome:
    """Run `glora WORDS`; what it printed and how it ended."""
    capsys.readouterr()
    try:
        code = run_guarded(lambda: app(args=list(words), prog_name="glora"))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    printed = capsys.readouterr()
    return Outcome(code=code, out=printed.out, err=printed.err)
