"""Fields that filter a list; what they hold stands in the page's address, so that it can be kept and shared."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Final
from urllib.parse import urlencode

from nicegui import ui

Apply = Callable[[], Awaitable[None]]
_PAUSE_MS: Final = 300
"""After the last letter, until what is looked for is asked."""


def find_field(label: str, value: str, apply: Apply) -> ui.input:
    """A line of text; what is written is looked for when the writer pauses."""
    field = ui.input(label, value=value).props(f"outlined dense clearable debounce={_PAUSE_MS} autocomplete=off")
    field.classes("find")
    field.on_value_change(apply)
    return field


def pick_field(label: str, choices: dict[str, str], value: str, apply: Apply) -> ui.select:
    """One of some words."""
    field = ui.select(choices, value=value, label=label).props("outlined dense options-dense")
    field.on_value_change(apply)
    return field


class Address:
    """The page's address in the browser."""

    def __init__(self, path: str) -> None:
        self._path = path

    def show(self, query: Mapping[str, str]) -> None:
        """Let the address say this, without loading the page again."""
        address = f"{self._path}?{urlencode(query)}" if query else self._path
        ui.run_javascript(f"history.replaceState(history.state, '', {json.dumps(address)})")
