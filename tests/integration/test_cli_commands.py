"""Every administrative command against the REST surface on a real socket."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, NamedTuple

import pytest
from command_line import Outcome, glora
from fake_server import ADMIN_TOKEN, FakeServer, manifest
from http_server import Running, serving

from glora_server.coordinator.model import DeviceState
from glora_server.rounds.run import RunPhase

SPEC = 'name = "second"\n[model]\npath = "tiny"\nlabels = ["negative", "positive"]\ntarget_modules = ["query"]\n'
Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(FakeServer(), tmp_path_factory.mktemp("exports")) as running:
        yield running


@pytest.fixture
def fake(running: Running) -> FakeServer:
    running.fake.refill()
    return running.fake


@pytest.fixture
def command(
    running: Running, fake: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.setenv("GLORA_URL", running.url)
    monkeypatch.setenv("GLORA_ADMIN_TOKEN", ADMIN_TOKEN)

    def run(*words: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        return glora(capsys, *words)

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(SPEC)
    (tmp_path / "manifest.json").write_text(manifest().to_json())
    return tmp_path


def test_devices_are_listed(command: Command) -> None:
    outcome = command("device", "list")
    assert outcome.code == 0
    heading, *rows = outcome.out.splitlines()
    assert heading.split() == ["NAME", "STATE", "RANK", "THERE", "ROWS", "DOING", "TAGS"]
    assert [row.split()[:3] for row in rows] == [
        ["pi-1", "approved", "8"],
        ["pi-2", "approved", "8"],
        ["pi-3", "pending", "8"],
    ]


def test_a_long_list_comes_whole(command: Command, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glora_cli.rest.PAGE_SIZE", 2)
    assert [device["name"] for device in json.loads(command("device", "list", "--json").out)] == [
        "pi-1",
        "pi-2",
        "pi-3",
    ]


def test_an_empty_list_says_what_to_do(command: Command, fake: FakeServer) -> None:
    fake.device_records.clear()
    assert "glora device token create" in command("device", "list").out
    assert command("device", "list", "--json").out == "[]\n"
    fake.run_records.clear()
    assert "glora run create" in command("run", "list").out
    assert "glora device token create" in command("device", "token", "list").out


def test_a_device_is_shown(command: Command) -> None:
    shown = command("device", "show", "pi-1").out
    assert "demo: uploading 61.0 %" in shown
    assert "8 granted, 16 declared" in shown
    assert json.loads(command("device", "show", "pi-1", "--json").out)["profile"]["cpu_count"] == 4


def test_devices_are_steered(command: Command, fake: FakeServer) -> None:
    assert command("device", "approve", "pi-3").out == "pi-3: approved, rank 8\n"
    assert command("device", "suspend", "pi-3").out == "pi-3: suspended, rank 8\n"
    assert command("device", "set-rank", "pi-3", "4").out == "pi-3: suspended, rank 4\n"
    assert command("device", "revoke", "pi-3", stdin="n\n").code == 2
    assert "suspended" in command("device", "show", "pi-3").out
    assert json.loads(command("device", "revoke", "pi-3", "--yes", "--json").out)["state"] == "revoked"
    assert fake.device_records["pi-3"].state is DeviceState.REVOKED


def test_a_token_is_printed_alone_so_that_a_script_can_take_it(command: Command, fake: FakeServer) -> None:
    words = ("--uses", "3", "--max-rank", "8", "--expires", "2h", "--tag", "lab", "--tag", "b", "--hold")
    outcome = command("device", "token", "create", *words)
    (token,) = fake.token_records.values()
    assert outcome.out == f"glora-join-{token.id}\n"
    assert "glora client join --server HOST --token TOKEN" in outcome.err
    assert (token.max_uses, token.max_rank, token.tags, token.approve) == (3, 8, ("lab", "b"), False)
    assert token.expires_at - token.created_at == 7200
    assert token.id in command("device", "token", "list").out
    assert command("device", "token", "revoke", token.id).out == f"{token.id}: revoked\n"
    assert json.loads(command("device", "token", "list", "--json").out)[0]["revoked"] is True


def test_a_run_is_created_from_files(command: Command, fake: FakeServer, files: Path) -> None:
    words = ("run", "create", "--spec", str(files / "run.toml"), "--manifest", str(files / "manifest.json"))
    outcome = command(*words)
    assert outcome.out == "second: created, 1 modules, rank up to 16\n"
    assert "glora run start second" in outcome.err
    assert command("run", "start", "second").out.startswith("second: active, round 2 of 10: 1 of 2 updates")
    again = command(*words)
    assert (again.code, again.err) == (3, "There is a run second already; choose another name.\n")


def test_a_run_can_be_started_as_it_is_created(command: Command, fake: FakeServer, files: Path) -> None:
    words = ("--spec", str(files / "run.toml"), "--manifest", str(files / "manifest.json"), "--start", "--json")
    assert json.loads(command("run", "create", *words).out)["phase"] == "active"
    assert fake.run_records["second"][0].phase is RunPhase.ACTIVE


def test_labels_can_stand_in_a_file_beside_the_description(command: Command, fake: FakeServer, files: Path) -> None:
    (files / "run.toml").write_text('name = "second"\n[model]\npath = "tiny"\nlabel_file = "labels.txt"\n')
    (files / "labels.txt").write_text("negative\npositive\n\n")
    words = ("run", "create", "--spec", str(files / "run.toml"), "--manifest", str(files / "manifest.json"))
    assert command(*words).code == 0
    assert fake.run_records["second"][1].model.labels == ("negative", "positive")


def test_runs_are_listed_and_shown(command: Command) -> None:
    assert "round 2 of 10: 1 of 2 updates are in; pi-1 is uploading." in command("run", "list").out
    assert json.loads(command("run", "list", "--json").out)[0]["name"] == "demo"
    shown = command("run", "show", "demo").out
    for words in ("1 of 2 updates are in", "pi-1", "uploading", "610 B", "version 1", "75.0 %", "rank 8"):
        assert words in shown
    assert json.loads(command("run", "show", "demo", "--json").out)["scores"][0]["rank"] == 8


def test_runs_are_steered(command: Command, fake: FakeServer) -> None:
    assert command("run", "pause", "demo").out.startswith("demo: paused")
    assert command("run", "resume", "demo").out.startswith("demo: active")
    assert command("run", "edit", "demo", "quorum=2", "too_few=wait", 'tags=["lab"]', "deadline_seconds=60").code == 0
    policy = fake.run_records["demo"][1].policy
    assert (policy.quorum, policy.too_few.value, policy.tags, policy.deadline_seconds) == (2, "wait", ("lab",), 60.0)
    before = fake.round_deadline
    assert command("run", "extend", "demo", "15m").out.startswith("demo, round 2: deadline ")
    assert fake.round_deadline == before + 900
    refused = command("run", "abort", "demo", "--reason", "wrong labels")
    assert refused.code == 2
    assert refused.err.endswith("Nothing was done; --yes does it without asking.\n")
    assert fake.run_records["demo"][0].phase is RunPhase.ACTIVE
    assert command("run", "abort", "demo", "--reason", "wrong labels", "-y").out == "demo: aborted, wrong labels\n"


def test_an_export_is_a_folder(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "adapter"
    outcome = command("export", "demo", "--rank", "8", "--out", str(out))
    assert outcome.out == f"{out}: version 1 at rank 8, 1 modules\n"
    assert "PeftModel.from_pretrained" in outcome.err
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["adapter"]


def test_an_export_never_overwrites(command: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert command("export", "demo", "--rank", "8", "--out", str(tmp_path / "out"), "--json").code == 0
    again = command("export", "demo", "--rank", "8", "--out", str(tmp_path / "out"))
    assert (again.code, again.err) == (2, f"{tmp_path}/out exists already; name a new or an empty folder with --out.\n")


def test_an_interrupted_export_leaves_no_half_folder(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapter"
    there: list[list[str]] = []

    def interrupted(_source: object, target: IO[bytes], _length: int) -> None:
        target.write(b"half")
        there.append([path.name for path in tmp_path.iterdir()])
        raise KeyboardInterrupt

    monkeypatch.setattr("glora_cli.export_command.shutil", SimpleNamespace(copyfileobj=interrupted))
    assert command("export", "demo", "--rank", "8", "--out", str(out)).code == 130
    ((beside,),) = there
    assert beside.startswith(".glora-export-"), "what a kill at this point would leave"
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_where_nothing_can_be_written_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    wrong = command("export", "demo", "--rank", "8", "--out", str(tmp_path / "file" / "adapter"))
    assert wrong.code == 2
    assert "cannot be written" in wrong.err
    assert wrong.err.endswith("Name another folder with --out.\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert command("export", "demo", "--rank", "8", "--out", ".").code == 2, (
        "a shell would stand in a folder that is gone"
    )


def test_watching_ends_well_when_the_run_completes(command: Command, fake: FakeServer) -> None:
    fake.completes_when_waited_for = True
    outcome = command("run", "watch", "demo")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "demo: active"
    assert lines[-1] == "demo: completed"
    assert "  pi-1 (rank 8): uploading, uploading 61/100" in lines
    assert "version 1, rank 8: accuracy 75.0 %" in lines
    assert len(lines) == len(set(lines)), "a line was repeated although nothing changed"


def test_on_a_terminal_watching_leaves_the_last_page(
    command: Command, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glora_cli.watch.on_terminal", lambda: True)
    fake.completes_when_waited_for = True
    outcome = command("run", "watch", "demo")
    assert outcome.code == 0
    assert "demo  completed" in outcome.out
    assert "1 of 2 updates are in" in outcome.out


def test_watching_a_run_that_was_aborted_fails(command: Command) -> None:
    command("run", "abort", "demo", "--yes")
    outcome = command("run", "watch", "demo", "--json")
    assert outcome.code == 1
    assert [json.loads(line)["phase"] for line in outcome.out.splitlines()] == ["aborted"]


class Refused(NamedTuple):
    words: tuple[str, ...]
    code: int
    sentence: str


REFUSED = [
    Refused(("device", "show", "nope"), 3, "There is no device nope."),
    Refused(("device", "approve", "nope"), 3, "There is no device nope."),
    Refused(("device", "suspend", "nope"), 3, "There is no device nope."),
    Refused(("device", "revoke", "nope", "--yes"), 3, "There is no device nope."),
    Refused(("device", "set-rank", "pi-1", "64"), 3, "pi-1 said that it can train ranks up to 16, not 64."),
    Refused(("device", "token", "revoke", "nope"), 3, "There is no token nope."),
    Refused(("run", "show", "nope"), 3, "There is no run nope; there is demo."),
    Refused(("run", "watch", "nope"), 3, "There is no run nope; there is demo."),
    Refused(("run", "start", "demo"), 3, "The run is active, so it cannot start;"),
    Refused(("run", "resume", "demo"), 3, "The run is active, so it cannot resume;"),
    Refused(("run", "pause", "nope"), 3, "There is no run nope; there is demo."),
    Refused(("run", "abort", "nope", "--yes"), 3, "There is no run nope; there is demo."),
    Refused(("run", "extend", "nope", "1m"), 3, "There is no run nope; there is demo."),
    Refused(("run", "edit", "demo", "quorom=3"), 2, 'quorom cannot be changed (did you mean "quorum"?)'),
    Refused(("run", "edit", "demo", "quorum=0"), 2, "edit, policy.quorum: must be at least 1 (you wrote 0)."),
    Refused(("export", "nope", "--rank", "8", "--out", "x"), 3, "There is no run nope; there is demo."),
    Refused(
        ("export", "demo", "--rank", "8", "--version", "9", "--out", "x"), 3, "demo has no version 9; it has 0, 1."
    ),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: " ".join(refused.words))
def test_what_the_server_refuses_is_told_in_a_sentence(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command(*refused.words)
    assert (outcome.code, outcome.out) == (refused.code, "")
    assert outcome.err.startswith(refused.sentence)
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_wrong_token_is_told(command: Command) -> None:
    outcome = command("run", "list", "--admin-token", "wrong")
    assert outcome.code == 3
    assert "The token is wrong, has ended or was revoked" in outcome.err


@pytest.mark.parametrize("name", ["..", ".", "../devices", "a/b", "demo?wait=1", "de mo", "#", "%2e"])
def test_a_strange_name_stays_a_name(command: Command, name: str) -> None:
    outcome = command("run", "show", name)
    assert outcome.code == (2 if "/" in name else 3)
    assert f"There is no run {name}; " in outcome.err or "There is nothing at" in outcome.err
