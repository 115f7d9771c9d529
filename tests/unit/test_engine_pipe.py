"""The pipe between the server and its worker: whole records, or an error that says that there will be none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from glora_server.coordinator.model import StatePart, TensorData, TensorKind
from glora_server.engines.pipe import Pipe


@pytest.fixture
def pipes() -> Iterator[tuple[Pipe, Pipe]]:
    first, second = (Pipe(end) for end in socket.socketpair())
    with closing(first), closing(second):
        yield first, second


def _exchange(pipes: tuple[Pipe, Pipe], record: object) -> object:
    sending = threading.Thread(target=pipes[0].send, args=(record,))
    sending.start()
    arrived: object = pipes[1].receive()
    sending.join()
    return arrived


def _part(*data: bytes | bytearray | memoryview) -> StatePart:
    tensors = {
        f"t{number}": TensorData(dtype="float32", shape=(len(item) // 4,), data=item)
        for number, item in enumerate(data)
    }
    return StatePart(name="layer.0", kind=TensorKind.MODULE, tensors=tensors)


def test_tensors_of_any_size_arrive_as_they_were(pipes: tuple[Pipe, Pipe]) -> None:
    """More than a socket holds, nothing at all, and the three ways in which numbers lie in memory."""
    large = bytes(range(256)) * (3 * 1024 * 1024 // 256)
    record = (_part(large, b"", bytearray(large[:1000]), memoryview(large)[4:44]), "said", _part())
    assert _exchange(pipes, record) == record
    assert _exchange(pipes, None) is None


def test_what_arrives_is_sent_on(pipes: tuple[Pipe, Pipe]) -> None:
    """A part that no update carries goes back as it came."""
    record = _part(b"12345678", bytearray(b"abcd"))
    assert _exchange(pipes, _exchange(pipes, record)) == record


def test_what_cannot_be_pickled_leaves_the_pipe_in_step(pipes: tuple[Pipe, Pipe]) -> None:
    with pytest.raises(Exception, match="pickle"):
        pipes[0].send((_part(b"1234"), lambda: None))
    assert _exchange(pipes, "next") == "next"


def test_the_end_of_the_other_side_is_an_error(pipes: tuple[Pipe, Pipe]) -> None:
    pipes[0].close()
    with pytest.raises(EOFError):
        pipes[1].receive()
    with pytest.raises(OSError, match="pipe"):
        pipes[1].send("anybody?")
