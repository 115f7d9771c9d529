"""The state folder, the command line and what the agent says about its device."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glora.v1 import types_pb2
from glora_client.capabilities import advise_rank, free_memory, profile, total_memory
from glora_client.channel import Backoff, Stop, Stopped, is_passing
from glora_client.cli import app
from glora_client.model_path import resolve_model
from glora_client.plan import FactorSet, LocalPlan, Task, plan_from_proto
from glora_client.retry import Persistence
from glora_client.state import Identity, StateFolder, StoredEvaluation, StoredUpdate
from glora_client.view import PlainView
from glora_wire.errors import GloraError, Reason

IDENTITY = Identity(
    device="devices/1",
    name="pi",
    rank=8,
    host="server",
    port=7443,
    enrolment_port=7444,
    issued_at=time.time(),
    expires_at=time.time() + 86400,
)
UPDATE = StoredUpdate(
    assignment="assignments/1",
    run_name="run",
    round_number=3,
    digest="blake3:" + "0" * 64 + ":3",
    adapter_config_json="{}",
    training_rows=12,
    completed_steps=2,
    stopped_early=False,
    training_loss=0.5,
    training_seconds=1.0,
    max_chunk_bytes=4096,
    evaluations=(StoredEvaluation(phase=1, rank=4, loss=0.1, accuracy=0.9, rows=5, seconds=1.0),),
)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_was_saved_is_read_back_and_private(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    assert state.identity() is None
    assert state.update() is None
    state.write("key.pem", "key")
    state.save_identity(IDENTITY, certificate_pem="certificate", authority_pem="authority")
    state.update_path.write_bytes(b"abc")
    state.save_update(UPDATE)
    assert state.identity() == IDENTITY
    assert state.credentials() == (b"key", b"certificate", b"authority")
    assert state.update() == UPDATE
    assert _mode(state.path) == 0o700
    assert {_mode(path) for path in state.path.glob("*.pem")} == {0o600}
    assert {_mode(path) for path in state.path.glob("*.json")} == {0o600}
    state.drop_update()
    assert state.update() is None
    assert not state.update_path.exists()
    state.close()


def test_a_journal_without_its_update_counts_as_none(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    state.save_update(UPDATE)
    assert state.update() is None
    state.update_path.write_bytes(b"abc")
    state.write("journal.json", "{")
    assert state.update() is None
    state.close()


def test_a_second_client_is_kept_out_until_the_first_ends(tmp_path: Path) -> None:
    first = StateFolder(tmp_path / "state")
    with pytest.raises(GloraError, match="Another client") as caught:
        StateFolder(tmp_path / "state")
    assert caught.value.reason is Reason.DATA_DIR_UNUSABLE
    first.close()
    StateFolder(tmp_path / "state").close()


def test_a_folder_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    (tmp_path / "state").chmod(0o755)
    with pytest.raises(GloraError, match="chmod 700"):
        StateFolder(tmp_path / "state")


def test_a_file_in_place_of_the_folder_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(GloraError, match="cannot be used"):
        StateFolder(tmp_path / "state")


def test_a_damaged_identity_says_join_again(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    state.write("identity.json", "{}")
    with pytest.raises(GloraError, match="join again"):
        state.identity()
    with pytest.raises(GloraError, match="join again"):
        state.credentials()
    state.close()


def test_only_the_newest_adapters_and_the_partials_in_hand_stay(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    for number in range(12):
        path = state.path / "adapters" / f"blake3-{number:02}.safetensors"
        path.write_bytes(b"x")
        os.utime(path, (number, number))
    for name in ("assignments_1-main.part", "assignments_2-main.part"):
        (state.path / "partial" / name).write_bytes(b"x")
    state.prune("assignments_2")
    assert sorted(path.stem for path in (state.path / "adapters").iterdir()) == [f"blake3-{n:02}" for n in range(4, 12)]
    assert [path.name for path in (state.path / "partial").iterdir()] == ["assignments_2-main.part"]
    state.close()


def test_backoff_is_full_jitter_within_bounds() -> None:
    backoff = Backoff()
    assert [backoff.seconds(attempt, lambda: 1.0) for attempt in (0, 1, 2, 20, 500)] == [0.2, 0.4, 0.8, 30.0, 30.0]
    assert backoff.seconds(5, lambda: 0.0) == 0.0


@pytest.mark.parametrize(
    ("reason", "passing"),
    [
        (Reason.SERVER_UNREACHABLE, True),
        (Reason.DEVICE_PENDING, True),
        (Reason.DEVICE_SUSPENDED, True),
        (Reason.DEVICE_REVOKED, False),
        (Reason.ASSIGNMENT_CLOSED, False),
        (Reason.CERTIFICATE_UNKNOWN, False),
    ],
)
def test_reasons_decide_what_is_tried_again(reason: Reason, passing: bool) -> None:
    assert is_passing(GloraError(reason, "x")) is passing


def test_a_transfer_that_stays_broken_is_given_up() -> None:
    persistence = Persistence(Stop(), PlainView(), Backoff(base=0.0))
    calls = 0

    def broken() -> None:
        nonlocal calls
        calls += 1
        raise GloraError(Reason.DIGEST_MISMATCH, "x")

    with pytest.raises(GloraError):
        persistence.call(broken)
    assert calls == 6


def test_stopping_ends_waiting() -> None:
    stop = Stop()
    stop.set()
    with pytest.raises(Stopped):
        stop.wait(60.0)


def test_the_profile_tells_roles_from_data() -> None:
    made = profile(rank=8, training_rows=3, evaluation_rows=0, run_name="run")
    assert list(made.roles) == [types_pb2.ROLE_TRAIN]
    assert made.cpu_count >= 1
    assert made.memory_bytes == total_memory() > 0
    assert list(profile(rank=8, evaluation_rows=1).roles) == [types_pb2.ROLE_EVALUATE]


def test_advised_rank_follows_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 100}')
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert free_memory() > 0
    ranks = []
    for room in (0, 3000, 3400, 10_000, 10**12):
        monkeypatch.setattr("glora_client.capabilities.free_memory", lambda room=room: 600 * 1024**2 + room)
        ranks.append(advise_rank(tmp_path))
    assert ranks == [1, 1, 8, 64, 64]


def test_plans_that_nobody_can_follow_are_refused() -> None:
    good = types_pb2.TrainingPlan(
        task="causal_lm",
        rank=4,
        scale=1.0,
        steps=1,
        batch_size=1,
        max_length=8,
        wire_dtype=types_pb2.TENSOR_DTYPE_FLOAT32,
        train_mask=types_pb2.TRAIN_MASK_B,
    )
    assert plan_from_proto(good).train_mask is FactorSet.B
    for name, value in (
        ("task", "poetry"),
        ("optimizer", "magic"),
        ("schedule", "cosine"),
        ("train_mask", types_pb2.TRAIN_MASK_CORE),
        ("batch_size", 0),
        ("steps", 0),
    ):
        bad = types_pb2.TrainingPlan()
        bad.CopyFrom(good)
        setattr(bad, name, value)
        with pytest.raises(GloraError) as caught:
            plan_from_proto(bad)
        assert caught.value.reason is Reason.CONFIG_INVALID
    plan = LocalPlan(task=Task.CAUSAL_LM, rank=4, scale=1.0, extra={"a": "b"})
    assert LocalPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_model_folder_that_is_not_there_is_a_sentence(model: str) -> None:
    with pytest.raises(GloraError, match="does not exist") as caught:
        resolve_model(model)
    assert caught.value.reason is Reason.BASE_MODEL_MISSING


def test_a_hub_name_without_a_hub_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "from glora_client.model_path import resolve_model\n"
        "from glora_wire.errors import GloraError\n"
        "try:\n    resolve_model('nobody/nothing')\n"
        "except GloraError as error:\n    print(error.reason, error.message)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True, timeout=60
    )
    assert done.stdout.startswith("BASE_MODEL_MISSING There is no folder 'nobody/nothing'")
    assert "HF_HUB_OFFLINE" in done.stdout


def _cli(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_status_shows_who_and_what_waits(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    state.save_identity(IDENTITY, certificate_pem="c", authority_pem="a")
    state.update_path.write_bytes(b"abc")
    state.save_update(UPDATE)
    code, out, _ = _cli("status", "--state-dir", str(state.path), "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["name"], document["update_waiting"]) == ("pi", {"run": "run", "round": 3})
    assert "round 3 of run waits" in _cli("status", "--state-dir", str(state.path))[1]
    old = replace(IDENTITY, expires_at=time.time() - 1)
    state.save_identity(old, certificate_pem="c", authority_pem="a")
    assert "expired; join again" in _cli("status", "--state-dir", str(state.path))[1]
    state.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status"], "join` first"),
        (["run", "--model", "x", "--data", "y.jsonl"], "join` first"),
        (["run", "--model", "x"], "nothing to work with"),
        (["run", "--model", "x", "--data", "y", "--quantization", "int1"], "--quantization"),
        (["join", "--server", "s", "--token", "nonsense", "--name", "pi"], "join token"),
        (["join", "--server", "s", "--token", "t", "--name", "pi", "--rank", "auto"], "--model"),
        (["join", "--server", "s", "--token", "t", "--name", "pi", "--rank", "zero"], "auto"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    code, _, err = _cli(*arguments, "--state-dir", str(tmp_path / "none"))
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_the_agent_imports_nothing_heavy() -> None:
    """DESIGN §7: torch and its family live in the training process, and key handling only where it is needed."""
    code = (
        "import sys, glora_client.cli, glora_client.agent, glora_client.session\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pyarrow', 'safetensors', 'OpenSSL', 'fastapi',"
        " 'sqlalchemy', 'glora_server', 'rich.progress'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
