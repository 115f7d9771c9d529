"""A run's description as the run.toml that says the same; what has its default is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Final

from glora_server.coordinator.run_spec import RunSpec

_FIRST: Final = ("name", "seed")


def run_toml(spec: RunSpec) -> str:
    """The text; `parse_run_toml` makes an equal description of it."""
    document = spec.model_dump(mode="json")
    bare = RunSpec.from_json(json.dumps({"name": spec.name, "model": {"path": spec.model.path}}))
    plain = bare.model_dump(mode="json")
    lines = [_pair(key, document[key]) for key in _FIRST if key == "name" or document[key] != plain[key]]
    for section, values in document.items():
        if isinstance(values, dict):
            lines += _section(section, values, plain[section])
    return "\n".join(lines) + "\n"


def _section(name: str, values: Mapping[str, object], plain: Mapping[str, object]) -> Iterator[str]:
    """The lines of one section, with its tables below it; none where all is as it would be anyhow."""
    own = {key: value for key, value in values.items() if value != plain[key] or (name, key) == ("model", "path")}
    tables = {key: value for key, value in own.items() if isinstance(value, dict)}
    pairs = [_pair(key, value) for key, value in own.items() if key not in tables]
    if pairs:
        yield from ("", f"[{name}]", *pairs)
    for key, table in tables.items():
        yield from ("", f"[{name}.{key}]", *(_pair(inner, value) for inner, value in table.items()))


def _pair(key: str, value: object) -> str:
    plain = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return f"{key if plain else _text(key)} = {_value(value)}"


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _text(value)
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case int() | float():
            return repr(value)
        case _:
            raise TypeError(f"run.toml has no way to write {value!r}")


def _text(text: str) -> str:
    """A basic string: JSON's escapes are TOML's too, but for the one character that JSON does not have to escape."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
