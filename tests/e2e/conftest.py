"""Logs of the processes beside every failure."""

from __future__ import annotations

from failure_logs import pytest_runtest_makereport

__all__ = ["pytest_runtest_makereport"]
