"""Logs of the processes beside every failure: a hook that a conftest.py takes over by importing it."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from federation import LIVE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs to the report of what failed."""
    report = yield
    if report.failed:
        for federation in LIVE:
            report.sections += [(f"log of {name}", text) for name, text in federation.logs()]
    return report
