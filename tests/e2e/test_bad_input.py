"""Bad input to a server of its own: what it says, what it notes, and that nobody else is harmed.

One run with one real device, one honest device written by hand, and a dozen that send what no device should. The
verdicts are read where people would look: the answer, the log, the database through the API.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from e2e_data import manifest_of, minilm, run_toml, some_rows
from federation import Federation, completed
from hand_device import HandDevice, State, Tensors, packed, trained, with_header

from glora.v1 import types_pb2
from glora_dashboard.models import AssignmentAnswer
from glora_dashboard.run_models import RoundAnswer
from glora_wire.digests import digest_bytes
from glora_wire.errors import GloraError, Reason
from glora_wire.rpc_errors import error_from_rpc

pytestmark = pytest.mark.e2e

RANK = 4
Forge = Callable[[Tensors], bytes]


def first_factor(tensors: Tensors, factor: str = "lora_A") -> str:
    return next(name for name in sorted(tensors) if factor in name)


def with_value(value: float) -> Forge:
    def forge(tensors: Tensors) -> bytes:
        tensors[first_factor(tensors)][0, 0] = value
        return packed(tensors)

    return forge


def renamed(tensors: Tensors) -> bytes:
    name = first_factor(tensors)
    tensors[name.replace("query", "kwery")] = tensors.pop(name)
    return packed(tensors)


def reshaped(tensors: Tensors) -> bytes:
    name = first_factor(tensors)
    tensors[name] = tensors[name][:, :-1]
    return packed(tensors)


def halved(tensors: Tensors) -> bytes:
    return packed({name: values.astype(np.float16) for name, values in tensors.items()})


def of_lower_rank(tensors: Tensors) -> bytes:
    return packed(
        {
            name: values[:-1] if "lora_A" in name else values[:, :-1] if "lora_B" in name else values
            for name, values in tensors.items()
        }
    )


def endless_header(tensors: Tensors) -> bytes:
    return (1 << 62).to_bytes(8, "little") + packed(tensors)[8:]


def overlapping(tensors: Tensors) -> bytes:
    def change(header: dict[str, object]) -> None:
        first, second = sorted(name for name in header if "lora_A" in name)[:2]
        header[second] = header[first]

    return with_header(packed(tensors), change)


def beyond_the_end(tensors: Tensors) -> bytes:
    def change(header: dict[str, object]) -> None:
        entry = header[first_factor(tensors)]
        assert isinstance(entry, dict)
        entry["data_offsets"] = [entry["data_offsets"][0], 1 << 40]

    return with_header(packed(tensors), change)


def no_safetensors(tensors: Tensors) -> bytes:
    return b"\x80\x04\x95pickle" * 100


FORGERIES: dict[str, tuple[Forge, frozenset[Reason]]] = {
    "nan": (with_value(float("nan")), frozenset({Reason.NON_FINITE})),
    "infinite": (with_value(float("inf")), frozenset({Reason.NON_FINITE})),
    "names": (renamed, frozenset({Reason.TENSOR_NAMES_WRONG})),
    "shapes": (reshaped, frozenset({Reason.TENSOR_SHAPE_WRONG})),
    "dtype": (halved, frozenset({Reason.TENSOR_DTYPE_WRONG})),
    "rank": (of_lower_rank, frozenset({Reason.RANK_WRONG})),
    "endless-header": (endless_header, frozenset({Reason.PAYLOAD_MALFORMED})),
    "overlap": (overlapping, frozenset({Reason.PAYLOAD_MALFORMED})),
    "beyond": (beyond_the_end, frozenset({Reason.PAYLOAD_MALFORMED})),
    "pickle": (no_safetensors, frozenset({Reason.PAYLOAD_MALFORMED})),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One device's forged update and what the server answered."""

    assignment: str
    reason: str
    message: str
    state: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """The round after everybody did their worst."""

    federation: Federation
    verdicts: dict[str, Sent]
    errors: dict[str, GloraError]
    repeated: int
    round: RoundAnswer

    def assignment(self, device: str) -> AssignmentAnswer:
        return next(item for item in self.round.assignments if item.device == device)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("bad-uploads")
    toml = run_toml(
        "careful",
        minilm(),
        lora="max_rank = 8",
        training="steps = 2\nmax_length = 48\nbatch_size = 8",
        policy="rounds = 1\nquorum = 2\ndeadline_seconds = 1200.0\ngather_seconds = 0.0",
        evaluation="ranks = [8]\nbefore = false\nafter = false",
    )
    with Federation(folder / "federation") as federation:
        federation.start_server()
        manifest = manifest_of(toml)
        names = [*FORGERIES, "clumsy", "scale"]
        token = federation.token(uses=len(names) + 1, max_rank=8)
        for name in names:
            federation.join(name, RANK, token)
        federation.join("real", 8, token)
        federation.start_device("real", minilm(), "--data", str(some_rows(folder / "rows.jsonl", 50)))
        fingerprint = str(manifest["base_model_fingerprint"])
        devices = [HandDevice(federation.state_dir(name), fingerprint) for name in names]
        try:
            yield play(federation, devices, toml, manifest)
        finally:
            for device in devices:
                device.close()


