"""JSON from strangers, read with the type of every value stated; errors name the path of the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from glora_wire.errors import GloraError, Reason


@dataclass(frozen=True, slots=True)
class Node:
    """One value of a document and where it stands; each reader raises GloraError with `reason` when it does not fit."""

    value: object
    path: str
    reason: Reason

    def record(self, keys: frozenset[str]) -> Mapping[str, Node]:
        """The object with exactly these keys."""
        found = self.mapping()
        unknown, missing = sorted(found.keys() - keys), sorted(keys - found.keys())
        if unknown:
            raise self.error(f"has the unknown key {_short(unknown[0])}; known are {', '.join(sorted(keys))}")
        if missing:
            raise self.error(f"lacks the key {missing[0]!r}")
        return found

    def mapping(self) -> Mapping[str, Node]:
        """The object, whatever its keys."""
        if not isinstance(self.value, dict):
            raise self.error("must be an object")
        prefix = f"{self.path}." if self.path else ""
        return {key: Node(value, f"{prefix}{_plain(key)}", self.reason) for key, value in self.value.items()}

    def items(self, limit: int) -> tuple[Node, ...]:
        """The list, of at most `limit` elements."""
        if not isinstance(self.value, list):
            raise self.error("must be a list")
        if len(self.value) > limit:
            raise self.error(f"has {len(self.value)} elements; at most {limit} are allowed")
        return tuple(Node(value, f"{self.path}[{index}]", self.reason) for index, value in enumerate(self.value))

    def text(self) -> str:
        """The text."""
        if not isinstance(self.value, str):
            raise self.error("must be a text")
        return self.value

    def whole(self) -> int:
        """The whole number (a bool or 1.0 is none)."""
        if type(self.value) is not int:
            raise self.error("must be a whole number")
        return self.value

    def real(self) -> float:
        """The number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.error("must be a number")
        try:
            return float(self.value)
        except OverflowError:
            raise self.error("is too large a number") from None

    def error(self, what: str) -> GloraError:
        """The error that says what this value must be or lacks."""
        where = self.path or "the document"
        shown = "" if isinstance(self.value, dict | list) else f" (it is {_short(self.value)})"
        return GloraError(self.reason, f"{where} {what}{shown}.", key=self.path)


def parse(text: str, *, reason: Reason, limit: int) -> Node:
    """The document in `text`, of at most `limit` characters; refuses repeated keys, NaN and infinities."""
    if len(text) > limit:
        raise GloraError(reason, f"The document has {len(text)} characters; at most {limit} are allowed.")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise GloraError(reason, f"The document is not JSON: {_short(str(error))}.") from error
    return Node(value, "", reason)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document: dict[str, object] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"the key {_short(key)} stands there twice")
        document[key] = value
    return document


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a number")


def _plain(key: str) -> str:
    """The key as it may stand in a message: keys can hold line breaks and lone surrogates."""
    return key if len(key) <= 100 and key.isprintable() else _short(key)


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, str) or len(value) < 200 else repr(value[:200])
    return text if len(text) <= 120 else f"{text[:117]}..."
