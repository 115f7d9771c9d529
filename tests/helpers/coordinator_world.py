"""A whole coordinator for tests: real services and store, small fakes around them, and a clock that a test turns.

`World.crash` throws every service object away, as the end of the process would; `World.boot` builds new ones on the
same database and folder. `Phone` is a device as the services see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from coordinator_fakes import BreakableStore, Clock, FakeAuthority, FolderBlobs
from people_cases import ADMIN
from tiny_numerics import Array, TinyNumerics, read_tensors

from glora_server.coordinator.catalogue import Catalogue
from glora_server.coordinator.commands import Commands
from glora_server.coordinator.device_service import DeviceService
from glora_server.coordinator.engine import Engine
from glora_server.coordinator.enrolment import EnrolmentService
from glora_server.coordinator.exports import Exporter
from glora_server.coordinator.folding import Folder
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.judging import Judge
from glora_server.coordinator.messages import (
    EnrolmentRecord,
    EnrolRequestRecord,
    UploadHeader,
    UploadStatus,
    WorkAnswer,
    WorkOffer,
)
from glora_server.coordinator.model import Device, Owed, Profile, Run
from glora_server.coordinator.observer import NobodyWatches
from glora_server.coordinator.opening import Opener
from glora_server.coordinator.ports import NumericsEngine, UnitOfWork
from glora_server.coordinator.queries import Queries
from glora_server.coordinator.readouts import Readouts
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.starting import RunStarter
from glora_server.coordinator.sweeping import sweep
from glora_server.coordinator.upload_session import UploadSession
from glora_server.coordinator.uploads import UploadService
from glora_server.coordinator.views import RunView, SystemView
from glora_server.coordinator.views_history import DeviceCounts
from glora_server.coordinator.workspace import Workspace
from glora_server.rounds.assignment import AssignmentKind
from glora_server.rounds.ids import RunId
from glora_server.rounds.round import Round
from glora_server.storage.store import SqlStore
from glora_wire.digests import digest_bytes
from glora_wire.join_token import JoinToken
from glora_wire.manifest import BaseInit, DenseTensor, Manifest, ModuleShape, ZerosInit
from glora_wire.payload import PayloadWriter, TensorDtype, TensorSpec

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds until a wait that should end at once fails its test."""
FINGERPRINT = "ab" * 32
MANIFEST = Manifest(
    task="sequence_classification",
    base_model_name="tiny",
    base_model_fingerprint=FINGERPRINT,
    weight_files={},
    tokenizer_fingerprint="",
    labels=("no", "yes"),
    modules=(ModuleShape("layer.0.query", 4, 6), ModuleShape("layer.0.value", 3, 6)),
    dense=(
        DenseTensor("classifier.weight", (2, 4), ZerosInit()),
        DenseTensor("classifier.bias", (2,), BaseInit()),
    ),
    target_modules=("query", "value"),
)
PROFILE = Profile(
    fingerprint=FINGERPRINT, task="sequence_classification", training_rows=100, evaluation_rows=20, evaluates=False
)
EVALUATOR = replace(PROFILE, trains=False, evaluates=True)


