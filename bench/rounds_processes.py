"""The processes that `rounds.py` starts beside the product, and what is read of any process; numpy, no glora, no torch.

    python bench/rounds_processes.py ROLE …

`floor-server`, `floor-client`: a federation of plain grpcio, as small as it can be: raw bytes in chunks of 1 MiB, a
running sum, a held question for the next model; no TLS, no digest, no file. `flower-server`, `flower-client`: Flower's
`start_server` and a NumPyClient, for an interpreter that has flwr. Neither trains: each sends back what it was sent.
In the end each prints one JSON line: a server when each round ended, its peak (MB) and CPU seconds since the first
round; a client its peak.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

import numpy as np

HOST: Final = "127.0.0.1"
CHUNK: Final = 1024 * 1024
_TICKS: Final = 100
_FLOOR: Final = "floor.Floor"
_PATIENCE: Final = 600.0
_ASK_SECONDS: Final = 0.05

Answers = tuple[tuple[str, float, int], ...]
"""For each path: 99th percentile in milliseconds, and of how many answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What is sent: `modules` square modules of width `width` at rank `rank`, in float32 unless `half`."""

    name: str
    modules: int
    width: int
    rank: int
    half: bool = False

    @property
    def numbers(self) -> int:
        return self.modules * 2 * self.width * self.rank

    @property
    def minimum(self) -> int:
        """Bytes of its numbers in float32."""
        return 4 * self.numbers

    @property
    def size(self) -> int:
        """Bytes of its numbers as they are sent."""
        return self.minimum // 2 if self.half else self.minimum


# what the kernel says of a process


def peak_mb(pid: int | str = "self") -> float:
    """Largest resident size since the start or the last `reset_peak`, MB."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def reset_peak(pid: int | str = "self") -> None:
    """Let the largest resident size be the present one."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def cpu_seconds(pid: int | str = "self") -> float:
    """User and system time of the process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a process says of itself in the end."""

    peak: float
    ends: tuple[float, ...] = ()
    """When each round was over; of servers."""
    cpu: float = 0.0
    """Seconds since the first round was over; of servers."""

    def tell(self) -> None:
        """Print it as a line, for `parse`."""
        print(json.dumps({"peak": self.peak, "ends": self.ends, "cpu": self.cpu}), flush=True)

    @classmethod
    def parse(cls, path: Path) -> Told:
        document = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        return cls(peak=document["peak"], ends=tuple(document["ends"]), cpu=document["cpu"])


class Clock:
    """Notes when rounds end; the first one is the warm-up, from whose end memory and CPU time are counted."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._cpu = 0.0

    def round_ended(self) -> None:
        self._ends.append(time.time())
        if len(self._ends) == 1:
            reset_peak()
            self._cpu = cpu_seconds()

    def tell(self) -> None:
        """Print what `rounds.py` reads."""
        Told(peak=peak_mb(), ends=tuple(self._ends), cpu=cpu_seconds() - self._cpu).tell()


# what is asked of a server over HTTP


@contextlib.contextmanager
def asking(server: str, paths: Sequence[str], token: str) -> Iterator[Callable[[], Answers]]:
    """While the block runs, ask for each path every 50 ms; the function tells how quick the answers were."""
    over = threading.Event()
    spent: dict[str, list[float]] = {path: [] for path in paths}

    def ask() -> None:
        connection = http.client.HTTPConnection(server, timeout=30.0)
        while not over.wait(_ASK_SECONDS):
            for path, answers in spent.items():
                begun = time.perf_counter()
                connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
                connection.getresponse().read()
                answers.append(1000 * (time.perf_counter() - begun))
        connection.close()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield lambda: tuple(
            (path, sorted(found)[int(0.99 * (len(found) - 1))], len(found)) for path, found in spent.items()
        )
    finally:
        over.set()
        thread.join()


# the floor


