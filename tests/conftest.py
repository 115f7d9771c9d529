"""The order of the tests: quick ones first, those with processes of their own next, those with a browser last."""

from __future__ import annotations

from pathlib import Path

import pytest

_TESTS = Path(__file__).parent
_LAST = ("e2e", "browser")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder.

    The browser has to be last: what drives it keeps an event loop running in this thread until the session ends, and
    no asynchronous test could start one of its own beside it.
    """
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    folder = item.path.relative_to(_TESTS).parts[0] if item.path.is_relative_to(_TESTS) else ""
    return _LAST.index(folder) + 1 if folder in _LAST else 0
