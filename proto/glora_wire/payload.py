"""Payloads: safetensors files, written and read without torch, strict towards files that strangers send.

8 bytes     length of the header, little endian
header      JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...},
            padded with spaces so that the numbers start at a multiple of 8
numbers     the tensors, back to back: no holes, no overlaps, nothing after the last one
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from glora_wire.payload_check import check_specs
from glora_wire.payload_reader import MAX_HEADER_BYTES, read_header
from glora_wire.tensors import PayloadHeader, TensorDtype, TensorEntry, TensorSpec

__all__ = [
    "MAX_HEADER_BYTES",
    "PayloadHeader",
    "PayloadLayout",
    "PayloadWriter",
    "TensorDtype",
    "TensorEntry",
    "TensorSpec",
    "check_specs",
    "layout",
    "payload_bytes",
    "read_header",
]

_LENGTH_BYTES: Final = 8
_ALIGNMENT: Final = 8
_METADATA: Final = "__metadata__"
_FORMAT: Final[Mapping[str, str]] = {"format": "pt"}
"""What PEFT and transformers look for in the metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadLayout:
    """How a payload will look, byte by byte: its header and where each tensor goes."""

    header: bytes
    entries: tuple[TensorEntry, ...]

    @property
    def total_bytes(self) -> int:
        """Size of the whole file."""
        return self.entries[-1].end if self.entries else len(self.header)


def layout(specs: Sequence[TensorSpec], metadata: Mapping[str, str] = _FORMAT) -> PayloadLayout:
    """Layout of a payload with these tensors in this order; the same input gives the same bytes.

    Raises ValueError for a repeated or reserved name.
    """
    document: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    begin = 0
    for spec in specs:
        if spec.name in document or spec.name == _METADATA:
            raise ValueError(f"two tensors cannot have the name {spec.name!r}")
        end = begin + spec.nbytes
        document[spec.name] = {
            "dtype": spec.dtype.code,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    entries: list[TensorEntry] = []
    offset = len(header)
    for spec in specs:
        entries.append(TensorEntry(spec=spec, offset=offset))
        offset += spec.nbytes
    return PayloadLayout(header=header, entries=tuple(entries))


def payload_bytes(specs: Sequence[TensorSpec]) -> int:
    """Size of the file that `PayloadWriter` makes of these tensors."""
    return layout(specs).total_bytes


class PayloadWriter:
    """Writes a payload tensor by tensor; the file appears at `path`, complete and synced, when the block ends.

    On any error, also that of a tensor that was never written, nothing is left behind.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] = _FORMAT) -> None:
        self._path = path
        self._layout = layout(specs, metadata)
        self._next = 0
        self._file: BinaryIO | None = None
        self._temporary: Path | None = None

    def __enter__(self) -> Self:
        descriptor, name = tempfile.mkstemp(prefix=f".{self._path.name}.", suffix=".part", dir=self._path.parent)
        self._temporary = Path(name)
        self._file = os.fdopen(descriptor, "wb")
        try:
            self._file.write(self._layout.header)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Append the tensor `name`, which must be the next of the specs; raises ValueError when it does not fit."""
        if self._file is None:
            raise ValueError("the writer is not open")
        if self._next == len(self._layout.entries):
            raise ValueError(f"there is no tensor left to write, but {name!r} came")
        spec = self._layout.entries[self._next].spec
        if name != spec.name:
            raise ValueError(f"the next tensor is {spec.name!r}, not {name!r}")
        view = memoryview(data)
        if view.nbytes != spec.nbytes:
            raise ValueError(f"{name!r} has {spec.nbytes} bytes, not {view.nbytes}")
        self._file.write(view)
        self._next += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except BaseException:
            self._discard()
            raise

    def _finish(self) -> None:
        if self._file is None or self._temporary is None:
            raise ValueError("the writer is not open")
        if self._next != len(self._layout.entries):
            raise ValueError(f"{self._layout.entries[self._next].spec.name!r} was not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        self._file = self._temporary = None
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        self._file = self._temporary = None