class FloorServer:
    """Model and running sum; `rounds` rounds, each over when all clients have pushed."""

    def __init__(self, clients: int, rounds: int, size: int, *, half: bool) -> None:
        self._clients, self._rounds, self._half = clients, rounds, half
        self._model = bytes(size)
        self._sum = np.zeros(size // (2 if half else 4), np.float32)
        self._pushed = self._number = self._told = 0
        self._changed = threading.Condition()
        self._clock = Clock()
        self.over = threading.Event()

    def pull(self, request: bytes, _context: object) -> Iterator[bytes]:
        """The model of the round that is asked for, once there is one; nothing when there are no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._number >= int(request), _PATIENCE)
            model = memoryview(self._model)
        if self._number < self._rounds:
            yield from (bytes(model[at : at + CHUNK]) for at in range(0, len(model), CHUNK))
            return
        with self._changed:
            self._told += 1
            if self._told == self._clients:
                self._clock.tell()
                self.over.set()

    def push(self, chunks: Iterator[bytes], _context: object) -> bytes:
        """Add an update to the sum; the last one of a round makes the next model."""
        at = 0
        for chunk in chunks:
            part = _numbers(chunk, half=self._half)
            with self._changed:
                self._sum[at : at + len(part)] += part
            at += len(part)
        with self._changed:
            self._pushed += 1
            if self._pushed == self._clients:
                self._sum /= self._clients
                self._model = _packed(self._sum, half=self._half)
                self._sum[:] = 0
                self._pushed, self._number = 0, self._number + 1
                self._clock.round_ended()
                self._changed.notify_all()
        return b""


def _numbers(chunk: bytes, *, half: bool) -> np.ndarray:
    if not half:
        return np.frombuffer(chunk, np.float32)
    return (np.frombuffer(chunk, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _packed(numbers: np.ndarray, *, half: bool) -> bytes:
    return (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes() if half else numbers.tobytes()


def floor_server(port: int, clients: int, rounds: int, size: int, half: int) -> None:
    import grpc  # noqa: PLC0415 - the other roles do without

    floor = FloorServer(clients, rounds, size, half=bool(half))
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Pull": grpc.unary_stream_rpc_method_handler(floor.pull),
        "Push": grpc.stream_unary_rpc_method_handler(floor.push),
    }
    server = grpc.server(ThreadPoolExecutor(2 * clients + 2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_FLOOR, handlers),))
    server.add_insecure_port(f"{HOST}:{port}")
    server.start()
    floor.over.wait(_PATIENCE)
    server.stop(1.0).wait()


def floor_client(port: int, size: int) -> None:
    import grpc  # noqa: PLC0415 - the other roles do without

    buffer = bytearray(size)
    view = memoryview(buffer)
    with grpc.insecure_channel(f"{HOST}:{port}") as channel:
        pull: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{_FLOOR}/Pull")
        push: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(f"/{_FLOOR}/Push")
        number, at = 0, size
        while at:
            at = 0
            for chunk in pull(str(number).encode(), wait_for_ready=True, timeout=_PATIENCE):
                view[at : at + len(chunk)] = chunk
                at += len(chunk)
            if at:
                push((bytes(view[start : start + CHUNK]) for start in range(0, size, CHUNK)), timeout=_PATIENCE)
            number += 1
    Told(peak=peak_mb()).tell()


# Flower


def flower_server(port: int, clients: int, rounds: int, *shape: int) -> None:
    """`shape`: number, width and rank of the modules."""
    common, server = import_module("flwr.common"), import_module("flwr.server")
    modules, width, rank = shape
    clock = Clock()

    class Timed(server.strategy.FedAvg):  # type: ignore[misc,name-defined]  # flwr is not in our environment
        """FedAvg that says when a round is over."""

        def aggregate_fit(self, *given: object) -> object:
            made: object = super().aggregate_fit(*given)
            clock.round_ended()
            return made

    start = [np.zeros(shape, np.float32) for _ in range(modules) for shape in ((rank, width), (width, rank))]
    strategy = Timed(
        min_fit_clients=clients,
        min_available_clients=clients,
        fraction_evaluate=0.0,
        initial_parameters=common.ndarrays_to_parameters(start),
    )
    config = server.ServerConfig(num_rounds=rounds)
    server.start_server(server_address=f"{HOST}:{port}", config=config, strategy=strategy)
    clock.tell()


def flower_client(port: int) -> None:
    client = import_module("flwr.client")

    class Echo(client.NumPyClient):  # type: ignore[misc,name-defined]  # flwr is not in our environment
        """Sends back what it was sent."""

        def fit(self, parameters: object, _config: object) -> tuple[object, int, dict[str, object]]:
            return parameters, 100, {}

    client.start_client(server_address=f"{HOST}:{port}", client=Echo().to_client())
    Told(peak=peak_mb()).tell()


_ROLES: Final[dict[str, Callable[..., None]]] = {
    "floor-server": floor_server,
    "floor-client": floor_client,
    "flower-server": flower_server,
    "flower-client": flower_client,
}

if __name__ == "__main__":
    _ROLES[sys.argv[1]](*map(int, sys.argv[2:]))
