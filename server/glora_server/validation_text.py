"""What pydantic found wrong, in sentences: where, what is allowed, what was written."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, LiteralString, NoReturn, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

Location = tuple[str | int, ...]

_SHOWN: Final = 60
_SENTENCES: Final[Mapping[str, str]] = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text in quotes",
    "string_pattern_mismatch": "must look like {pattern}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "enum": "must be one of {expected}",
    "literal_error": "must be one of {expected}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a table of keys and values",
    "model_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
    "missing": "is missing",
    "extra_forbidden": "is not known here",
    "json_invalid": "is not JSON: {error}",
    "value_error": "{error}",
}
_CLAUSE: Final = "glora_clause"
_COMPLETE: Final = "glora_complete"
_WITHOUT_VALUE: Final = frozenset({"missing", "json_invalid", "extra_forbidden", _COMPLETE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong, at `location`; `text` is a clause such as "must be at least 1 (you wrote 0)"."""

    location: Location
    text: str

    @property
    def dotted(self) -> str:
        """The location as people write it: section.key, items as [0]."""
        parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.location]
        return "".join(parts).lstrip(".")

    def sentence(self, place: str) -> str:
        """The problem as a sentence that starts with where it was found."""
        where = f"{place}, {self.dotted}" if self.location else place
        return f"{where}: {self.text}" + ("" if self.text.endswith("?") else ".")


def problems_of(error: ValidationError, model: type[BaseModel]) -> tuple[Problem, ...]:
    """Everything that pydantic found, in the order of the fields of `model`."""
    return tuple(_problem(details, model) for details in error.errors(include_url=False))


def raise_problems(title: str, problems: Iterable[tuple[Location, str, object]]) -> None:
    """Raise a ValidationError that names each (location, clause, value); do nothing when there are none.

    Called inside of a validator the locations are seen from there: pydantic puts the validator's own place in front.
    """
    found = [_init(_CLAUSE, location, text, value) for location, text, value in problems]
    if found:
        raise ValidationError.from_exception_data(title, found)


def raise_complete(title: str, problems: Iterable[Problem]) -> NoReturn:
    """Raise a ValidationError of problems that were put into words already; the same rule for locations."""
    found = [_init(_COMPLETE, problem.location, problem.text, None) for problem in problems]
    raise ValidationError.from_exception_data(title, found)


def _init(kind: LiteralString, location: Location, text: str, value: object) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError(kind, "{text}", {"text": text}), loc=location, input=value)


def nearest(word: str, known: Sequence[str]) -> str:
    """A clause that helps with an unknown word: the one that was probably meant, or all there are."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known: {', '.join(known)}"


def shown(value: object) -> str:
    """A value as it was probably written, cut when it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _problem(details: ErrorDetails, model: type[BaseModel]) -> Problem:
    location: Location = details["loc"]
    if details["type"] == "extra_forbidden":
        keys = known_keys(model, location[:-1])
        return Problem(location=location, text=f"is not a known key; {nearest(str(location[-1]), keys)}")
    return Problem(location=location, text=sentence_of(details))


def sentence_of(details: ErrorDetails) -> str:
    """The clause for one finding of pydantic: what is allowed, and what was written instead."""
    kind = details["type"]
    sentence = _SENTENCES.get(kind)
    text = sentence.format_map(details.get("ctx", {})) if sentence is not None else details["msg"]
    return text if kind in _WITHOUT_VALUE else f"{text} (you wrote {shown(details['input'])})"


def known_keys(model: type[BaseModel], location: Location) -> list[str]:
    """Names that may stand under `location` of `model`; empty where the location leads to no section."""
    current = model
    for part in location:
        if isinstance(part, int):
            continue  # an item of a list: `current` is the section that its items are
        field = current.model_fields.get(part)
        section = None if field is None else _section_of(field.annotation)
        if section is None:
            return []
        current = section
    return list(current.model_fields)


def _section_of(annotation: object) -> type[BaseModel] | None:
    """The section that a field is, or that the items of its list are; None for everything else."""
    kind = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
