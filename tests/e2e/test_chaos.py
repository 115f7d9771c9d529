"""Four kills at random moments; `python tests/e2e/chaos.py --minutes 5` goes on for longer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from chaos_run import Chaos

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_nothing_is_lost_in_four_kills(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    report = Chaos(folder=tmp_path / "chaos", random=random.Random(seed), pause=(0.2, 3.0)).run(kills=4)
    assert report.kills.total() == 4, f"seed {seed}"
    assert report.rounds >= 1, f"seed {seed}"
    assert report.uploads == 3 * report.rounds, f"seed {seed}"
