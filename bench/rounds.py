"""A round without training: ours, the least that a network could cost, and Flower, in one table from one run.

    python bench/rounds.py [--quick] [--cells small:2,7b:8] [--rounds 4] [--dtype bfloat16] [--flower PYTHON] [--where]

Seconds per round are those from one commit to the next (`closed_at` of two rounds in the database, when the new version
is durable): what a user waits for the next version, planning, offers and wake-ups included. The first round is not
counted. Devices do not train: each sends back what it was sent, moved a little, so a round is all that is not training.

`glora` is the product with its defaults: mutual TLS, BLAKE3, fsync, SQLite, GLoRA with `accuracy = "fast"` (`--accuracy
exact` is the product's default), every process a real one (`rounds_glora.py`). `floor` is plain grpcio without TLS,
digests and files, and with a running sum on the server (`rounds_processes.py`). `Flower` is its legacy `start_server`
with NumPyClients, float32 whatever the wire is. All share this machine's cores: trust ratios before seconds.

Peaks are resident sizes of the server since the first round, of its aggregation worker, and of the largest device from
its start, without the process that stands in for training. CPU seconds are those of the server's own process, for each
GB of payload that it sent and received. `--where` adds when the last device had done each step, and who used the CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from glora_cli.demo_run import ending_cleanly, free_port

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.rounds_glora import Measured, Order, measure_glora
from bench.rounds_processes import Payload, Told

PAYLOADS: Final = {
    "small": Payload(name="small", modules=24, width=768, rank=8),
    "7b": Payload(name="7b", modules=128, width=4096, rank=16),
}
CELLS: Final = "small:2,small:8,small:32,7b:2,7b:8"
QUICK: Final = "small:2,small:8"
_SCRIPT: Final = Path(__file__).with_name("rounds_processes.py")
_FIRST_PORT: Final = 19_000
_NO_FLOWER: Final = "not run: name a Python that has flwr with --flower"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What one payload and number of clients cost; Flower None: it was not run, or `note` says what went wrong."""

    order: Order
    floor: Measured
    glora: Measured
    flower: Measured | None = None
    note: str = _NO_FLOWER

    @property
    def name(self) -> str:
        return f"{self.order.payload.name} × {self.order.clients}"


# peers


def measure_peer(order: Order, folder: Path, python: str, role: str, words: Sequence[int]) -> Measured:
    """A server and its clients of one role; `words` describe the payload. Raises RuntimeError, TimeoutExpired."""
    folder.mkdir()
    port, until = free_port(_FIRST_PORT), time.monotonic() + order.limit
    told = [str(port), str(order.clients), str(order.rounds), *map(str, words)]
    clients = [str(port), str(order.payload.size)] if role == "floor" else [str(port)]
    started = [_peer(folder, python, f"{role}-server", told)]
    try:
        started += [_peer(folder, python, f"{role}-client", clients, number) for number in range(order.clients)]
        for process in started:
            if process.wait(max(0.0, until - time.monotonic())) != 0:
                raise RuntimeError(f"{role} ended with {process.returncode}: {_logged(folder)[-2000:]}")
    finally:
        for process in started:
            process.kill()
            process.wait()
    server = Told.parse(folder / f"{role}-server.out")
    size = order.payload.size if role == "floor" else order.payload.minimum
    return Measured(
        seconds=tuple(after - before for before, after in pairwise(server.ends)),
        server_mb=server.peak,
        device_mb=max(Told.parse(path).peak for path in folder.glob(f"{role}-client*.out")),
        cpu_per_gb=server.cpu / ((order.rounds - 1) * order.clients * 2 * size / 1e9),
    )


