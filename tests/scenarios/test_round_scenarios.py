"""Readable transcripts of rounds: events in, phases and effects out (see tests/helpers/round_scripts.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from round_scripts import play

SCENARIOS = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_round_goes_as_written(path: Path, *, rewrite_scenarios: bool) -> None:
    written = path.read_text()
    played = play(written)
    if rewrite_scenarios:
        path.write_text(played)
    else:
        assert played == written


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 8