def spec(name: str = "first", **changes: Any) -> RunSpec:
    """A run of two rounds that opens at once when somebody is there; `changes` are keys of its policy or sections."""
    policy: dict[str, Any] = {
        "rounds": 2,
        "quorum": 1,
        "gather_seconds": 0.0,
        "retry_seconds": 0.0,
        "deadline_seconds": 100.0,
    }
    document: dict[str, Any] = {
        "name": name,
        "model": {"path": "tiny", "labels": ["no", "yes"]},
        "lora": {"max_rank": 4},
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            document[key] = document.get(key, {}) | value
        else:
            policy[key] = value
    return RunSpec.from_json(json.dumps(document | {"policy": policy}))


@dataclass(kw_only=True)
class Services:
    """What lives as long as the process does."""

    store: BreakableStore
    hub: Hub
    engine: Engine
    opener: Opener
    readouts: Readouts
    devices: DeviceService
    uploads: UploadService
    enrolment: EnrolmentService
    commands: Commands
    queries: Queries


@dataclass(kw_only=True)
class World:
    """A database, a folder, a clock, numerics; and the services of the process that runs now."""

    folder: Path
    clock: Clock = field(default_factory=Clock)
    numerics: TinyNumerics = field(default_factory=TinyNumerics)
    real_numerics: NumericsEngine | None = None
    """Does the jobs in place of the tiny ones where it is given."""
    places: int = 4
    sql: SqlStore = field(init=False)
    blobs: FolderBlobs = field(init=False)
    workspace: Workspace = field(init=False)
    authority: FakeAuthority = field(init=False)
    now: Services = field(init=False)

    def __post_init__(self) -> None:
        self.sql = SqlStore.open("sqlite://", clock=self.clock)
        self.blobs = FolderBlobs(self.folder / "blobs")
        self.workspace = Workspace(self.folder)
        self.authority = FakeAuthority(self.clock)

    async def boot(self) -> World:
        """Start a process on what is there."""
        self.workspace.prepare()
        store = BreakableStore(self.sql, self.numerics.fuse)
        hub, watcher = Hub(), NobodyWatches()
        engine = Engine(store=store, hub=hub, observer=watcher, clock=self.clock)
        numerics = self.real_numerics or self.numerics
        opener = Opener(store=store, hub=hub, engine=engine)
        catalogue = Catalogue(numerics)
        readouts = Readouts(
            store=store, blobs=self.blobs, numerics=numerics, workspace=self.workspace, clock=self.clock
        )
        Judge(
            store=store,
            blobs=self.blobs,
            numerics=numerics,
            readouts=readouts,
            catalogue=catalogue,
            engine=engine,
            observer=watcher,
        )
        Folder(
            store=store,
            blobs=self.blobs,
            numerics=numerics,
            readouts=readouts,
            catalogue=catalogue,
            engine=engine,
            hub=hub,
            observer=watcher,
        )
        self.now = Services(
            store=store,
            hub=hub,
            engine=engine,
            opener=opener,
            readouts=readouts,
            devices=DeviceService(
                store=store, engine=engine, opener=opener, hub=hub, readouts=readouts, catalogue=catalogue
            ),
            uploads=UploadService(
                store=store,
                blobs=self.blobs,
                engine=engine,
                hub=hub,
                catalogue=catalogue,
                workspace=self.workspace,
                places=asyncio.Semaphore(self.places),
            ),
            enrolment=EnrolmentService(store=store, authority=self.authority, hub=hub, clock=self.clock),
            commands=Commands(
                store=store,
                engine=engine,
                opener=opener,
                hub=hub,
                authority=self.authority,
                starter=RunStarter(store=store, numerics=numerics, clock=self.clock),
                exporter=Exporter(store=store, readouts=readouts),
                clock=self.clock,
            ),
            queries=Queries(store=store, hub=hub, clock=self.clock, catalogue=catalogue, system_view=_no_system_view),
        )
        await sweep(store, self.blobs, self.workspace)
        await engine.start()
        await opener.start()
        return self

    async def blown(self) -> None:
        """Wait until the process ended where the test wanted it to."""
        async with asyncio.timeout(PATIENCE):
            await self.numerics.fuse.blown.wait()

    async def crash(self) -> World:
        """End the process as a power cut would, and start the next one."""
        await self._drop_everything()
        self.numerics.crash_at.clear()
        return await self.boot()

    async def _drop_everything(self) -> None:
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.now.opener.close()
        await self.now.engine.close()

    async def close(self) -> None:
        """The end of the test."""
        await self._drop_everything()
        self.sql.close_now()

    async def read(self, work: Callable[[UnitOfWork], T]) -> T:
        """Look into the database."""
        return await self.sql.read(work)

    async def owed(self) -> tuple[Owed, ...]:
        """The outbox."""
        return await self.read(lambda uow: uow.outbox.pending())

    async def start_run(self, name: str = "first", **changes: Any) -> Run:
        """Create and start a run."""
        return await self.now.commands.create_run(ADMIN, spec(name, **changes), MANIFEST, start=True)

    async def run(self, name: str = "first") -> RunView:
        """The run as operators see it."""
        return await self.now.queries.run(name)

    async def round(self, run: Run) -> Round:
        """The newest round of the run."""
        found = await self.read(lambda uow: uow.rounds.latest(run.id))
        assert found is not None
        return found

    async def until(self, run_id: RunId, check: Callable[[UnitOfWork], bool]) -> None:
        """Wait until the database says so; every change of the run asks again."""
        async with asyncio.timeout(PATIENCE):
            while True:
                seen = self.now.hub.signals.revision(("run", run_id))
                if await self.read(check):
                    return
                await self.now.hub.signals.wait(("run", run_id), seen, 0.05)

    async def quiet(self) -> None:
        """Wait until nothing is owed any more."""
        async with asyncio.timeout(PATIENCE):
            while await self.owed():  # noqa: ASYNC110 - the outbox is a table: it cannot be waited for
                await asyncio.sleep(0)

    async def token(self, **changes: Any) -> JoinToken:
        """A fresh join token of rank 8 that can be used many times."""
        plain: dict[str, Any] = {"uses": 100, "ttl_seconds": 500.0, "max_rank": 8}
        _, text = await self.now.commands.create_token(ADMIN, **(plain | changes))
        return JoinToken.parse(text)

    async def phone(self, name: str, *, rank: int = 4, profile: Profile = PROFILE, **token: Any) -> Phone:
        """An enrolled device."""
        record = await self.enrol(name, await self.token(**token), rank=rank)
        return Phone(world=self, key=record.device.key_sha256, name=name, profile=profile)

    async def enrol(self, name: str, token: JoinToken, *, rank: int = 4, key: str = "") -> EnrolmentRecord:
        """What a device gets that joins with the token; its key is its name unless said otherwise."""
        request = EnrolRequestRecord(
            token_id=token.token_id,
            token_secret=token.secret.hex(),
            certificate_request_pem=f"csr {key or name}",
            name=name,
            max_rank=rank,
            profile=PROFILE,
        )
        return await self.now.enrolment.enrol(request, "10.0.0.1:5")


def _no_system_view(uow: UnitOfWork, devices: DeviceCounts) -> SystemView:
    raise NotImplementedError("main builds it")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An update as the device keeps it on its disk."""

    data: bytes
    header: UploadHeader

    def from_offset(self, offset: int) -> UploadHeader:
        """The header of a stream that goes on at `offset`."""
        return replace(self.header, offset=offset)


@dataclass(kw_only=True)
class Phone:
    """A device that works through the services of whatever process runs now."""

    world: World
    key: str
    name: str
    profile: Profile

    async def me(self) -> Device:
        """Who the server thinks it is; raises when it may not speak."""
        return await self.world.now.devices.identify(self.key)

    async def ask(self, wait: float = 0.0) -> WorkAnswer:
        """Ask for work; `wait` is the longest real time that the question stays open."""
        return await self.world.now.devices.wait_for_work(await self.me(), self.profile, timeout=wait)

    async def offer(self) -> WorkOffer:
        """Wait for work, asking again after every answer that only says why there is none, as devices do."""
        async with asyncio.timeout(PATIENCE):
            while True:
                answer = await self.ask(PATIENCE)
                if answer.offer is not None:
                    return answer.offer

    async def pull(self, offer: WorkOffer, key: str | None = None) -> dict[str, Array]:
        """Download an adapter whole (by default the last one) and say so."""
        key = key or offer.adapters[-1].key
        devices, me = self.world.now.devices, await self.me()
        adapter = await devices.open_adapter(me, offer.assignment.id, key=key, offset=0, digest=None)
        async with adapter:
            data = adapter.path.read_bytes()
            assert digest_bytes(data, adapter.digest.algorithm) == adapter.digest
            tensors = read_tensors(adapter.path)
        await devices.delivered(me, offer.assignment.id, key)
        return tensors

    def train(self, offer: WorkOffer, *, value: float = 1.0, rows: int = 100, **header: Any) -> Trained:
        """An update whose ΔW has `value` in its first entry, of every module; `header` overrides parts of it."""
        rank = offer.assignment.rank
        tensors: dict[str, Array] = {}
        for module in MANIFEST.modules:
            a, b = np.zeros((rank, module.in_features)), np.zeros((module.out_features, rank))
            a[0, 0], b[0, 0] = 1.0, value / offer.spec.lora.scale
            tensors[f"base_model.model.{module.name}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"base_model.model.{module.name}.lora_B.weight"] = b.astype(np.float32)
        for dense in MANIFEST.dense:
            tensors[f"base_model.model.{dense.name}"] = np.full(dense.shape, value, np.float32)
        data = payload(self.world.folder, tensors)
        plain = UploadHeader(
            digest=digest_bytes(data),
            offset=0,
            adapter_config_json=config(rank, offer.spec.lora.scale),
            training_rows=rows,
            completed_steps=3,
            stopped_early=False,
            training_loss=0.5,
            training_seconds=1.0,
        )
        return Trained(data=data, header=replace(plain, **header))

    async def stream(self, offer: WorkOffer, trained: Trained, *, offset: int = 0) -> UploadSession | UploadStatus:
        """Begin an upload at `offset`."""
        return await self.world.now.uploads.open(await self.me(), offer.assignment.id, trained.from_offset(offset))

    async def push(self, offer: WorkOffer, trained: Trained, *, piece: int = 100) -> UploadStatus:
        """Upload what the server does not have yet, and wait for the verdict."""
        known = await self.world.now.uploads.query(await self.me(), offer.assignment.id, trained.header.digest)
        offset = known.committed_bytes if known.state == "partial" else 0
        session = await self.stream(offer, trained, offset=offset)
        if isinstance(session, UploadStatus):
            return session
        try:
            for begin in range(offset, len(trained.data), piece):
                await session.chunk(begin, trained.data[begin : begin + piece])
            return await session.finish(trained.header.digest)
        finally:
            await session.close()

    async def work(self, *, value: float = 1.0, rows: int = 100) -> UploadStatus:
        """One whole assignment, from the question to the verdict."""
        offer = await self.offer()
        assert offer.assignment.kind is AssignmentKind.TRAIN
        await self.world.now.devices.accepted(await self.me(), offer.assignment.id)
        await self.pull(offer)
        return await self.push(offer, self.train(offer, value=value, rows=rows))


async def eventually(check: Callable[[], bool]) -> None:
    """Let everything else run until `check` holds."""
    async with asyncio.timeout(PATIENCE):
        while not check():  # noqa: ASYNC110 - what is waited for is inside of what is tested
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def a_world(folder: Path, **changes: Any) -> AsyncIterator[World]:
    """A world with a process in it, ended with the context."""
    world = World(folder=folder, **changes)
    await world.boot()
    try:
        yield world
    finally:
        await world.close()


def config(rank: int, scale: float) -> str:
    """An adapter_config.json with that rank and scale."""
    return f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {rank * scale}}}'


def payload(folder: Path, tensors: dict[str, Array]) -> bytes:
    """A safetensors file with these tensors."""
    path = folder / "update.safetensors"
    specs = [TensorSpec(name, TensorDtype.FLOAT32, values.shape) for name, values in tensors.items()]
    with PayloadWriter(path, specs) as writer:
        for name, values in tensors.items():
            writer.write(name, values.tobytes())
    data = path.read_bytes()
    path.unlink()
    return data
