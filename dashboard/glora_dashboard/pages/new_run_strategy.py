"""The part of the new run's form that chooses how updates are folded together, with the options of that choice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup
from nicegui import ui
from nicegui.elements.mixins.validation_element import ValidationElement
from nicegui.elements.mixins.value_element import ValueElement

from glora_dashboard.pages.new_run_fields import label_of
from glora_dashboard.pages.parts import Block
from glora_server.coordinator.ports import OptionInfo, StrategyInfo
from glora_server.coordinator.run_sections import StrategySpec

_NAMED: Final = re.compile(r"[Oo]ption '(?P<name>\w+)'")
_OWN: Final = ""
"""Of a field that leaves the choice to the strategy."""


class StrategyFields:
    """Which strategy, and its options."""

    def __init__(self, infos: Sequence[StrategyInfo], begin_with: StrategySpec) -> None:
        self._infos = {info.name: info for info in infos if not info.not_served}
        wished = (begin_with.name, StrategySpec().name, *self._infos)
        first = next((name for name in wished if name in self._infos), "")
        with ui.element("div").classes("form three"):
            self._name = ui.select(list(self._infos), value=first, label="Strategy").props("outlined").classes("wide")
        self._says = Block(Markup(""))
        self._place = ui.element("div").classes("form three")
        self._fields: dict[str, ValueElement[Any]] = {}
        self._name.on_value_change(lambda: self._show({}))
        self._show(begin_with.options if first == begin_with.name else {})

    def document(self) -> dict[str, object]:
        """The section, as the JSON of a description: options that are as the strategy has them are left out."""
        info = self._infos.get(str(self._name.value))
        chosen: dict[str, object] = {}
        for option in () if info is None else info.options:
            value = _read(option, self._fields[option.name].value)
            if value is not None and value != option.default:
                chosen[option.name] = value
        return {"name": str(self._name.value or ""), "options": chosen}

    def fill(self, chosen: StrategySpec) -> None:
        """Show a choice; a strategy that no run can have is left as it was."""
        if chosen.name in self._infos:
            self._name.value = chosen.name
            self._show(chosen.options)

    def tell(self, sentences: Sequence[str]) -> None:
        """Mark the options that the sentences name."""
        named = {found["name"]: sentence for sentence in sentences if (found := _NAMED.search(sentence))}
        for name, element in self._fields.items():
            if isinstance(element, ValidationElement):
                element.error = named.get(name)

    def _show(self, options: Mapping[str, object]) -> None:
        info = self._infos.get(str(self._name.value))
        self._place.clear()
        self._fields = {}
        if info is None:
            return
        ranks = (
            "Devices may have different ranks."
            if info.mixed_ranks
            else "All devices must have one rank: set the smallest rank to the largest."
        )
        self._says.show(Markup('<p class="muted">{}. {}</p>').format(info.summary.capitalize(), ranks))
        with self._place:
            for option in info.options:
                self._fields[option.name] = _field(option, options.get(option.name, option.default))


def _field(option: OptionInfo, value: object) -> ValueElement[Any]:
    label = label_of(option.name)
    element: ValueElement[Any]
    match option.kind:
        case "choice":
            element = ui.select(list(option.choices), value=value, label=label).props("options-dense")
        case "number":
            number = value if isinstance(value, int | float) else None
            element = ui.number(label, value=number, step=1 if option.whole else None).props("clearable")
        case "ranks":
            element = ui.input(label, value=str(value or _OWN)).props("autocomplete=off")
    element.props("outlined").classes("wide")
    element.props["hint"] = option.summary[:1].upper() + option.summary[1:] + "."
    return element


def _read(option: OptionInfo, entered: object) -> object:
    """The value as a description has it; None leaves it to the strategy."""
    if option.kind == "ranks":
        return str(entered or _OWN).strip() or None
    if option.whole and isinstance(entered, float) and entered.is_integer():
        return int(entered)
    return entered
