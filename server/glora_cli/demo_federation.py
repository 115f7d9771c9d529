"""A whole federation on this machine: one server, devices with ranks of their own, one device that only evaluates.

Everything is done as people do it by hand, with the same commands; the demo only waits and watches.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from glora_cli.demo_corpus import collect_corpus
from glora_cli.demo_data import Split, read_rows, split_rows, write_rows
from glora_cli.demo_report import DeviceShare, Report, Traffic, load_lines, version_accuracies
from glora_cli.demo_run import HOST, Child, Processes, free_port, port_is_free
from glora_cli.demo_spec import RUN_NAME, DemoOptions, run_toml, server_toml
from glora_cli.demo_view import View
from glora_cli.rest import Api
from glora_dashboard.models import NewTokenAnswer, SystemAnswer
from glora_dashboard.run_models import RunAnswer
from glora_server.config import EnrolmentSettings, GrpcSettings
from glora_server.security.admin_token import read_admin_token
from glora_wire.errors import GloraError, Reason

EVALUATOR: Final = "evaluator"
_COMMAND_SECONDS: Final = 300.0
"""For what takes seconds on a machine that has nothing else to do."""
_LOOK_SECONDS: Final = 0.25
_WAIT_SECONDS: Final = 2.0
"""How long the server keeps a question about the run open; processes are looked after in between."""
_STALL_SECONDS: Final = 600.0
_SENT: Final = "glora_sent_bytes_total"
_RECEIVED: Final = "glora_received_bytes_total"


class Federation:
    """The demo's steps in their order; `folder` must be new and empty."""

    def __init__(self, options: DemoOptions, folder: Path, processes: Processes, view: View) -> None:
        self._options = options
        self._folder = folder
        self._processes = processes
        self._view = view
        self._data_dir = folder / "server"
        self._started = time.monotonic()
        self._url = ""
        self._password = secrets.token_urlsafe(12)

    def run(self, adapter: Path, *, kept: bool) -> Report:
        """Do everything; the export goes to the new folder `adapter`. Raises GloraError for whatever fails."""
        split = self._deal_rows()
        self._start_server()
        with Api(self._url, read_admin_token(self._data_dir)) as api:
            # Reading the model takes longest and needs no device, so it goes on while they join.
            creating = self._create_run(split)
            self._join(api, split)
            self._start_devices(split)
            self._processes.finish([creating], _COMMAND_SECONDS)
            self._view.say(f"run {RUN_NAME!r} started: {self._options.rounds} rounds of {self._options.strategy}")
            run = self._follow(api)
            traffic = self._traffic()
            self._export(adapter)
        return self._report(run, split, traffic, adapter, kept=kept)

    @property
    def sign_in(self) -> str:
        """How people get into the browser pages, a sentence."""
        return f"Sign in at {self._url} as admin with the password {self._password}."

    def _deal_rows(self) -> Split:
        data = self._options.data
        rows = collect_corpus() if data is None else read_rows(data)
        split = split_rows(rows, len(self._options.ranks))
        (self._folder / "rows").mkdir()
        for name, part in zip(self._names(), split.devices, strict=True):
            write_rows(self._rows_of(name), part)
        write_rows(self._rows_of(EVALUATOR), split.held_out)
        source = "documentation of Python's standard library" if data is None else str(data)
        count = sum(map(len, split.devices))
        self._view.say(
            f"{count} rows with {len(split.labels)} labels from {source}; {len(split.held_out)} more are held out"
        )
        return split

    def _start_server(self) -> None:
        port = free_port(self._options.port)
        if port != self._options.port:
            self._view.say(f"port {self._options.port} is in use, taking {port}")
        grpc, enrolment = GrpcSettings().port, EnrolmentSettings().port
        self._data_dir.mkdir(mode=0o700)
        settings = server_toml(
            http_port=port,
            grpc_port=grpc if port_is_free(grpc) else 0,
            enrolment_port=enrolment if port_is_free(enrolment) else 0,
            admin_password=self._password,
        )
        (self._data_dir / "glora.toml").write_text(settings, encoding="utf-8")
        self._url = f"http://{HOST}:{port}"
        server = self._processes.start("server", "server", "--data-dir", str(self._data_dir), lasts=True)
        with httpx2.Client(base_url=self._url, trust_env=False, timeout=2.0) as http:
            self._processes.wait_until(lambda: _answers(http), "Starting the server", _COMMAND_SECONDS, server)
        self._view.say(f"server is up: {self._url} for people, gRPC with mutual TLS for devices")
        self._view.say(self.sign_in)
        self._view.say(f"from another terminal: glora run watch {RUN_NAME} {' '.join(self._server())}")

    def _join(self, api: Api, split: Split) -> None:
        """Enrol all devices at once, with one token."""
        order = {
            "description": "devices of the demo",
            "uses": len(split.devices) + 1,
            "ttl_seconds": 3600,
            "max_rank": self._options.max_rank,
        }
        token = api.post(NewTokenAnswer, "/tokens", order)
        port = api.get(SystemAnswer, "/system").enrolment_port
        ranks = dict(zip(self._names(), self._options.ranks, strict=True)) | {EVALUATOR: self._options.max_rank}
        joining = [
            self._processes.start(
                f"{name}-join",
                *("client", "join", "--server", f"{HOST}:{port}", "--token", token.join_token),
                *("--name", name, "--rank", str(rank), *self._state_of(name)),
            )
            for name, rank in ranks.items()
        ]
        self._processes.finish(joining, _COMMAND_SECONDS)

    def _start_devices(self, split: Split) -> None:
        model = ("--model", str(self._options.model), "--threads", "1")
        for name in self._names()[: len(split.devices)]:
            rows = ("--data", str(self._rows_of(name)))
            self._processes.start(name, "client", "run", *model, *rows, *self._state_of(name), lasts=True)
        held_out = ("--evaluate-only", "--eval-data", str(self._rows_of(EVALUATOR)))
        self._processes.start(EVALUATOR, "client", "run", *model, *held_out, *self._state_of(EVALUATOR), lasts=True)
        ranks = zip(self._names(), self._options.ranks, strict=True)
        listed = ", ".join(f"{name} (rank {rank})" for name, rank in ranks)
        self._view.say(f"joined with one token and at work: {listed} and {EVALUATOR}")

    def _create_run(self, split: Split) -> Child:
        spec = self._folder / "run.toml"
        spec.write_text(run_toml(self._options, split.labels), encoding="utf-8")
        return self._processes.start("create", "run", "create", "--spec", str(spec), "--start", *self._server())

    def _follow(self, api: Api) -> RunAnswer:
        """The run once it is complete and every version was measured at every rank."""
        run = api.get(RunAnswer, f"/runs/{RUN_NAME}")
        changed_at = time.monotonic()
        while not self._is_over(run):
            self._view.show(run)
            self._processes.check()
            asked_at, revision = time.monotonic(), run.revision
            run = api.get(RunAnswer, f"/runs/{RUN_NAME}", {"wait": revision, "timeout": _WAIT_SECONDS})
            if run.revision != revision:
                changed_at = time.monotonic()
            elif time.monotonic() - changed_at > _STALL_SECONDS:
                raise GloraError(
                    Reason.INTERNAL,
                    f"Nothing has happened for {_STALL_SECONDS:.0f} s. {run.waiting or run.message} "
                    f"The logs are in {self._folder / 'logs'}; --keep keeps them.",
                )
            time.sleep(max(0.0, _LOOK_SECONDS - (time.monotonic() - asked_at)))
        self._view.show(run)
        return run

    def _is_over(self, run: RunAnswer) -> bool:
        if run.phase in {"failed", "aborted"}:
            raise GloraError(
                Reason.INTERNAL,
                f"The run {run.phase}: {run.message or run.reason or 'no reason was given'}. --keep keeps the logs.",
            )
        wanted = (run.rounds + 1) * len(set(self._options.ranks))
        return run.phase == "completed" and sum(score.phase == "version" for score in run.scores) >= wanted

    def _traffic(self) -> Traffic:
        answer = httpx2.get(f"{self._url}/metrics", trust_env=False, timeout=10.0).raise_for_status()
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                found[sample.name] += int(sample.value) if sample.name in {_SENT, _RECEIVED} else 0
        return Traffic(down=found[_SENT], up=found[_RECEIVED])

    def _export(self, adapter: Path) -> None:
        rank = str(self._options.max_rank)
        exporting = self._processes.start(
            "export", "export", RUN_NAME, "--rank", rank, "--out", str(adapter), *self._server()
        )
        self._processes.finish([exporting], _COMMAND_SECONDS)

    def _report(self, run: RunAnswer, split: Split, traffic: Traffic, adapter: Path, *, kept: bool) -> Report:
        options = self._options
        devices = zip(self._names(), options.ranks, split.devices, strict=True)
        return Report(
            run=run.name,
            strategy=run.strategy,
            model=str(options.model),
            labels=split.labels,
            devices=tuple(DeviceShare(name=name, rank=rank, rows=len(rows)) for name, rank, rows in devices),
            held_out_rows=len(split.held_out),
            versions=version_accuracies(run.scores),
            server_rank=options.max_rank,
            traffic=traffic,
            seconds=time.monotonic() - self._started,
            adapter=str(adapter),
            load=load_lines(options.model, len(split.labels), adapter),
            folder=str(self._folder) if kept else None,
        )

    def _server(self) -> tuple[str, ...]:
        """The options by which an administrative command finds this server."""
        return "--server-url", self._url, "--data-dir", str(self._data_dir)

    def _names(self) -> Sequence[str]:
        return [f"device-{number}" for number in range(1, len(self._options.ranks) + 1)]

    def _rows_of(self, name: str) -> Path:
        return self._folder / "rows" / f"{name}.jsonl"

    def _state_of(self, name: str) -> tuple[str, str]:
        return "--state-dir", str(self._folder / "devices" / name)


def _answers(http: httpx2.Client) -> bool:
    try:
        return http.get("/healthz").is_success
    except httpx2.TransportError:
        return False
