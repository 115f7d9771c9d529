"""What people do wrong on the command line and in their files: a sentence, an exit code, and nothing else harmed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_data import labels, manifest_of, minilm, run_toml, some_rows, tiny_bert, write_json_lines
from federation import Federation, completed
from glora_processes import Ended, until

from glora_dashboard.models import AuditAnswer, DeviceAnswer
from glora_wire.join_token import JoinToken

pytestmark = pytest.mark.e2e

REFUSED = 3


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("bad-start") / "federation") as federation:
        federation.start_server()
        yield federation


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return some_rows(tmp_path / "rows.jsonl", 20)


def says(ended: Ended, code: int, *parts: str) -> None:
    """The command failed with the code and one sentence with all of the parts; no traceback."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.err
    for part in parts:
        assert part in ended.err, ended.err


# joining


def test_a_mistyped_token_is_found_before_anything_is_sent(federation: Federation) -> None:
    says(federation.join_by_command("typo", 4, federation.token()[:-1] + "!"), 2, "TOKEN_MALFORMED", "typo")


def test_a_token_that_the_server_does_not_know(federation: Federation) -> None:
    pin = JoinToken.parse(federation.token()).ca_sha256
    says(federation.join_by_command("stranger", 4, JoinToken.new(pin).format()), REFUSED, "TOKEN_UNKNOWN")


def test_a_used_up_token(federation: Federation) -> None:
    token = federation.token(uses=1)
    federation.join("first", 4, token)
    says(federation.join_by_command("second", 4, token), REFUSED, "TOKEN_USED_UP")
    # The same device again is no second turn.
    assert federation.join_by_command("first", 4, token).code == 0


def test_an_expired_token(federation: Federation) -> None:
    token = federation.token(ttl_seconds=1.0, uses=100)  # a quick machine joins before the second is over
    said: list[Ended] = []

    def refused() -> bool:
        said.append(federation.join_by_command(f"late-{len(said)}", 4, token))
        return said[-1].code != 0

    until(refused, "the token expires", 300.0)
    says(said[-1], REFUSED, "TOKEN_EXPIRED")


def test_a_rank_above_the_granted_one(federation: Federation) -> None:
    says(federation.join_by_command("greedy", 64, federation.token(max_rank=8)), REFUSED, "RANK_NOT_ALLOWED", "8")
    with federation.api() as api:
        assert "greedy" not in {device.name for device in api.every(DeviceAnswer, "/devices")}


def test_a_server_with_another_authority(federation: Federation, tmp_path: Path, rows: Path) -> None:
    """On the same ports: no join and no work, whatever the address says; and the device outlives the mistake."""
    token = federation.token()
    federation.join("loyal", 4)
    device = federation.start_device("loyal", minilm(), "--data", str(rows))
    federation.until_online("loyal")
    federation.processes[0].kill()
    with Federation(tmp_path / "impostor", ports=federation.ports) as impostor:
        impostor.start_server()
        says(federation.join_by_command("careful", 4, token), REFUSED, "CA_PIN_MISMATCH")
        until(lambda: "Trying again" in device.text, "the device says that it cannot connect", 300.0)
        impostor_knows = impostor.rows("SELECT name FROM devices")
    assert impostor_knows == []
    federation.start_server()
    federation.until_online("loyal", within=300.0)
    assert device.alive
    device.kill()


# revocation


def test_a_revoked_device_is_refused_at_once_and_ends(federation: Federation, rows: Path) -> None:
    federation.join("leaver", 4)
    device = federation.start_device("leaver", minilm(), "--data", str(rows))
    federation.until_online("leaver")
    done = federation.admin("device", "revoke", "leaver", "--yes")
    assert done.code == 0, done.err
    assert device.ended(within=300.0) == REFUSED
    assert "leaver was revoked by an operator" in device.text
    assert "DEVICE_REVOKED" in device.text
    again = federation.start_device("leaver", minilm(), "--data", str(rows))
    assert again.ended() == REFUSED
    with federation.api() as api:
        audit = [entry for entry in api.every(AuditAnswer, "/audit") if entry.action == "device.revoke"]
    changes = [(entry.target, entry.before, entry.after) for entry in audit]
    assert changes == [("leaver", {"state": "approved"}, {"state": "revoked"})]
    refused = federation.events("rpc_refused")
    assert any(event["reason"] == "DEVICE_REVOKED" for event in refused)


# devices and their data