def _peer(
    folder: Path, python: str, role: str, words: Sequence[str], number: int | str = ""
) -> subprocess.Popen[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    home = {"HOME": str(folder), "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    with (folder / f"{role}{number}.out").open("wb") as out, (folder / f"{role}{number}.log").open("wb") as log:
        return subprocess.Popen(
            [python, str(_SCRIPT), role, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=kept | home
        )


def _logged(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))


# one run


def file_cost() -> float:
    """CPU seconds that this machine takes to write a GB into a new file, which every update becomes one time."""
    piece, count = os.urandom(1 << 20), 256
    with tempfile.TemporaryFile(prefix="glora-rounds-", buffering=0) as file:
        begun = time.process_time()
        for _ in range(count):
            file.write(piece)
        return (time.process_time() - begun) / (count * len(piece) / 1e9)


def measure(order: Order, flower: str | None) -> Cell:
    """The cell: the floor, Flower and ours, one after the other."""
    payload = order.payload
    with tempfile.TemporaryDirectory(prefix="glora-rounds-") as temporary:
        folder = Path(temporary)
        print(f"{payload.name} × {order.clients}: floor …", file=sys.stderr, flush=True)
        floor = measure_peer(order, folder / "floor", sys.executable, "floor", (payload.size, int(payload.half)))
        peer, note = None, _NO_FLOWER
        if flower is not None:
            print(f"{payload.name} × {order.clients}: Flower …", file=sys.stderr, flush=True)
            words = (payload.modules, payload.width, payload.rank)
            try:
                peer = measure_peer(order, folder / "flower", flower, "flower", words)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                note = f"not measured: {str(error).strip().splitlines()[-1]}"
        print(f"{payload.name} × {order.clients}: glora …", file=sys.stderr, flush=True)
        return Cell(order=order, floor=floor, glora=measure_glora(order, folder / "glora"), flower=peer, note=note)


def printed(cells: Sequence[Cell]) -> None:
    print(
        "| payload × clients | who | s/round | best | × floor | × Flower | server MB | worker MB | device MB ", end=""
    )
    print("| server CPU-s/GB | bytes / fp32 minimum |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for cell in cells:
        for who, found in (("floor", cell.floor), ("Flower", cell.flower), ("glora", cell.glora)):
            if found is None:
                print(f"| {cell.name} | {who} | {cell.note} |" + 8 * " |")
                continue
            against = "" if cell.flower is None else f"{found.median / cell.flower.median:.2f}"
            worker = "" if found.worker_mb is None else f"{found.worker_mb:.0f}"
            share = "" if found.bytes_ratio is None else f"{found.bytes_ratio:.4f}"
            print(
                f"| {cell.name} | {who} | {found.median:.3f} | {min(found.seconds):.3f} "
                f"| {found.median / cell.floor.median:.1f} | {against} | {found.server_mb:.0f} | {worker} "
                f"| {found.device_mb:.0f} | {found.cpu_per_gb:.2f} | {share} |"
            )


def where(cells: Sequence[Cell]) -> None:
    """When, after a commit, the last device had done each step (ms), and CPU milliseconds a round by process."""
    print("\n| payload × clients | " + " | ".join(name for name, _ in cells[0].glora.steps), end="")
    print(" | CPU: " + " | CPU: ".join(name for name, _ in cells[0].glora.cpu) + " |")
    print("|---" * (1 + len(cells[0].glora.steps) + len(cells[0].glora.cpu)) + "|")
    for cell in cells:
        figures = [f"{1000 * seconds:.0f}" for _, seconds in (*cell.glora.steps, *cell.glora.cpu)]
        print(f"| {cell.name} | " + " | ".join(figures) + " |")


# targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A limit, and what was found."""

    name: str
    where: str
    found: float
    limit: float
    unit: str
    least: bool = False
    """The limit is one from below."""

    @property
    def line(self) -> str:
        reached = self.found >= self.limit if self.least else self.found <= self.limit
        sign, word = ("≥" if self.least else "≤"), ("reached" if reached else "MISSED")
        return f"- {self.name} {self.where}: {word}: {self.found:.4g} {self.unit} ({sign} {self.limit:.4g})"


def targets(cells: Sequence[Cell]) -> Iterator[Target]:
    """What the project asks of itself (P1 to P5 and P10) and this run can tell."""
    for cell in cells:
        yield from _times(cell)
        yield from _costs(cell)
    for payload in dict.fromkeys(cell.order.payload.name for cell in cells):
        peaks = [cell.glora.server_mb for cell in cells if cell.order.payload.name == payload]
        if len(peaks) > 1:
            what, ratio = f"{payload}, most over fewest clients", max(peaks) / min(peaks)
            yield Target(name="P4", where=what, found=ratio, limit=1.05, unit="of the server's peak")


def _times(cell: Cell) -> Iterator[Target]:
    name, found, payload = cell.name, cell.glora.median, cell.order.payload
    key = (payload.name, cell.order.clients)
    if key == ("7b", 8):
        yield Target(name="P1", where=name, found=found / cell.floor.median, limit=2.2, unit="× floor")
        yield Target(name="P1", where=name, found=found, limit=0.55 if payload.half else 0.95, unit="s a round")
        if cell.flower is not None:
            ratio = cell.flower.median / found
            yield Target(name="P1", where=name, found=ratio, limit=9.0, unit="× as fast as Flower", least=True)
    if key == ("small", 32):
        yield Target(name="P2", where=name, found=found, limit=0.25, unit="s a round")
    if cell.flower is not None:
        yield Target(name="P3", where=name, found=found / cell.flower.median, limit=1.0, unit="× Flower")


def _costs(cell: Cell) -> Iterator[Target]:
    name, found, size = cell.name, cell.glora, cell.order.payload.size / 1e6
    share = 0.505 if cell.order.payload.half else 1.01
    yield Target(name="P4", where=name, found=found.server_mb, limit=150 + 3 * size, unit="MB of the server")
    yield Target(name="P5", where=name, found=found.cpu_per_gb, limit=0.65, unit="CPU-s of the server a GB")
    yield Target(name="P5", where=name, found=found.bytes_ratio or 0.0, limit=share, unit="of the fp32 minimum")
    for path, milliseconds, count in found.answers:
        limit = 50.0 if path == "/healthz" else 100.0
        yield Target(name="P5", where=name, found=milliseconds, limit=limit, unit=f"ms, p99 of {count} {path}")
    yield Target(name="P10", where=name, found=found.device_mb, limit=60 + 2 * size, unit="MB of a device")


def orders(given: argparse.Namespace) -> Iterator[Order]:
    for cell in (given.cells or (QUICK if given.quick else CELLS)).split(","):
        name, _, clients = cell.partition(":")
        yield Order(
            payload=replace(PAYLOADS[name], half=given.dtype == "bfloat16"),
            clients=int(clients),
            rounds=given.rounds,
            limit=given.limit,
            accuracy=given.accuracy,
            asked=name == "7b",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK}")
    parser.add_argument("--cells", help=f"payload:clients with commas, of {', '.join(PAYLOADS)}; default {CELLS}")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each; the first is not counted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="numbers on the wire")
    parser.add_argument("--accuracy", choices=("fast", "exact"), default="fast", help="of GLoRA")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that each federation may take")
    parser.add_argument("--flower", metavar="PYTHON", help="an interpreter that has flwr")
    parser.add_argument("--where", action="store_true", help="where the time goes")
    given = parser.parse_args()
    if given.rounds < 2:
        parser.error("--rounds must be at least 2, for the first one is not counted")
    begun, writing = time.monotonic(), file_cost()
    with ending_cleanly():
        cells = [measure(order, given.flower) for order in orders(given)]
    print(f"{given.dtype} on the wire, GLoRA {given.accuracy}, {given.rounds - 1} rounds after a first one.")
    cores, spent = len(os.sched_getaffinity(0)), time.monotonic() - begun
    print(f"{cores} cores, load {os.getloadavg()[1]:.1f}; {spent:.0f} s in all; ", end="")
    print(f"writing a new file takes {writing:.2f} CPU-s a GB.\n")
    printed(cells)
    if given.where:
        where(cells)
    print("\nTargets:\n" + "\n".join(target.line for target in targets(cells)))


if __name__ == "__main__":
    main()
