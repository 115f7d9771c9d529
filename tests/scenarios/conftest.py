"""`pytest tests/scenarios --rewrite-scenarios` writes what happens now into the transcripts; review it as a diff."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-scenarios",
        action="store_true",
        help="write the transcripts of tests/scenarios anew instead of comparing",
    )


@pytest.fixture
def rewrite_scenarios(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite-scenarios", default=False))
