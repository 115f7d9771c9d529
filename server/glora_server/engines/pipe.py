"""Records between the server and its worker: pickled, and the numbers of tensors beside the pickle as they lie there.

    frame = length of the pickle, number of buffers | length of each buffer | pickle | buffers

Neither side copies a state to send it, and what arrives is read into the place where it stays.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from typing import Any, Final

from glora_server.coordinator.model import TensorData

_START: Final = struct.Struct("<QI")
_LENGTH: Final = struct.Struct("<Q")


class Pipe:
    """One end of a private pair of stream sockets; one thread at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, record: object) -> None:
        """Send one record; raises OSError when the other side is gone.

        What cannot be pickled raises before anything is sent.
        """
        buffers: list[memoryview] = []
        packed = io.BytesIO()
        _Pickler(packed, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw())).dump(record)
        lengths = b"".join(_LENGTH.pack(buffer.nbytes) for buffer in buffers)
        start = _START.pack(packed.tell(), len(buffers)) + lengths
        self._socket.sendall(start)
        for buffer in (packed.getbuffer(), *buffers):
            self._socket.sendall(buffer)

    def receive(self) -> Any:
        """The next record; raises EOFError when the other side has closed, OSError when it is lost."""
        size, count = _START.unpack(self._filled(_START.size))
        lengths = [length for (length,) in _LENGTH.iter_unpack(self._filled(count * _LENGTH.size))]
        packed = self._filled(size)
        return pickle.loads(packed, buffers=[self._filled(length) for length in lengths])  # noqa: S301 (our own worker)

    def close(self) -> None:
        """Let the other side find the end of the stream."""
        self._socket.close()

    def _filled(self, length: int) -> bytearray:
        buffer = bytearray(length)
        view = memoryview(buffer)
        while view:
            count = self._socket.recv_into(view, flags=socket.MSG_WAITALL)
            if not count:
                raise EOFError("the other side has closed the pipe")
            view = view[count:]
        return buffer


class _Pickler(pickle.Pickler):
    """Leaves the numbers of tensors out of the pickle."""

    def reducer_override(self, record: Any) -> Any:
        if type(record) is TensorData:
            return _tensor, (record.dtype, record.shape, pickle.PickleBuffer(record.data))
        return NotImplemented


def _tensor(dtype: str, shape: tuple[int, ...], data: bytearray | memoryview) -> TensorData:
    return TensorData(dtype=dtype, shape=shape, data=data)
