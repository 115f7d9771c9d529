"""A server without numerics, database or devices: the commands and queries that the web surface calls, in memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from fake_history import FakeHistory

from glora_dashboard.ports import Flavour, HealthCheck
from glora_server.coordinator.errors import unchanged
from glora_server.coordinator.feed import ChangeKind, Feed
from glora_server.coordinator.model import (
    AuditEntry,
    Device,
    DeviceState,
    Listing,
    Measurement,
    MetricPhase,
    ModuleDiagnostics,
    Page,
    Profile,
    Run,
    TokenRecord,
    Version,
    new_id,
)
from glora_server.coordinator.people import Credential, Principal, Role
from glora_server.coordinator.ports import StrategyInfo
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views import (
    AssignmentView,
    DeviceView,
    ExportRecord,
    LiveProgress,
    RankScore,
    RoundView,
    RunView,
    SystemView,
)
from glora_server.coordinator.views_history import AuditFilter, DeviceFilter
from glora_server.rounds.assignment import Assignment, AssignmentKind, AssignmentPhase
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, TokenId, VersionId
from glora_server.rounds.round import Round, RoundPhase
from glora_server.rounds.run import RunEvent, RunPhase, advance
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest, ModuleShape

ADMIN_TOKEN = "correct-horse-battery-staple-0123456789"
NOW = 1_800_000_000.0
ENGINE = Principal(name="engine", role=Role.ADMIN, credential=Credential.ADMIN_TOKEN)
T = TypeVar("T")


def manifest() -> Manifest:
    """A manifest of one module and two labels."""
    return Manifest(
        task="sequence_classification",
        base_model_name="tiny",
        base_model_fingerprint="ab" * 32,
        weight_files={},
        tokenizer_fingerprint="",
        labels=("negative", "positive"),
        modules=(ModuleShape("encoder.layer.0.query", 8, 8),),
        dense=(),
        target_modules=("query",),
    )


def spec(name: str = "demo") -> RunSpec:
    """A small run."""
    return RunSpec.from_json(f'{{"name": "{name}", "model": {{"path": "tiny", "labels": ["negative", "positive"]}}}}')


def device(name: str, state: DeviceState = DeviceState.APPROVED) -> Device:
    """An enrolled device."""
    return Device(
        id=DeviceId(f"id-{name}"),
        name=name,
        state=state,
        declared_rank=16,
        granted_rank=8,
        tags=("lab",),
        token_id=TokenId("tok1"),
        key_sha256="k" * 64,
        certificate_pem="PEM",
        certificate_serial="01",
        certificate_expires_at=NOW + 86400,
        created_at=NOW,
        profile=Profile(platform="Linux", cpu_count=4, memory_bytes=2**33, training_rows=1000),
    )


@dataclass
class FakeServer(FakeHistory):
    """Commands and queries over dictionaries; notes every action in `audit_log`."""

    device_records: dict[str, Device] = field(default_factory=dict)
    token_records: dict[str, TokenRecord] = field(default_factory=dict)
    run_records: dict[str, tuple[Run, RunSpec]] = field(default_factory=dict)
    audit_log: list[AuditEntry] = field(default_factory=list)
    revisions: dict[str, int] = field(default_factory=dict)
    checks: tuple[HealthCheck, ...] = (HealthCheck(name="database", ok=True),)
    export_folders: list[Path] = field(default_factory=list)
    round_deadline: float = NOW + 240
    news: asyncio.Event = field(default_factory=asyncio.Event)
    feed: Feed = field(default_factory=Feed)
    completes_when_waited_for: bool = False
    """A run ends as soon as somebody waits for its next change."""

    @classmethod
    def with_things(cls) -> FakeServer:
        """Three devices and an active run."""
        server = cls()
        server.refill()
        return server

    def refill(self) -> None:
        """Three devices, an active run, and nothing else."""
        self.device_records = {name: device(name) for name in ("pi-1", "pi-2")}
        self.device_records["pi-3"] = device("pi-3", DeviceState.PENDING)
        self.run_records = {"demo": (self._run(spec(), RunPhase.ACTIVE), spec())}
        self.token_records, self.revisions, self.audit_log = {}, {}, []
        self.checks = (HealthCheck(name="database", ok=True),)
        self.round_deadline = NOW + 240
        self.completes_when_waited_for = False

    # commands

    async def create_token(
        self,
        actor: Principal,
        *,
        description: str = "",
        uses: int = 1,
        ttl_seconds: float,
        max_rank: int,
        tags: Sequence[str] = (),
        approve: bool = True,
    ) -> tuple[TokenRecord, str]:
        token = TokenRecord(
            id=TokenId(new_id()),
            secret_sha256="5" * 64,
            description=description,
            created_at=NOW,
            expires_at=NOW + ttl_seconds,
            max_uses=uses,
            max_rank=max_rank,
            tags=tuple(tags),
            approve=approve,
        )
        self.token_records[token.id] = token
        self._note(actor, "token.create", token.id)
        return token, f"glora-join-{token.id}"

    async def revoke_token(self, actor: Principal, token_id: str) -> TokenRecord:
        if token_id not in self.token_records:
            raise GloraError(Reason.TOKEN_UNKNOWN, f"There is no token {token_id}.", token=token_id)
        token = self.token_records[token_id] = replace(self.token_records[token_id], revoked=True)
        self._note(actor, "token.revoke", token_id)
        return token

    async def approve_device(self, actor: Principal, name: str, *, expected: int | None = None) -> Device:
        return self._change(actor, "device.approve", name, expected, state=DeviceState.APPROVED)

    async def suspend_device(self, actor: Principal, name: str, *, expected: int | None = None) -> Device:
        return self._change(actor, "device.suspend", name, expected, state=DeviceState.SUSPENDED)

    async def revoke_device(self, actor: Principal, name: str, *, expected: int | None = None) -> Device:
        return self._change(actor, "device.revoke", name, expected, state=DeviceState.REVOKED)

    async def set_device_rank(self, actor: Principal, name: str, rank: int, *, expected: int | None = None) -> Device:
        if rank > 16:
            raise GloraError(Reason.RANK_NOT_ALLOWED, f"{name} said that it can train ranks up to 16, not {rank}.")
        return self._change(actor, "device.rank", name, expected, rank=rank)

    async def create_run(self, actor: Principal, spec: RunSpec, manifest: Manifest, *, start: bool) -> Run:  # noqa: ARG002
        if spec.name in self.run_records:
            raise GloraError(Reason.NAME_TAKEN, f"There is a run {spec.name} already; choose another name.")
        run = self._run(spec, RunPhase.ACTIVE if start else RunPhase.CREATED)
        self.run_records[spec.name] = (run, spec)
        self._note(actor, "run.create", spec.name)
        return run

    async def start_run(self, actor: Principal, name: str, *, expected: int | None = None) -> Run:
        return self._advance(actor, name, RunEvent.START, expected=expected)

    async def pause_run(self, actor: Principal, name: str, *, expected: int | None = None) -> Run:
        return self._advance(actor, name, RunEvent.PAUSE, expected=expected)

    async def resume_run(self, actor: Principal, name: str, *, expected: int | None = None) -> Run:
        return self._advance(actor, name, RunEvent.RESUME, expected=expected)

    async def abort_run(self, actor: Principal, name: str, reason: str, *, expected: int | None = None) -> Run:
        return self._advance(actor, name, RunEvent.ABORT, reason, expected=expected)

    async def complete_run(self, name: str) -> Run:
        """What the engine does after the last round."""
        return self._advance(ENGINE, name, RunEvent.COMPLETE)

    async def extend_round(self, actor: Principal, name: str, seconds: float, *, expected: int | None = None) -> Round:
        run, _ = self._find(name)
        unchanged(run, expected)
        self.round_deadline += seconds
        self._note(actor, "round.extend", name)
        return self._round(run).round

    async def edit_policy(
        self, actor: Principal, name: str, changes: Mapping[str, object], *, expected: int | None = None
    ) -> Run:
        run, spec = self._find(name)
        version = unchanged(run, expected).row_version + 1
        self.run_records[name] = (replace(run, row_version=version), spec.with_policy(changes))
        self._note(actor, "run.edit", name)
        return run

    async def export(
        self, actor: Principal, run_name: str, *, rank: int, version_number: int | None, flavour: Flavour, folder: Path
    ) -> ExportRecord:
        self._find(run_name)
        if version_number is not None and version_number > 1:
            raise GloraError(Reason.VERSION_UNKNOWN, f"{run_name} has no version {version_number}; it has 0, 1.")
        self.export_folders.append(folder)
        await asyncio.to_thread(folder.mkdir, parents=True)
        contents = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": bytes(300_000)}
        for name, content in contents.items():
            await asyncio.to_thread((folder / name).write_bytes, content)
        self._note(actor, "export", run_name)
        return ExportRecord(
            folder=folder, files=tuple(contents), version_number=1, rank=rank, flavour=flavour, modules=1
        )

    # queries

    async def devices(self, page: Page, wanted: DeviceFilter | None = None) -> Listing[DeviceView]:
        state = None if wanted is None else wanted.state
        found = [item for item in self.device_records.values() if state in {None, item.state}]
        return _part([DeviceView(device=item, online=True) for item in found], page)

    async def device(self, name: str) -> DeviceView:
        return DeviceView(device=self._device(name), online=True, current=self._assignment(), current_run="demo")

    async def tokens(self, page: Page) -> Listing[TokenRecord]:
        return _part(list(self.token_records.values()), page)

    async def runs(self, page: Page) -> Listing[RunView]:
        return _part([self._view(name) for name in self.run_records], page)

    async def plain_runs(self, page: Page) -> Listing[Run]:
        return _part([run for run, _ in self.run_records.values()], page)

    async def run(self, name: str) -> RunView:
        return self._view(name)

    async def rounds(self, run_name: str, page: Page) -> Listing[RoundView]:
        return _part([self._round(self._find(run_name)[0])], page)

    async def versions(self, run_name: str, page: Page) -> Listing[Version]:
        run, _ = self._find(run_name)
        versions = [
            Version(
                id=VersionId(f"v{number}"),
                run_id=run.id,
                number=number,
                round_id=None,
                parent_id=None,
                strategy="glora",
                published=True,
                created_at=NOW,
                summary_json='{"captured": 0.9}',
            )
            for number in (1, 0)
        ]
        return _part(versions, page)

    async def measurements(self, run_name: str, page: Page) -> Listing[Measurement]:
        run, _ = self._find(run_name)
        measured = Measurement(
            assignment_id=AssignmentId("a1"),
            run_id=run.id,
            device_id=DeviceId("id-pi-1"),
            version_id=VersionId("v1"),
            version_number=1,
            phase=MetricPhase.VERSION,
            rank=8,
            loss=float("nan"),
            accuracy=0.75,
            rows=100,
            seconds=1.5,
            measured_at=NOW,
        )
        return _part([measured], page)

    async def diagnostics(
        self,
        run_name: str,
        version_number: int,  # noqa: ARG002
        page: Page,
    ) -> Listing[ModuleDiagnostics]:
        self._find(run_name)
        values = '{"sigma": [3.0, 1.0], "captured": 0.97}'
        found = ModuleDiagnostics(version_id=VersionId("v1"), module="encoder.layer.0.query", values_json=values)
        return _part([found], page)

    async def audit(self, page: Page, wanted: AuditFilter | None = None) -> Listing[AuditEntry]:
        actor = "" if wanted is None else wanted.actor
        return _part([entry for entry in self.audit_log[::-1] if actor in {"", entry.actor}], page)

    async def strategies(self) -> tuple[StrategyInfo, ...]:
        return (
            StrategyInfo(
                name="glora", summary="…", train_mask="both", init="readout", upload_set="factors", mixed_ranks=True
            ),
        )

    async def system(self) -> SystemView:
        return SystemView(
            version="0.1.0",
            started_at=NOW,
            now=NOW + 60,
            grpc_port=7443,
            enrolment_port=7444,
            http_port=8080,
            database="sqlite",
            database_revision="0001",
            worker_device="cpu",
            authority_pin="cd" * 32,
            authority_expires_at=NOW + 10 * 365 * 86400,
            renewal_overdue_seconds=15 * 86400,
            devices=len(self.device_records),
            online_devices=2,
            active_runs=len(self.run_records),
            free_disk_bytes=10**10,
        )

    async def changed(self, run_name: str, revision: int, timeout: float) -> int:  # noqa: ASYNC109
        if self.completes_when_waited_for:
            await self.complete_run(run_name)
        if self.revisions.get(run_name, 0) == revision:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), timeout)
        return self.revisions.get(run_name, 0)

    # health

    async def check(self) -> tuple[HealthCheck, ...]:
        return self.checks

    def _note(self, actor: Principal, action: str, target: str) -> None:
        entry = AuditEntry(id=len(self.audit_log) + 1, at=NOW, actor=actor.name, action=action, target=target)
        self.audit_log.append(entry)
        self.revisions[target] = self.revisions.get(target, 0) + 1
        kind = ChangeKind.RUN if action.startswith("run.") else ChangeKind.DEVICE
        self.feed.note(kind, target)
        self.news.set()
        self.news = asyncio.Event()

    def _change(
        self,
        actor: Principal,
        action: str,
        name: str,
        expected: int | None,
        *,
        state: DeviceState | None = None,
        rank: int | None = None,
    ) -> Device:
        found = unchanged(self._device(name), expected)
        version = found.row_version + 1
        changed = replace(
            found, row_version=version, state=state or found.state, granted_rank=rank or found.granted_rank
        )
        self.device_records[name] = changed
        self._note(actor, action, name)
        return changed

    def _device(self, name: str) -> Device:
        if name not in self.device_records:
            raise GloraError(Reason.DEVICE_UNKNOWN, f"There is no device {name}.", device=name)
        return self.device_records[name]

    def _find(self, name: str) -> tuple[Run, RunSpec]:
        if name not in self.run_records:
            raise GloraError(Reason.RUN_UNKNOWN, f"There is no run {name}; there is demo.", run=name)
        return self.run_records[name]

    def _advance(
        self, actor: Principal, name: str, event: RunEvent, message: str = "", *, expected: int | None = None
    ) -> Run:
        run, spec = self._find(name)
        version = unchanged(run, expected).row_version + 1
        run = replace(run, phase=advance(run.phase, event), message=message or run.message, row_version=version)
        self.run_records[name] = (run, spec)
        self._note(actor, f"run.{event.value}", name)
        return run

    def _run(self, spec: RunSpec, phase: RunPhase) -> Run:
        return Run(
            id=RunId(f"id-{spec.name}"),
            name=spec.name,
            phase=phase,
            spec_json=spec.to_json(),
            manifest=manifest(),
            version_id=VersionId("v1"),
            rounds_done=1,
            created_at=NOW,
            started_at=NOW,
        )

    def _view(self, name: str) -> RunView:
        run, spec = self._find(name)
        score = RankScore(
            version_number=1, rank=8, phase=MetricPhase.VERSION, accuracy=0.75, loss=0.5, rows=100, devices=1
        )
        return RunView(
            run=run,
            spec=spec,
            round=self._round(run),
            waiting="1 of 2 updates are in; pi-1 is uploading.",
            version_number=1,
            eligible_devices=2,
            online_devices=2,
            scores=(score,),
            revision=self.revisions.get(name, 0),
        )

    def _round(self, run: Run) -> RoundView:
        view = self._assignment()
        _, spec = self.run_records[run.name]
        return RoundView(
            round=Round(
                id=RoundId("r2"),
                run_id=run.id,
                number=2,
                version_id=VersionId("v1"),
                policy=spec.policy,
                phase=RoundPhase.COLLECTING,
                assignments=(view.assignment,),
                created_at=NOW,
                opened_at=NOW,
                deadline_at=self.round_deadline,
                target=2,
            ),
            assignments=(view,),
            counts={view.assignment.phase: 1},
            seconds=12.0,
        )

    def _assignment(self) -> AssignmentView:
        return AssignmentView(
            assignment=Assignment(
                id=AssignmentId("a1"),
                run_id=RunId("id-demo"),
                round_id=RoundId("r2"),
                device_id=DeviceId("id-pi-1"),
                kind=AssignmentKind.TRAIN,
                rank=8,
                version_id=VersionId("v1"),
                phase=AssignmentPhase.UPLOADING,
                offered_at=NOW,
                deadline_at=self.round_deadline,
            ),
            device_name="pi-1",
            progress=LiveProgress(phase="uploading", done=61, total=100, loss=0.4, at=NOW),
            bytes_down=1000,
            bytes_up=610,
        )


def _part(items: list[T], page: Page) -> Listing[T]:
    start = int(page.token or 0)
    end = start + page.size
    return Listing(items=tuple(items[start:end]), next_token=str(end) if end < len(items) else "")
