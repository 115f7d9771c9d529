"""Reads the header of a payload, strict towards files that strangers send (the format is described in payload.py)."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

from glora_wire.errors import GloraError, Reason
from glora_wire.tensors import PayloadHeader, TensorDtype, TensorEntry, TensorSpec

MAX_HEADER_BYTES: Final = 4 * 1024 * 1024
_MAX_KEPT: Final = 128 * 1024
"""Headers up to here are remembered: some 1,400 tensors. Strangers cannot fill the memory with larger ones."""
_LENGTH_BYTES: Final = 8
_METADATA: Final = "__metadata__"
_MAX_DIMENSIONS: Final = 8
_MAX_NAME: Final = 512
_MAX_ELEMENTS: Final = 2**48
"""Far above any tensor that fits a disk, far below what overflows a 64-bit product."""


def read_header(path: Path) -> PayloadHeader:
    """What the file holds; reads the header only, at most 4 MiB.

    Raises OSError, and GloraError PAYLOAD_MALFORMED for anything that a well-formed file would not have.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length_field = file.read(_LENGTH_BYTES)
        if len(length_field) < _LENGTH_BYTES:
            _malformed(f"it has {size} bytes, which is too short even for the length of a header")
        length = int.from_bytes(length_field, "little")
        if length > MAX_HEADER_BYTES:
            _malformed(f"its header claims {length} bytes; the limit is {MAX_HEADER_BYTES}")
        if _LENGTH_BYTES + length > size:
            _malformed(f"its header claims {length} bytes, but the file ends after {size}")
        text = file.read(length)
    parse = _known_header if length <= _MAX_KEPT else _parse_header
    return parse(text, _LENGTH_BYTES + length, size)


def _parse_header(text: bytes, data_start: int, size: int) -> PayloadHeader:
    document = _decode(text)
    metadata = _metadata(document.pop(_METADATA, None))
    entries = sorted(
        (_entry(name, value, data_start) for name, value in document.items()),
        key=lambda entry: (entry.offset, entry.end),
    )
    position = data_start
    for entry in entries:
        if entry.offset != position:
            what = "overlaps the tensor before it" if entry.offset < position else "leaves a hole before it"
            _malformed(f"tensor {_short(entry.spec.name)} {what}")
        position = entry.end
    if position != size:
        _malformed(f"its tensors end at byte {position}, but the file has {size}")
    return PayloadHeader(entries=tuple(entries), metadata=MappingProxyType(metadata), total_bytes=size)


_known_header = lru_cache(maxsize=8)(_parse_header)
"""Devices of one rank send the same header, and it is read again for every part of a round."""


def _decode(text: bytes) -> dict[str, object]:
    # The library refuses headers that do not start with a brace; so polyglot files are refused here too.
    if not text.startswith(b"{"):
        _malformed("its header does not start with a brace")
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except GloraError:
        raise
    except (ValueError, RecursionError) as error:
        raise _error(f"its header is not JSON in UTF-8 ({type(error).__name__})") from error
    if not isinstance(document, dict):
        _malformed("its header is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        _malformed("its header names the same key twice")
    return document


def _no_constant(text: str) -> NoReturn:
    _malformed(f"its header holds {text}, which is not JSON")


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        _malformed("its metadata is not an object")
    metadata: dict[str, str] = {}
    for key, text in value.items():
        if not isinstance(text, str):
            _malformed(f"its metadata {_short(key)} is not a text")
        metadata[key] = text
    return metadata


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    # Names are repeated in messages, logs and pages: no control characters, no lone surrogates.
    if not name.isprintable() or not 1 <= len(name) <= _MAX_NAME:
        _malformed(f"the tensor name {_short(name)} is not a printable text of at most {_MAX_NAME} characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _malformed(f"tensor {_short(name)} does not have exactly dtype, shape and data_offsets")
    code = value["dtype"]
    dtype = TensorDtype.from_code(code) if isinstance(code, str) else None
    if dtype is None:
        _malformed(f"tensor {_short(name)} has the number format {_short(code)}; F32, BF16 and F16 may travel")
    spec = TensorSpec(name, dtype, _shape(name, value["shape"]))
    offsets = _numbers(value["data_offsets"])
    if offsets is None or len(offsets) != 2:
        _malformed(f"the data_offsets of tensor {_short(name)} are not two whole numbers")
    begin, end = offsets
    if end - begin != spec.nbytes:
        _malformed(f"tensor {_short(name)} has {end - begin} bytes, but its shape needs {spec.nbytes}")
    return TensorEntry(spec=spec, offset=data_start + begin)


def _shape(name: str, value: object) -> tuple[int, ...]:
    shape = _numbers(value)
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        _malformed(f"the shape of tensor {_short(name)} is not a short list of whole numbers")
    # Bounded factor by factor, so that a huge product is never formed, not even one that a zero would hide.
    elements = 1
    for extent in shape:
        elements *= max(extent, 1)
        if elements > _MAX_ELEMENTS:
            _malformed(f"the shape of tensor {_short(name)} has too many elements")
    return shape


def _numbers(value: object) -> tuple[int, ...] | None:
    """The list as whole numbers from 0 to 2^63 - 1; None for anything else (bool is not a number here)."""
    if not isinstance(value, list):
        return None
    numbers: list[int] = []
    for item in value:
        if type(item) is not int or not 0 <= item < 2**63:
            return None
        numbers.append(item)
    return tuple(numbers)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _error(what: str) -> GloraError:
    return GloraError(Reason.PAYLOAD_MALFORMED, f"The payload is not a safetensors file that can be used: {what}.")


def _malformed(what: str) -> NoReturn:
    raise _error(what)
