"""What a payload says about its tensors before their numbers: name, number format, shape, place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Final

from glora.v1 import types_pb2
from glora_wire.errors import GloraError, Reason


class TensorDtype(StrEnum):
    """Number formats that may travel."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def code(self) -> str:
        """The format's name in a safetensors header."""
        return _CODES[self]

    @property
    def bytes(self) -> int:
        """Bytes per number."""
        return 4 if self is TensorDtype.FLOAT32 else 2

    @classmethod
    def from_code(cls, code: str) -> TensorDtype | None:
        """The format that a safetensors header calls `code`; None when it may not travel."""
        return _BY_CODE.get(code)

    def to_proto(self) -> types_pb2.TensorDtype.ValueType:
        """Number of the format in the protos."""
        return _TO_PROTO[self]

    @classmethod
    def from_proto(cls, number: types_pb2.TensorDtype.ValueType) -> TensorDtype:
        """The format with this number; raises GloraError STREAM_MALFORMED when there is none."""
        try:
            return _FROM_PROTO[number]
        except KeyError:
            raise GloraError(
                Reason.STREAM_MALFORMED,
                f"The message names number format {number}, which is not known here.",
                dtype=number,
            ) from None


_CODES: Final = {TensorDtype.FLOAT32: "F32", TensorDtype.BFLOAT16: "BF16", TensorDtype.FLOAT16: "F16"}
_BY_CODE: Final = {code: dtype for dtype, code in _CODES.items()}
_TO_PROTO: Final = {
    TensorDtype.FLOAT32: types_pb2.TENSOR_DTYPE_FLOAT32,
    TensorDtype.BFLOAT16: types_pb2.TENSOR_DTYPE_BFLOAT16,
    TensorDtype.FLOAT16: types_pb2.TENSOR_DTYPE_FLOAT16,
}
_FROM_PROTO: Final = {number: dtype for dtype, number in _TO_PROTO.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, number format and shape of one tensor."""

    name: str
    dtype: TensorDtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return prod(self.shape) * self.dtype.bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a file: what it is and where its bytes lie, `offset` counted from the start of the file."""

    spec: TensorSpec
    offset: int

    @property
    def end(self) -> int:
        """Offset of the first byte after the tensor."""
        return self.offset + self.spec.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadHeader:
    """What a file holds, in the order of the bytes; every number has been checked against the file's size."""

    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    total_bytes: int

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors in file order."""
        return tuple(entry.spec for entry in self.entries)

    def entry(self, name: str) -> TensorEntry:
        """The tensor with this name; raises KeyError."""
        for entry in self.entries:
            if entry.spec.name == name:
                return entry
        raise KeyError(name)

    def by_name(self) -> dict[str, TensorEntry]:
        """All tensors by name, a new dict."""
        return {entry.spec.name: entry for entry in self.entries}
