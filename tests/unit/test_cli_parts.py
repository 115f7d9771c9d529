"""The pieces of the command line: manifests, archives, watching, values, exit codes."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import httpx2
import pytest
import typer
from fake_server import manifest, spec

from glora_cli.export_command import unpack
from glora_cli.failures import exit_code_of
from glora_cli.manifest import build_manifest, read_manifest
from glora_cli.output import size, span
from glora_cli.rest import Api
from glora_cli.run_commands import with_labels
from glora_cli.run_view import standing
from glora_cli.values import assignments, seconds
from glora_cli.watch import watch_run
from glora_dashboard.run_models import RoundAnswer, RunAnswer
from glora_server.coordinator.run_spec import RunSpec
from glora_wire.errors import GloraError, Reason


def test_a_manifest_with_a_mistake_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{}")
    with pytest.raises(GloraError, match=r"m\.json: ") as caught:
        read_manifest(tmp_path / "m.json")
    assert caught.value.reason is Reason.MANIFEST_INVALID


def test_without_torch_the_manifest_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(GloraError, match=r"pip install 'glora\[client\]'.*--manifest FILE"):
        build_manifest(spec())


@pytest.mark.parametrize(
    ("script", "reason", "sentence"),
    [
        (
            'print("x\\n" + \'{"reason": "SPEC_INVALID", "message": "No such layer."}\'); exit(2)',
            "SPEC_INVALID",
            "No such",
        ),
        ('import sys; sys.exit("boom")', "BASE_MODEL_MISSING", "could not be read: boom"),
        ("exit(3)", "BASE_MODEL_MISSING", "no reason was given"),
    ],
)
def test_what_the_builder_says_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, script: str, reason: str, sentence: str
) -> None:
    monkeypatch.setattr("glora_cli.manifest._command", lambda *_: [sys.executable, "-c", script])
    with pytest.raises(GloraError, match=sentence) as caught:
        build_manifest(spec())
    assert caught.value.reason.value == reason


def test_what_the_builder_makes_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = manifest().to_json()
    monkeypatch.setattr(
        "glora_cli.manifest._command",
        lambda _, target: [sys.executable, "-c", f"open({str(target)!r}, 'w').write({text!r})"],
    )
    assert build_manifest(spec()) == manifest()


def test_labels_in_a_file_that_is_missing_are_told(tmp_path: Path) -> None:
    described = RunSpec.from_json('{"name": "x", "model": {"path": "p", "label_file": "labels.txt"}}')
    with pytest.raises(GloraError, match=r"model\.label_file: .*labels\.txt cannot be read"):
        with_labels(described, tmp_path)
    (tmp_path / "labels.txt").write_text("only\n")
    with pytest.raises(GloraError, match=r"labels\.txt, model\.labels: must name at least 2"):
        with_labels(described, tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/b", "..", "x/"])
def test_an_archive_never_writes_beside_its_folder(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(GloraError, match="holds more than the files of an adapter"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_damaged_archive_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("adapter_model.safetensors", b"y" * 100)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[60] ^= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(GloraError, match="is damaged"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    (tmp_path / "b.zip").write_bytes(content[:50])
    with pytest.raises(GloraError, match="is damaged"):
        unpack(tmp_path / "b.zip", tmp_path / "out2")


def test_watching_waits_for_a_server_that_went_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(["active", None, None, "completed"])
    pauses: list[float] = []
    monkeypatch.setattr("glora_cli.watch.time.sleep", pauses.append)

    def answer(request: httpx2.Request) -> httpx2.Response:
        phase = next(answers)
        if phase is None:
            raise httpx2.ConnectError("refused", request=request)
        return httpx2.Response(200, text=run_answer(phase).model_dump_json())

    with Api("http://h", "t", transport=httpx2.MockTransport(answer)) as api:
        assert watch_run(api, "demo") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["demo: active", "demo: completed"]
    assert printed.err.count("Trying again") == 1
    assert pauses[:2] == [0.5, 1.0]


def run_answer(phase: str) -> RunAnswer:
    return RunAnswer(
        id="r",
        name="demo",
        phase=phase,
        reason=None,
        message="",
        waiting="",
        rounds=1,
        rounds_done=0,
        version_number=0,
        created_at=0,
        started_at=0,
        ended_at=None,
        eligible_devices=0,
        online_devices=0,
        strategy="glora",
        max_rank=8,
        base_model="tiny",
        spec=spec(),
        round=None,
        evaluations=[],
        scores=[],
        row_version=0,
        revision=0,
    )


def test_a_line_of_the_list_says_everything_once() -> None:
    round_ = RoundAnswer(
        id="x",
        number=2,
        attempt=3,
        phase="aggregating",
        created_at=0,
        opened_at=0,
        deadline_at=60,
        closed_at=None,
        target=4,
        quorum=3,
        accepted=4,
        reason=None,
        message="",
        seconds=1,
        devices=4,
        assignments=[],
    )
    run = run_answer("active").model_copy(update={"rounds": 5, "round": round_})
    assert standing(run) == "round 2 of 5, attempt 3: aggregating, 4 of 4 updates"
    waits = run.model_copy(update={"waiting": "3 of 4 updates are in (at least 3 needed); deadline in 2 min."})
    assert standing(waits) == "round 2 of 5, attempt 3: 3 of 4 updates are in (at least 3 needed); deadline in 2 min."
    ended = run.model_copy(update={"phase": "failed", "message": "Too few devices."})
    assert standing(ended) == "Too few devices."


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.SPEC_INVALID, 2),
        (Reason.SETTINGS_INVALID, 2),
        (Reason.DATA_DIR_UNUSABLE, 2),
        (Reason.RUN_UNKNOWN, 3),
        (Reason.ADMIN_TOKEN_INVALID, 3),
        (Reason.PORT_IN_USE, 3),
        (Reason.SERVER_UNREACHABLE, 4),
        (Reason.DATABASE_UNUSABLE, 4),
        (Reason.INTERNAL, 1),
    ],
)
def test_exit_codes_say_whose_turn_it_is(reason: Reason, code: int) -> None:
    assert exit_code_of(GloraError(reason, "x")) == code


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("1.5m", 90), ("24h", 86400), ("7 D", 604800)])
def test_lengths_of_time(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "x", "-1h", "1w", "0", "1h30"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        seconds(text)


def test_values_are_read_as_in_toml() -> None:
    given = ["a=1", "b=1.5", "c=true", 'd="x"', "e=wait", 'f=["u", "v"]', "g=x=y", "h="]
    assert assignments(given) == {
        "a": 1,
        "b": 1.5,
        "c": True,
        "d": "x",
        "e": "wait",
        "f": ["u", "v"],
        "g": "x=y",
        "h": "",
    }


def test_sizes_and_times_are_for_people() -> None:
    assert [size(0), size(1023), size(1536), size(5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [span(None), span(-5), span(59), span(61), span(3700), span(90000)] == [
        "-",
        "0s",
        "59s",
        "1m 01s",
        "1h 01m",
        "1d 1h",
    ]
