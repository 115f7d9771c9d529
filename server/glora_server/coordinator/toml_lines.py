"""Where each key of a TOML document stands, so that an error can name the line (tomllib keeps no positions)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

KeyPath = tuple[str | int, ...]

_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_SPACE: Final = re.compile(r"[ \t]*")
_FILLER: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR: Final = re.compile(r"[^,\]}#\r\n]*")
_TRIPLE: Final = {
    '"""': re.compile(r'(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}', re.DOTALL),
    "'''": re.compile(r"(?:.*?)'{3,5}", re.DOTALL),
}
_SINGLE: Final = {'"': re.compile(r'(?:[^"\\]|\\.)*"'), "'": re.compile(r"[^']*'")}


def key_lines(text: str) -> Mapping[KeyPath, int]:
    """Line number (from 1) of every table, key and array item; `text` must be TOML that tomllib accepts."""
    scan = _Scan(text.replace("\r\n", "\n"))
    scan.document()
    return scan.lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int | None:
    """The line of `path` or of its nearest ancestor that was written; None when there is none."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


class _Scan:
    """A cursor over a document that is known to be valid."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._text = text
        self._at = 0
        self._counts: dict[KeyPath, int] = {}

    def document(self) -> None:
        """Read statements up to the end."""
        prefix: KeyPath = ()
        while self._skip(_FILLER) < len(self._text):
            if self._text.startswith("[", self._at):
                prefix = self._header()
            else:
                self._pair(prefix)

    def _header(self) -> KeyPath:
        line = self._line()
        array = self._text.startswith("[[", self._at)
        self._at += 2 if array else 1
        path = self._resolve(self._keys())
        self._at += 2 if array else 1
        if array:
            index = self._counts.get(path, 0)
            self._counts[path] = index + 1
            self.lines.setdefault(path, line)
            path = (*path, index)
        self.lines[path] = line
        return path

    def _resolve(self, keys: KeyPath) -> KeyPath:
        """The path with the index of the newest item after the name of an array of tables."""
        path: KeyPath = ()
        for position, key in enumerate(keys, start=1):
            path = (*path, key)
            if path in self._counts and position < len(keys):
                path = (*path, self._counts[path] - 1)
        return path

    def _pair(self, prefix: KeyPath) -> None:
        line = self._line()
        path = prefix
        for key in self._keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self._at += 1
        self._value(path)

    def _keys(self) -> KeyPath:
        keys: list[str] = []
        while True:
            self._skip(_SPACE)
            keys.append(self._key())
            self._skip(_SPACE)
            if not self._text.startswith(".", self._at):
                return tuple(keys)
            self._at += 1

    def _key(self) -> str:
        quote = self._text[self._at]
        start = self._at
        if quote in _SINGLE:
            self._at += 1
            self._skip(_SINGLE[quote])
            return self._text[start + 1 : self._at - 1]
        self._skip(_BARE)
        return self._text[start : self._at]

    def _value(self, path: KeyPath) -> None:
        self._skip(_SPACE)
        opening = self._text[self._at]
        if opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        elif self._text[self._at : self._at + 3] in _TRIPLE:
            pattern = _TRIPLE[self._text[self._at : self._at + 3]]
            self._at += 3
            self._skip(pattern)
        elif opening in _SINGLE:
            self._at += 1
            self._skip(_SINGLE[opening])
        else:
            self._skip(_SCALAR)

    def _array(self, path: KeyPath) -> None:
        self._at += 1
        index = 0
        while self._after_filler() != "]":
            self.lines[*path, index] = self._line()
            self._value((*path, index))
            index += 1
            self._comma()
        self._at += 1

    def _inline_table(self, path: KeyPath) -> None:
        self._at += 1
        while self._after_filler() != "}":
            self._pair(path)
            self._comma()
        self._at += 1

    def _comma(self) -> None:
        if self._after_filler() == ",":
            self._at += 1

    def _after_filler(self) -> str:
        self._skip(_FILLER)
        return self._text[self._at]

    def _skip(self, pattern: re.Pattern[str]) -> int:
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return self._at

    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1
