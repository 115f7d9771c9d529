"""A federation of real `glora` processes on this machine: one server, devices with state folders of their own.

Everything that is started lives in a process group of its own and ends with the federation, and with this process.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import httpx2
from glora_processes import HOST, LOOK_SECONDS, Ended, Process, Processes, free_port, until
from prometheus_client.parser import text_string_to_metric_families

from glora_cli.rest import Api
from glora_client.capabilities import profile
from glora_client.identity import join
from glora_client.state import Identity, StateFolder
from glora_dashboard.models import DeviceAnswer, MeasurementAnswer, NewTokenAnswer, SystemAnswer
from glora_dashboard.run_models import RoundAnswer, RunAnswer
from glora_server.security.admin_token import read_admin_token
from glora_wire.errors import GloraError, Reason

LIVE: Final[weakref.WeakSet[Federation]] = weakref.WeakSet()
"""Federations whose logs are worth showing when a test fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where the server listens."""

    grpc: int
    enrolment: int
    http: int


@dataclass(eq=False)
class Federation(Processes):
    """One server's folder, its processes, and how to speak with them; a context manager that ends them all."""

    settings: str = ""
    ports: Ports = field(default_factory=lambda: Ports(grpc=free_port(), enrolment=free_port(), http=free_port()))
    ended: bool = False

    def __enter__(self) -> Federation:
        for name in ("logs", "server", "devices"):
            (self.folder / name).mkdir(mode=0o700, parents=True)
        for gone in [other for other in LIVE if other.ended]:
            LIVE.discard(gone)
        LIVE.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        # Its logs stay worth showing: a fixture ends before its failure is reported.
        self.ended = True

    def admin(self, *words: str, within: float = 400.0) -> Ended:
        """Run an administrative command for this server to its end."""
        return self.run(*words, "--server-url", self.url, "--data-dir", str(self.data_dir), within=within)

    # the server

    @property
    def data_dir(self) -> Path:
        return self.folder / "server"

    @property
    def database(self) -> Path:
        return self.data_dir / "glora.sqlite3"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.ports.http}"

    def start_server(self) -> Process:
        """A server that answers, on the same ports and data as the one before it."""
        (self.data_dir / "glora.toml").write_text(self._toml(), encoding="utf-8")
        process = self.start("server", "server", "--data-dir", str(self.data_dir))
        with httpx2.Client(base_url=self.url, trust_env=False, timeout=2.0) as http:

            def answers() -> bool:
                assert process.alive, f"the server ended:\n{process.text[-4000:]}"
                with contextlib.suppress(httpx2.TransportError):
                    return http.get("/healthz").is_success
                return False

            until(answers, "the server answers", 600.0)
        return process

    def api(self) -> Api:
        """The server's API; a context manager."""
        return Api(self.url, read_admin_token(self.data_dir))

    def events(self, name: str) -> list[dict[str, object]]:
        """What the server logged under this name, in all of its lives."""
        lines = (self.folder / "logs" / "server.log").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if f'"{name}"' in line and line.startswith("{")]
        return [event for event in found if event["event"] == name]

    def rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """What the database file says, also while no server runs."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return connection.execute(query, values).fetchall()

    def _toml(self) -> str:
        return (
            f'[grpc]\nhost = "{HOST}"\nport = {self.ports.grpc}\npublic_names = ["{HOST}"]\n'
            f'[enrolment]\nhost = "{HOST}"\nport = {self.ports.enrolment}\n[http]\nport = {self.ports.http}\n'
            f'[worker]\nthreads = 1\n[log]\nformat = "json"\n{self.settings}'
        )

    # devices

    def token(self, *, uses: int = 1, max_rank: int = 16, ttl_seconds: float = 3600.0, **more: object) -> str:
        """A fresh join token."""
        with self.api() as api:
            order = {"uses": uses, "max_rank": max_rank, "ttl_seconds": ttl_seconds, **more}
            return api.post(NewTokenAnswer, "/tokens", order).join_token

    def state_dir(self, name: str) -> Path:
        return self.folder / "devices" / name

    def join(self, name: str, rank: int, token: str | None = None, *, through: int | None = None) -> Identity:
        """Join in this process (quicker than the command); `through` is a port that leads to the server's own."""
        state = StateFolder(self.state_dir(name))
        try:
            joined = join(
                state,
                server=f"{HOST}:{self.ports.enrolment}",
                token=token or self.token(max_rank=rank),
                name=name,
                rank=rank,
                profile=profile(rank=rank),
            )
            identity = joined.identity
            if through is not None:
                identity = replace(identity, port=through)
                state.write("identity.json", json.dumps({f: getattr(identity, f) for f in Identity.__slots__}))
        finally:
            state.close()
        return identity

    def join_by_command(self, name: str, rank: int, token: str) -> Ended:
        """Join as people do."""
        server = ("--server", f"{HOST}:{self.ports.enrolment}", "--token", token)
        return self.run(
            "client", "join", *server, "--name", name, "--rank", str(rank), "--state-dir", str(self.state_dir(name))
        )

    def start_device(self, name: str, model: Path, *words: str) -> Process:
        """A device at work (one torch thread); `words` say with which data."""
        state = ("--state-dir", str(self.state_dir(name)))
        return self.start(name, "client", "run", "--model", str(model), "--threads", "1", *state, *words)

    def until_online(self, *names: str, within: float = 200.0) -> None:
        """Return when these devices wait for work."""
        with self.api() as api:

            def online() -> bool:
                there = {device.name for device in api.every(DeviceAnswer, "/devices") if device.online}
                return set(names) <= there

            until(online, f"{', '.join(names)} wait for work", within, watching=self.processes)

    # runs

    def create_run(self, toml: str, manifest: dict[str, object], *, start: bool = True) -> RunAnswer:
        """Create a run whose manifest is known."""
        with self.api() as api:
            return api.post(RunAnswer, "/runs", {"spec_toml": toml, "manifest": manifest, "start": start})

    def show_run(self, name: str) -> RunAnswer:
        with self.api() as api:
            return api.get(RunAnswer, f"/runs/{name}")

    def wait_run(self, name: str, reached: Callable[[RunAnswer], bool], what: str, within: float = 400.0) -> RunAnswer:
        """The run once `reached`; told of every change by the server, whose restarts are waited for."""
        deadline = time.monotonic() + within
        known = -1
        while time.monotonic() < deadline:
            try:
                with self.api() as api:
                    run = api.get(RunAnswer, f"/runs/{name}")
                    while not reached(run) and time.monotonic() < deadline:
                        assert not is_lost(run), f"{name} is {run.phase} ({run.message}) before {what}"
                        assert not self.events("aggregation_failed"), "aggregation failed"
                        known = run.revision
                        run = api.get(RunAnswer, f"/runs/{name}", {"wait": known, "timeout": 2.0})
                    if reached(run):
                        return run
            except GloraError as error:
                if error.reason is not Reason.SERVER_UNREACHABLE:
                    raise
                time.sleep(LOOK_SECONDS)
        raise AssertionError(f"{name}: {what} was not reached in {within:.0f} s; {self._standing(name)}")

    def rounds(self, name: str) -> list[RoundAnswer]:
        """All rounds of the run with their devices, the oldest first."""
        with self.api() as api:
            listed = sorted(api.every(RoundAnswer, f"/runs/{name}/rounds"), key=lambda found: found.created_at)
            return [
                api.get(RoundAnswer, f"/runs/{name}/rounds/{found.number}", {"attempt": found.attempt})
                for found in listed
            ]

    def measurements(self, name: str) -> list[MeasurementAnswer]:
        with self.api() as api:
            return api.every(MeasurementAnswer, f"/runs/{name}/measurements")

    def system(self) -> SystemAnswer:
        with self.api() as api:
            return api.get(SystemAnswer, "/system")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = httpx2.get(f"{self.url}/metrics", trust_env=False, timeout=60.0).raise_for_status().text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == name)

    def _standing(self, name: str) -> str:
        try:
            return self.show_run(name).model_dump_json(exclude={"spec", "scores"})
        except GloraError as error:
            return error.message


def is_lost(run: RunAnswer) -> bool:
    """Whether nothing more will come of the run."""
    return run.phase in {"failed", "aborted"}


def completed(run: RunAnswer) -> bool:
    return run.phase == "completed"