def play(federation: Federation, devices: list[HandDevice], toml: str, manifest: dict[str, object]) -> Story:
    federation.until_online("real")
    questions = {device.name: device.ask() for device in devices}
    federation.until_online(*questions)
    federation.create_run(toml, manifest)
    verdicts: dict[str, Sent] = {}
    errors: dict[str, GloraError] = {}
    repeated = 0
    for device in devices:
        assignment = questions[device.name].result().assignment
        assert assignment.name, f"{device.name} got no work"
        device.accept(assignment)
        payload, config = device.pull(assignment)
        if device.name == "clumsy":
            errors, repeated = be_clumsy(device, assignment, payload, config)
        elif device.name == "scale":
            other = json.dumps(json.loads(config) | {"lora_alpha": 77})
            verdicts["scale"] = sent(device, assignment, packed(trained(payload)), other)
        else:
            forge, _ = FORGERIES[device.name]
            verdicts[device.name] = sent(device, assignment, forge(trained(payload)), config)
    federation.wait_run("careful", completed, "its end", 900.0)
    return Story(
        federation=federation,
        verdicts=verdicts,
        errors=errors,
        repeated=repeated,
        round=federation.rounds("careful")[0],
    )


def sent(device: HandDevice, assignment: types_pb2.Assignment, payload: bytes, config: str) -> Sent:
    answer = device.push(assignment, payload, config)
    return Sent(
        assignment=assignment.name.rpartition("/")[2], reason=answer.reason, message=answer.message, state=answer.state
    )


def be_clumsy(
    device: HandDevice, assignment: types_pb2.Assignment, payload: bytes, config: str
) -> tuple[dict[str, GloraError], int]:
    """Everything that goes wrong before the last byte, then the update as it should be, twice, then another one."""
    update = packed(trained(payload))
    digest = digest_bytes(update)
    too_long = update + bytes(assignment.max_upload_bytes)
    errors = {
        "truncated": device.refusal(assignment, update, config, stop_at=len(update) // 2),
        "longer": device.refusal(assignment, update + b"more", config, digest=digest),
        "too-large": device.refusal(assignment, too_long, config),
        "digest": device.refusal(assignment, update[:-1] + bytes([update[-1] ^ 1]), config, digest=digest),
        "no-rows": device.refusal(assignment, update, config, rows=0),
    }
    assert device.push(assignment, update, config).state == State.UPLOAD_STATE_ACCEPTED
    again = device.push(assignment, update, config).state
    errors["conflict"] = device.refusal(assignment, packed(trained(update)), config)
    return errors, again


@pytest.mark.parametrize("name", [*FORGERIES, "scale"])
def test_a_forged_update_is_rejected_with_one_reason_everywhere(story: Story, name: str) -> None:
    expected = {Reason.SCALE_WRONG} if name == "scale" else FORGERIES[name][1]
    told = story.verdicts[name]
    assert told.state == State.UPLOAD_STATE_REJECTED
    assert told.reason in expected
    assert told.message.endswith("."), told.message
    # the database
    noted = story.assignment(name)
    assert (noted.phase, noted.reason, noted.message) == ("rejected", told.reason, told.message)
    # the log
    logged = [event for event in story.federation.events("update_rejected") if event["assignment"] == told.assignment]
    assert [(event["reason"], event["message"]) for event in logged] == [(told.reason, told.message)]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("truncated", Reason.UPLOAD_TRUNCATED),
        ("longer", Reason.UPLOAD_TOO_LARGE),
        ("too-large", Reason.UPLOAD_TOO_LARGE),
        ("digest", Reason.DIGEST_MISMATCH),
        ("no-rows", Reason.WEIGHT_INVALID),
        ("conflict", Reason.UPLOAD_CONFLICT),
    ],
)
def test_bytes_that_are_no_update_are_refused_in_words(story: Story, what: str, reason: Reason) -> None:
    error = story.errors[what]
    assert error.reason is reason, error.message
    assert error.message.endswith("."), error.message
    logged = [event for event in story.federation.events("rpc_refused") if event["message"] == error.message]
    assert {(event["reason"], event["device"]) for event in logged} == {(reason.value, "clumsy")}


def test_the_same_update_again_gets_the_same_answer(story: Story) -> None:
    assert story.repeated == State.UPLOAD_STATE_ACCEPTED
    assert story.assignment("clumsy").phase == "accepted_update"
    rows = story.federation.rows("SELECT assignment_id FROM uploads")
    assert len(rows) == len(FORGERIES) + 3, "one update an assignment, whatever was tried before"


def test_the_round_went_on_without_the_forgeries(story: Story) -> None:
    assert story.round.phase == "committed"
    assert story.round.accepted == 2
    assert story.assignment("real").phase == "accepted_update"
    assert story.federation.events("rpc_failed") == []
    assert story.federation.show_run("careful").version_number == 1


def test_nobody_else_may_use_an_assignment(story: Story) -> None:
    stranger = HandDevice(story.federation.state_dir("names"), "")
    try:
        theirs = types_pb2.Assignment(name=f"assignments/{story.assignment('clumsy').id}")
        with pytest.raises(grpc.RpcError) as refused:
            stranger.push(theirs, b"x", "{}")
        error = error_from_rpc(refused.value)
    finally:
        stranger.close()
    assert error.reason is Reason.ASSIGNMENT_UNKNOWN


def test_a_connection_without_a_certificate_gets_no_answer(story: Story) -> None:
    port = story.federation.ports.grpc
    authority = (story.federation.state_dir("names") / "authority.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(authority)
    with (
        grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel,
        pytest.raises(grpc.FutureTimeoutError),
    ):
        grpc.channel_ready_future(channel).result(timeout=1.0)
