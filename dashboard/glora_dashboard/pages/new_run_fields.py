"""The fields of a new run, made from the sections of its description: their keys, defaults, choices and words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Final, Literal, get_args, get_origin

from nicegui import ui
from nicegui.elements.mixins.validation_element import ValidationElement
from nicegui.elements.mixins.value_element import ValueElement
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from glora_wire.errors import GloraError

_PLACE: Final = re.compile(r"^form, (?P<place>[A-Za-z0-9_.]+)(?:\[\d+\])*: (?P<text>.*)$")
_SHORT: Final = {"lora": "LoRA"}
OMIT: Final = object()
"""Of a field that says nothing: the description's default counts."""


class Kind(StrEnum):
    """How a value is entered."""

    TEXT = "text"
    WHOLE = "whole"
    NUMBER = "number"
    SWITCH = "switch"
    CHOICE = "choice"
    WORDS = "words"
    WHOLES = "wholes"
    PAIRS = "pairs"


@dataclass(slots=True, kw_only=True)
class FormField:
    """One key of the description and where it is entered."""

    place: str
    """"section.key", or "key"."""
    kind: Kind
    element: ValueElement[Any]

    def read(self) -> object:
        """The value as JSON has it; OMIT for an empty field."""
        return read_value(self.kind, self.element.value)

    def fill(self, value: object) -> None:
        """Show a value of a description."""
        self.element.value = shown_value(self.kind, value)

    def tell(self, problem: str | None) -> None:
        """Mark the field as wrong, or no longer."""
        if isinstance(self.element, ValidationElement):
            self.element.error = problem


@dataclass(slots=True, kw_only=True)
class Fields:
    """All fields of a form by their place."""

    by_place: dict[str, FormField] = field(default_factory=dict)
    begin_with: Mapping[str, object] = field(default_factory=dict)
    """The JSON of a description that the fields begin with; what it does not say begins with its default."""

    def section(
        self, name: str, model: type[BaseModel], *, without: Sequence[str] = (), only: Sequence[str] = ()
    ) -> None:
        """Add fields for the keys of a section, in their order."""
        begin = _table(self.begin_with, name)
        for key, info in model.model_fields.items():
            if key not in without and (not only or key in only):
                place = f"{name}.{key}" if name else key
                self.by_place[place] = make_field(place, key, info, begin.get(key, _default(info)))

    def document(self) -> dict[str, object]:
        """What the form says, as the JSON of a description."""
        said: dict[str, object] = {}
        for place, own in self.by_place.items():
            value = own.read()
            section, _, key = place.rpartition(".")
            if value is OMIT:
                continue
            table = said.setdefault(section, {}) if section else said
            if not isinstance(table, dict):
                raise TypeError(f"{section} is both a key and a section")
            table[key] = value
        return said

    def fill(self, document: Mapping[str, object]) -> None:
        """Show a description."""
        for place, own in self.by_place.items():
            section, _, key = place.rpartition(".")
            table = _table(document, section)
            if key in table:
                own.fill(table[key])

    def tell(self, error: GloraError | None) -> str:
        """Mark the fields that the server's sentences name; answers the sentences that belong to no field."""
        told, rest = sort_problems(error.message.splitlines() if error else (), self.by_place)
        for place, own in self.by_place.items():
            own.tell(told.get(place))
        return "\n".join(rest)


