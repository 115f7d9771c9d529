"""Tensors in and out of bytes, row-major and little-endian: state records, payload files.

Payloads are read one tensor at a time: the pages of a mapped file would stay in the worker's resident size
until the whole file is closed, and a file that is cut short under a mapping ends the process with SIGBUS.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from glora_server.coordinator.model import TensorData
from glora_wire.errors import GloraError, Reason
from glora_wire.payload import PayloadHeader, TensorDtype, TensorEntry, read_header

_WIRE: Final[Mapping[TensorDtype, torch.dtype]] = {
    TensorDtype.FLOAT32: torch.float32,
    TensorDtype.BFLOAT16: torch.bfloat16,
    TensorDtype.FLOAT16: torch.float16,
}
_STORED: Final[Mapping[str, torch.dtype]] = {"float32": torch.float32, "float64": torch.float64}
_STORED_NAMES: Final[Mapping[torch.dtype, str]] = {dtype: name for name, dtype in _STORED.items()}


def wire_dtype(dtype: TensorDtype) -> torch.dtype:
    """The torch dtype of a payload's number format."""
    return _WIRE[dtype]


def to_bytes(tensor: Tensor, dtype: torch.dtype) -> bytearray:
    """The tensor's numbers, rounded to `dtype`, row-major."""
    buffer = bytearray(tensor.numel() * dtype.itemsize)
    if buffer:
        torch.frombuffer(buffer, dtype=dtype).view(tensor.shape).copy_(tensor)
    return buffer


def from_bytes(buffer: bytearray, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Tensor over `buffer`, which it shares on the CPU; raises ValueError when the size does not fit the shape."""
    wanted = dtype.itemsize
    for extent in shape:
        wanted *= extent
    if len(buffer) != wanted:
        raise ValueError(f"{len(buffer)} bytes came for a {shape} tensor of {dtype}, which has {wanted}")
    if not buffer:  # frombuffer refuses an empty buffer
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(buffer, dtype=dtype).view(shape).to(device)


def from_record(record: TensorData, device: torch.device) -> Tensor:
    """The tensor of a stored record; raises GloraError INTERNAL for one that no version of the server writes."""
    dtype = _STORED.get(record.dtype)
    if dtype is None:
        raise GloraError(Reason.INTERNAL, f"A stored tensor has the number format {record.dtype!r}, which is unknown.")
    try:
        return from_bytes(bytearray(record.data), dtype, record.shape, device)
    except ValueError as error:
        raise GloraError(Reason.INTERNAL, f"A stored tensor is damaged: {error}.") from error


def to_record(tensor: Tensor) -> TensorData:
    """Record of a tensor; all that is not float64 is kept as float32."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return TensorData(dtype=_STORED_NAMES[dtype], shape=tuple(tensor.shape), data=to_bytes(tensor, dtype))


def header_of(path: Path) -> PayloadHeader:
    """What the payload holds; raises GloraError PAYLOAD_MALFORMED when there is no such file or it is not a payload."""
    try:
        return read_header(path)
    except OSError as error:
        raise _unreadable(path, error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadFile:
    """Some tensors of a payload file, found by name; numbers are read when they are asked for."""

    path: Path
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: Path, keys: Collection[str]) -> PayloadFile:
        """The tensors among `keys` that the file has; reads the header only.

        Raises GloraError PAYLOAD_MALFORMED when there is no such file or it is not a payload.
        """
        entries = header_of(path).entries
        return cls(path=path, entries={entry.spec.name: entry for entry in entries if entry.spec.name in keys})

    def has(self, key: str) -> bool:
        """Whether the file holds the tensor."""
        return key in self.entries

    def read(self, key: str, device: torch.device) -> Tensor:
        """The tensor in the file's dtype; raises GloraError PAYLOAD_MALFORMED when the file is gone or cut short."""
        entry = self.entries[key]
        buffer = bytearray(entry.spec.nbytes)
        try:
            with self.path.open("rb") as file:
                file.seek(entry.offset)
                got = file.readinto(buffer)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if got != len(buffer):
            raise GloraError(
                Reason.PAYLOAD_MALFORMED,
                f"The payload ends inside the tensor {key!r}; it must be sent again.",
                name=key,
            )
        return from_bytes(buffer, _WIRE[entry.spec.dtype], entry.spec.shape, device)


def _unreadable(path: Path, error: OSError) -> GloraError:
    return GloraError(
        Reason.PAYLOAD_MALFORMED,
        f"The payload {path.name} cannot be read ({error.strerror or type(error).__name__}); it must be sent again.",
        path=path.name,
    )
