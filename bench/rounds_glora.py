"""One cell of `rounds.py` for glora: a server and its devices as processes of their own, and what their run costs.

The server is `glora server` with its defaults (SQLite, mutual TLS, BLAKE3, fsync, one thread of aggregation a core) on
loopback ports and a folder of its own. A device is `glora client run`; only its training process is another one, see
`rounds_trainer.py`. Devices have no data to evaluate on, so nobody measures.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from bench.rounds_processes import Answers, Payload, asking, cpu_seconds, peak_mb, reset_peak
from bench.rounds_trainer import launcher
from glora_processes import HOST, Process, Processes, environment, free_port, until

from glora_cli.rest import Api
from glora_client.capabilities import profile
from glora_client.identity import join
from glora_client.state import StateFolder
from glora_dashboard.models import NewTokenAnswer
from glora_dashboard.run_models import RoundAnswer, RunAnswer
from glora_server.security.admin_token import read_admin_token
from glora_wire.manifest import Manifest, ModuleShape, fingerprint_folder, fingerprint_of

RUN: Final = "rounds"
_LOOK_SECONDS: Final = 0.005
_DEVICE: Final = (
    "import runpy, sys; sys.executable = sys.argv.pop(1); runpy.run_module('glora_cli.demo_child', run_name='__main__')"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be measured; the first of the rounds is not counted. `asked`: as many more, while HTTP is asked."""

    payload: Payload
    clients: int
    rounds: int
    limit: float
    accuracy: str
    asked: bool = False

    @property
    def total(self) -> int:
        return self.rounds + (self.rounds - 1 if self.asked else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a federation cost: seconds of each counted round, peaks in MB, CPU seconds of the server's own process."""

    seconds: tuple[float, ...]
    server_mb: float
    device_mb: float
    cpu_per_gb: float
    worker_mb: float | None = None
    bytes_ratio: float | None = None
    answers: Answers = ()
    steps: tuple[tuple[str, float], ...] = ()
    """When, after the last commit, the last device had done each step: median over rounds."""
    cpu: tuple[tuple[str, float], ...] = ()
    """CPU seconds a round of each kind of process, all of that kind together."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(eq=False)
class Site(Processes):
    """A server and its devices in `folder`."""

    ports: tuple[int, int, int] = field(default_factory=lambda: (free_port(), free_port(), free_port()))

    @property
    def data_dir(self) -> Path:
        return self.folder / "server"

    @property
    def http(self) -> str:
        return f"{HOST}:{self.ports[2]}"

    def api(self) -> Api:
        return Api(f"http://{self.http}", read_admin_token(self.data_dir))

    def start_server(self) -> Process:
        for name in ("logs", "server", "devices", "model"):
            (self.folder / name).mkdir(mode=0o700)
        grpc, enrolment, http = self.ports
        (self.data_dir / "glora.toml").write_text(
            f'[grpc]\nhost = "{HOST}"\nport = {grpc}\npublic_names = ["{HOST}"]\n'
            f'[enrolment]\nhost = "{HOST}"\nport = {enrolment}\n[http]\nport = {http}\n[log]\nformat = "json"\n',
            encoding="utf-8",
        )
        process = self.start("server", "server", "--data-dir", str(self.data_dir))
        until(lambda: "worker_started" in process.text, "the worker has started", watching=[process])
        return process

    def model(self) -> Path:
        """The folder of a base model that nobody loads; its fingerprint is real."""
        folder = self.folder / "model"
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(b"nobody reads it")
        return folder

    def start_devices(self, count: int) -> list[Process]:
        rows = self.folder / "rows.jsonl"
        rows.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n', encoding="utf-8")
        model, python = self.model(), launcher(self.folder)
        with self.api() as api:
            token = api.post(NewTokenAnswer, "/tokens", {"uses": count, "max_rank": 64}).join_token
        devices = []
        for number in range(count):
            state = StateFolder(self.folder / "devices" / f"d{number:03}")
            join(
                state,
                server=f"{HOST}:{self.ports[1]}",
                token=token,
                name=state.path.name,
                rank=64,
                profile=profile(rank=64),
            )
            state.close()
            words = ("--model", str(model), "--data", str(rows), "--state-dir", str(state.path))
            devices.append(self._device(state.path.name, python, *words))
        return devices

    def _device(self, name: str, python: Path, *words: str) -> Process:
        log = self.folder / "logs" / f"{name}.log"
        command = [sys.executable, "-P", "-c", _DEVICE, str(python), str(os.getpid()), "client", "run", *words]
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment(),
                start_new_session=True,
            )  # fmt: skip
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def create_run(self, order: Order) -> None:
        payload, folder = order.payload, self.folder / "model"
        files = fingerprint_folder(folder)
        manifest = Manifest(
            task="sequence_classification",
            base_model_name=payload.name,
            base_model_fingerprint=fingerprint_of(files),
            weight_files=files,
            tokenizer_fingerprint="",
            labels=("negative", "positive"),
            modules=tuple(
                ModuleShape(f"encoder.layer.{i}.linear", payload.width, payload.width) for i in range(payload.modules)
            ),
            dense=(),
            target_modules=("linear",),
        )
        with self.api() as api:
            body = {"spec_toml": _spec(order), "manifest": json.loads(manifest.to_json()), "start": True}
            api.post(RunAnswer, "/runs", body)


def _spec(order: Order) -> str:
    payload = order.payload
    return (
        f'name = "{RUN}"\n[model]\npath = "none"\nlabels = ["negative", "positive"]\ntarget_modules = ["linear"]\n'
        f"[lora]\nmax_rank = {payload.rank}\n"
        f'[strategy]\nname = "glora"\noptions = {{ accuracy = "{order.accuracy}" }}\n'
        f"[training]\nsteps = 1\n[policy]\nrounds = {order.total}\ntarget_devices = {order.clients}\n"
        f"quorum = {order.clients}\n[evaluation]\nbefore = false\nafter = false\n"
        f'[wire]\ndtype = "{"bfloat16" if payload.half else "float32"}"\n'
    )


class Journal:
    """What the server logs, read as it is written: asking the server itself would cost it something."""

    def __init__(self, server: Process, limit: float) -> None:
        self._server = server
        self._until = time.monotonic() + limit
        self._file = server.log.open(encoding="utf-8")

    def until_version(self, number: int) -> None:
        """Return as soon as version `number` is published; raises RuntimeError when the server ends or time is up."""
        while True:
            line = self._file.readline()
            if '"version_published"' in line and json.loads(line)["version"] == number:
                return
            if '"aggregation_failed"' in line or not self._server.alive or time.monotonic() > self._until:
                raise RuntimeError(f"version {number} does not come:\n{self._server.text[-3000:]}")
            if not line:
                time.sleep(_LOOK_SECONDS)


def measure_glora(order: Order, folder: Path) -> Measured:
    """The cell, measured; raises AssertionError or RuntimeError when it does not come to an end in time."""
    folder.mkdir()
    site = Site(folder)
    try:
        server = site.start_server()
        devices = site.start_devices(order.clients)
        site.create_run(order)
        return _measured(order, site, server, devices)
    finally:
        site.stop()


def _measured(order: Order, site: Site, server: Process, devices: Sequence[Process]) -> Measured:
    journal, pid = Journal(server, order.limit), server.popen.pid
    journal.until_version(1)
    agents = [device.popen.pid for device in devices]
    worker, trainers = _child(pid, "glora_server.engines.worker"), [_child(agent, "trainer") for agent in agents]
    kinds = {"server": [pid], "aggregation": [worker], "devices": agents, "stand-ins": trainers}
    begun = {kind: sum(map(cpu_seconds, group)) for kind, group in kinds.items()}
    reset_peak(pid)
    reset_peak(worker)
    journal.until_version(order.rounds)
    spent = {kind: sum(map(cpu_seconds, group)) - begun[kind] for kind, group in kinds.items()}
    peaks = [peak_mb(process) for process in (pid, worker, *agents)]
    answers: Answers = ()
    if order.asked:
        paths = ("/healthz", f"/api/v1/runs/{RUN}")
        with asking(site.http, paths, read_admin_token(site.data_dir)) as told:
            journal.until_version(order.total)
        answers = told()
    rounds = _rounds(site, order.rounds)
    moved = sum(item.bytes_down + item.bytes_up for found in rounds[1:] for item in found.assignments)
    counted = order.rounds - 1
    return Measured(
        seconds=tuple(_ended(after) - _ended(before) for before, after in pairwise(rounds)),
        server_mb=peaks[0],
        worker_mb=peaks[1],
        device_mb=max(peaks[2:]),
        cpu_per_gb=spent["server"] / (moved / 1e9),
        bytes_ratio=moved / (counted * order.clients * 2 * order.payload.minimum),
        answers=answers,
        steps=_steps(rounds),
        cpu=tuple((kind, seconds / counted) for kind, seconds in spent.items()),
    )


def _child(pid: int, what: str) -> int:
    """The child of the process in whose command line `what` stands."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text(encoding="ascii").split():
            if what in Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8"):
                return int(child)
    raise RuntimeError(f"process {pid} has no child {what}")


def _rounds(site: Site, count: int) -> list[RoundAnswer]:
    with site.api() as api:
        return [api.get(RoundAnswer, f"/runs/{RUN}/rounds/{number}") for number in range(1, count + 1)]


def _ended(found: RoundAnswer) -> float:
    assert found.closed_at is not None
    return found.closed_at


def _steps(rounds: Sequence[RoundAnswer]) -> tuple[tuple[str, float], ...]:
    names = ("accepted", "delivered", "upload_started", "received", "closed")
    table: dict[str, list[float]] = {}
    for before, after in pairwise(rounds):
        begun = _ended(before)
        table.setdefault("opened", []).append((after.opened_at or begun) - begun)
        for name in names:
            last = max(getattr(item, f"{name}_at") or begun for item in after.assignments)
            table.setdefault(name.replace("closed", "judged"), []).append(last - begun)
        table.setdefault("committed", []).append(_ended(after) - begun)
    return tuple((name, statistics.median(values)) for name, values in table.items())