def sort_problems(sentences: Iterable[str], places: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Sentences by the place that they name, and those that name none of the places."""
    known, told, rest = frozenset(places), dict[str, str](), list[str]()
    for sentence in sentences:
        found = _PLACE.match(sentence)
        if found is not None and found["place"] in known:
            told.setdefault(found["place"], found["text"])
        else:
            rest.append(sentence)
    return told, rest


def kind_of(info: FieldInfo) -> Kind:
    """How the values of a key are entered."""
    annotation = info.annotation
    if get_origin(annotation) is Literal or (isinstance(annotation, type) and issubclass(annotation, Enum)):
        return Kind.CHOICE
    if get_origin(annotation) is tuple:
        inner = get_args(annotation)[0]
        whole = int in {inner, *get_args(inner)}
        return Kind.WHOLES if whole else Kind.WORDS
    if get_origin(annotation) is dict:
        return Kind.PAIRS
    kinds: Mapping[object, Kind] = {str: Kind.TEXT, int: Kind.WHOLE, float: Kind.NUMBER, bool: Kind.SWITCH}
    found = kinds.get(annotation)
    if found is None:
        raise TypeError(f"the form has no field for {annotation}")
    return found


def choices_of(info: FieldInfo) -> tuple[str, ...]:
    """The words that a key can have."""
    annotation = info.annotation
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return tuple(str(member.value) for member in annotation)
    return tuple(map(str, get_args(annotation)))


def make_field(place: str, key: str, info: FieldInfo, value: object) -> FormField:
    """The field of a key, showing a value of a description."""
    kind = kind_of(info)
    element = _element(kind, label_of(key), info, shown_value(kind, value))
    if kind is not Kind.SWITCH:
        element.props("outlined").classes("wide")
        element.props["hint"] = _hint(kind, info.description or "")
    return FormField(place=place, kind=kind, element=element)


def _table(document: Mapping[str, object], section: str) -> Mapping[str, object]:
    """A section of a description's JSON; "" is the part above all sections."""
    table = document.get(section) if section else document
    return table if isinstance(table, Mapping) else {}


def _default(info: FieldInfo) -> object:
    return None if info.is_required() else info.get_default(call_default_factory=True)


def label_of(key: str) -> str:
    """A key as the label of a field: "max_rank" is "Max rank"."""
    words = key.replace("_", " ")
    return _SHORT.get(key, words[:1].upper() + words[1:])


def _hint(kind: Kind, description: str) -> str:
    more = {Kind.WORDS: " Commas or lines between them.", Kind.WHOLES: " Commas between them."}
    return description + more.get(kind, " Lines of the form key = value." if kind is Kind.PAIRS else "")


def _element(kind: Kind, label: str, info: FieldInfo, value: object) -> ValueElement[Any]:
    match kind:
        case Kind.WHOLE | Kind.NUMBER:
            number = value if isinstance(value, int | float) else None
            return ui.number(label, value=number, step=1 if kind is Kind.WHOLE else None)
        case Kind.SWITCH:
            return ui.checkbox(f"{label}: {info.description}", value=bool(value))
        case Kind.CHOICE:
            return ui.select(list(choices_of(info)), value=str(value), label=label).props("options-dense")
        case Kind.PAIRS | Kind.WORDS:
            return ui.textarea(label, value=str(value)).props("autogrow rows=1 autocomplete=off")
        case Kind.TEXT | Kind.WHOLES:
            return ui.input(label, value=str(value)).props("autocomplete=off")


def shown_value(kind: Kind, value: object) -> object:
    """A value of a description as its field shows it."""
    match kind:
        case Kind.WORDS | Kind.WHOLES:
            items = value if isinstance(value, list | tuple) else ()
            between = (
                ", " if sum(len(str(item)) for item in items) < 60 and not any("," in str(i) for i in items) else "\n"
            )
            return between.join(map(str, items))
        case Kind.PAIRS:
            pairs = value.items() if isinstance(value, Mapping) else ()
            return "\n".join(f"{key} = {text}" for key, text in pairs)
        case Kind.TEXT:
            return "" if value is None else str(value)
        case Kind.CHOICE:
            return str(value.value) if isinstance(value, Enum) else value
        case Kind.WHOLE | Kind.NUMBER | Kind.SWITCH:
            return value


def read_value(kind: Kind, entered: object) -> object:
    """What a field holds, as JSON has it; what is no such value goes on as text, for the server to judge."""
    match kind:
        case Kind.SWITCH:
            return bool(entered)
        case Kind.WHOLE | Kind.NUMBER if entered is None or entered == "":
            return OMIT
        case Kind.WHOLE if isinstance(entered, float) and entered.is_integer():
            return int(entered)
        case Kind.WHOLES:
            return [int(item) if item.isascii() and item.isdigit() else item for item in _items(entered)]
        case Kind.WORDS:
            return _items(entered)
        case Kind.PAIRS:
            pairs = (line.partition("=") for line in str(entered or "").splitlines() if line.strip())
            return {key.strip(): value.strip() for key, _, value in pairs}
        case Kind.TEXT:
            text = str(entered or "").strip()
            return text or OMIT
        case _:
            return entered


def _items(entered: object) -> list[str]:
    """Items with lines between them, or with commas where they stand in one line."""
    text = str(entered or "").strip()
    parts = text.splitlines() if "\n" in text else text.split(",")
    return [part.strip() for part in parts if part.strip()]