def test_devices_that_cannot_work_are_told_and_the_others_go_on(federation: Federation, tmp_path: Path) -> None:
    """A base model that is not the run's, a label that the run does not know; one class alone is normal."""
    other = tiny_bert(tmp_path / "tiny")
    unknown = write_json_lines(tmp_path / "unknown.jsonl", [{"text": "How so ?", "label_name": "WHY"}] * 20)
    single = some_rows(tmp_path / "single.jsonl", 30, label=labels()[1])
    token = federation.token(uses=3, tags=["here"])  # a device that an earlier test killed may still seem to be there
    for name in ("elsewhere", "confused", "single"):
        federation.join(name, 4, token)
    elsewhere = federation.start_device("elsewhere", other, "--data", str(single))
    confused = federation.start_device("confused", minilm(), "--data", str(unknown))
    federation.start_device("single", minilm(), "--data", str(single))
    federation.until_online("elsewhere", "confused", "single")
    toml = run_toml(
        "strict",
        minilm(),
        training="steps = 2\nbatch_size = 8\nmax_length = 48",
        policy='rounds = 1\nquorum = 1\ndeadline_seconds = 1200.0\ngather_seconds = 0.0\ntags = ["here"]',
        evaluation="ranks = [4]\nbefore = false\nafter = false",
    )
    federation.create_run(toml, manifest_of(toml))
    federation.wait_run("strict", completed, "its end", 600.0)
    (only,) = federation.rounds("strict")
    found = {item.device: item for item in only.assignments}
    assert set(found) == {"confused", "single"}, "a device with another model gets no work"
    assert found["single"].phase == "accepted_update"
    assert found["confused"].reason == "UNKNOWN_LABEL"
    assert "WHY" in found["confused"].message
    assert "WHY" in confused.text
    assert found["confused"].message in {event["message"] for event in federation.events("assignment_phase")}
    elsewhere_says = "No work from strict"
    until(lambda: elsewhere_says in elsewhere.text, "the device says why it gets no work", 600.0)
    assert "base model" in elsewhere.text
    for process in (elsewhere, confused):
        assert process.alive, "it may be of use to another run"
        process.kill()


def test_an_empty_data_file(federation: Federation, tmp_path: Path) -> None:
    federation.join("empty", 4)
    (tmp_path / "empty.jsonl").touch()
    state = ("--state-dir", str(federation.state_dir("empty")))
    ended = federation.run("client", "run", "--model", str(minilm()), "--data", str(tmp_path / "empty.jsonl"), *state)
    says(ended, 2, "DATA_EMPTY", "empty.jsonl")


def test_a_device_without_data(federation: Federation) -> None:
    federation.join("idle", 4)
    ended = federation.run("client", "run", "--model", str(minilm()), "--state-dir", str(federation.state_dir("idle")))
    says(ended, 2, "NO_TRAINING_DATA", "--data")


# operators


def test_an_unknown_run(federation: Federation) -> None:
    for words in (["run", "show", "nosuch"], ["run", "abort", "nosuch", "--yes"], ["run", "watch", "nosuch"]):
        says(federation.admin(*words), REFUSED, "There is no run 'nosuch'")


def test_a_malformed_description_names_key_and_line(federation: Federation, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "x"\n[model]\npath = "m"\nlabels = ["a", "b"]\n[training]\nbatch_size = 0\nstepz = 3\n')
    ended = federation.admin("run", "create", "--spec", str(path))
    says(ended, 2, f"{path}", "line 6", "training.batch_size", "line 7", "training.stepz")
    path.write_text('name = "x\n')
    says(federation.admin("run", "create", "--spec", str(path)), 2, str(path), "line 1")


@pytest.mark.parametrize("port", ["grpc", "enrolment", "http"])
def test_a_port_in_use(federation: Federation, tmp_path: Path, port: str) -> None:
    taken = str(getattr(federation.ports, port))
    free = [word for name in {"grpc", "enrolment", "http"} - {port} for word in (f"--{name}-port", "0")]
    ended = federation.run("server", "--data-dir", str(tmp_path / "data"), f"--{port}-port", taken, *free)
    assert ended.code not in {0, 70}, ended
    assert taken in ended.err
    assert "Traceback" not in ended.err
    assert "in use" in ended.err, ended.err
    federation.system()


def test_a_data_folder_that_cannot_be_used(federation: Federation, tmp_path: Path) -> None:
    ports = ("--grpc-port", "0", "--enrolment-port", "0", "--http-port", "0")
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    says(federation.run("server", "--data-dir", str(in_the_way), *ports), 2, str(in_the_way), "not a folder")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    try:
        ended = federation.run("server", "--data-dir", str(locked), *ports, bound=True)
    finally:
        locked.chmod(0o700)
        shutil.rmtree(locked)
    says(ended, 2, str(locked), "cannot be written to")
