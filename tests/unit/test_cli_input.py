"""The command line without a server: help, wrong input, what is missing. Always a sentence and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx2
import pytest
import typer
from command_line import Outcome, glora
from fake_server import manifest, spec

from glora_cli import main
from glora_cli.export_command import unpack
from glora_cli.failures import exit_code_of, run_guarded
from glora_cli.manifest import build_manifest, read_manifest
from glora_cli.output import size, span
from glora_cli.rest import Api
from glora_cli.run_commands import with_labels
from glora_cli.values import assignments, seconds
from glora_cli.watch import watch_run
from glora_dashboard.run_models import RunAnswer
from glora_server.coordinator.run_spec import RunSpec
from glora_wire.errors import GloraError, Reason

SUBCOMMANDS = [
    ("server",),
    ("device",),
    ("device", "list"),
    ("device", "show"),
    ("device", "approve"),
    ("device", "suspend"),
    ("device", "revoke"),
    ("device", "set-rank"),
    ("device", "token"),
    ("device", "token", "create"),
    ("device", "token", "list"),
    ("device", "token", "revoke"),
    ("run",),
    ("run", "create"),
    ("run", "start"),
    ("run", "list"),
    ("run", "show"),
    ("run", "watch"),
    ("run", "edit"),
    ("run", "pause"),
    ("run", "resume"),
    ("run", "extend"),
    ("run", "abort"),
    ("export",),
    ("db",),
    ("db", "upgrade"),
    ("db", "current"),
    ("doctor",),
]
LISTS_AND_SHOWS = [words for words in SUBCOMMANDS if words[-1] in {"list", "show", "watch", "current", "doctor"}]


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command finds a server, a token or settings by accident."""
    for name in list(os.environ):
        if name.startswith("GLORA"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", SUBCOMMANDS, ids=" ".join)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    outcome = glora(capsys, *words, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: glora {' '.join(words)} ")
    assert outcome.out.count("\n") > 5


@pytest.mark.parametrize("words", LISTS_AND_SHOWS, ids=" ".join)
def test_every_listing_and_show_has_json(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert "--json" in glora(capsys, *words, "--help").out


def test_the_help_of_glora_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    shown = glora(capsys, "--help").out
    assert all(f"  {subcommand.name} " in shown for subcommand in main.SUBCOMMANDS)
    assert "glora demo" in shown


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert glora(capsys, "--version").out.startswith("glora 0.")


def test_help_needs_nothing_but_the_command_line() -> None:
    code = (
        "import sys; sys.argv = ['glora', '--help']\n"
        "from glora_cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pydantic', 'fastapi', 'sqlalchemy', 'httpx2', 'grpc', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("name", "extra"), [("run", "server"), ("client", "client")])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, extra: str
) -> None:
    def missing(_: str) -> None:
        raise ModuleNotFoundError("No module named 'httpx2.x'", name="httpx2.x")

    monkeypatch.setattr("glora_cli.main.importlib.import_module", missing)
    outcome = glora(capsys, name, "list")
    assert outcome == Outcome(
        code=2,
        out="",
        err=f"`glora {name}` needs the package httpx2, which is not installed here: pip install 'glora[{extra}]'.\n",
    )


USAGE = [
    ("nonsense",),
    ("run", "nonsense"),
    ("run", "show"),
    ("run", "show", "a", "b"),
    ("run", "create"),
    ("run", "extend", "demo"),
    ("run", "edit", "demo"),
    ("device", "set-rank", "pi", "zero"),
    ("device", "set-rank", "pi", "0"),
    ("device", "token", "create", "--uses", "0"),
    ("export", "demo", "--out", "x"),
    ("export", "demo", "--rank", "8", "--out", "x", "--flavour", "gguf"),
    ("doctor", "--nonsense"),
]


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_wrong_usage_says_how_it_is_used(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    outcome = glora(capsys, *words)
    assert outcome.code == 2
    assert "Usage: glora" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run", "extend", "demo", "soon"), "'soon' is not a length of time; write 90s, 15m, 24h or 7d."),
        (("device", "token", "create", "--expires", "0h"), "'0h' is not a length of time"),
        (("run", "edit", "demo", "quorum"), "'quorum' is not of the form KEY=VALUE"),
        (("run", "edit", "demo", "quorum=1", "quorum=2"), "quorum is given twice."),
    ],
)
def test_a_value_that_cannot_be_read_is_told(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    outcome = glora(capsys, *words, "--admin-token", "x")
    assert outcome.code == 2
    assert sentence in " ".join(outcome.err.split())


def test_without_a_server_there_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = glora(capsys, "run", "list", "--admin-token", "x", "--server-url", "http://127.0.0.1:9")
    assert outcome.code == 4
    assert outcome.err.startswith("No glora server answers at http://127.0.0.1:9 (")
    assert "Start one with `glora server`" in outcome.err


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://x", "http://", "http://h:x", ""])
def test_an_address_that_is_none_is_told(capsys: pytest.CaptureFixture[str], url: str) -> None:
    outcome = glora(capsys, "run", "list", "--admin-token", "x", "--server-url", url)
    assert outcome.code == 2
    assert f"{url!r} is not the address of a server" in outcome.err


def test_without_a_token_there_is_a_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcome = glora(capsys, "run", "list", "--data-dir", str(tmp_path / "data"))
    assert outcome.code == 2
    assert "No administration token" in outcome.err
    assert "--admin-token" in outcome.err


def test_the_token_of_the_data_folder_is_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_text("t" * 43)
    (tmp_path / "admin.token").chmod(0o600)
    outcome = glora(capsys, "run", "list", "--data-dir", str(tmp_path), "--server-url", "http://127.0.0.1:9")
    assert outcome.code == 4


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (httpx2.Response(502, text="<html>Bad Gateway"), "answered 502 Bad Gateway, and not as a glora server does"),
        (httpx2.Response(200, text="<html>"), "is not understood here: is it a glora server of another version?"),
        (httpx2.Response(200, json={"items": [{"x": 1}]}), "is not understood here"),
    ],
)
def test_somebody_else_that_answers_is_recognised(answer: httpx2.Response, sentence: str) -> None:
    transport = httpx2.MockTransport(lambda _: answer)
    with Api("http://h", "t", transport=transport) as api, pytest.raises(GloraError, match=sentence):
        api.every(RunAnswer, "/runs")


def test_a_reason_that_only_a_newer_server_knows_is_told_in_its_words() -> None:
    problem = {"reason": "NEW_REASON", "title": "Conflict", "status": 409, "detail": "The moon is full."}
    transport = httpx2.MockTransport(lambda _: httpx2.Response(409, json=problem))
    with (
        Api("http://h", "t", transport=transport) as api,
        pytest.raises(GloraError, match="The moon is full") as caught,
    ):
        api.get(RunAnswer, "/runs/x")
    assert exit_code_of(caught.value) == 3


def test_a_server_that_is_slow_is_told() -> None:
    def slow(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadTimeout("slow", request=request)

    with (
        Api("http://h", "t", transport=httpx2.MockTransport(slow)) as api,
        pytest.raises(GloraError, match="it did not answer in time"),
    ):
        api.get(RunAnswer, "/runs/x")


def test_a_file_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcome = glora(capsys, "run", "create", "--spec", "nope.toml", "--admin-token", "x")
    assert (outcome.code, outcome.err[:41]) == (2, "The description nope.toml cannot be read:")
    (tmp_path / "run.toml").write_text('name = "x"\nmodel.path = "p"\n')
    outcome = glora(capsys, "run", "create", "--spec", "run.toml", "--manifest", "no.json", "--admin-token", "x")
    assert (outcome.code, outcome.err[:35]) == (2, "The manifest no.json cannot be read")


def test_a_description_with_mistakes_names_file_line_and_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "my.toml").write_text('name = "x"\nmodel.path = "p"\ntraining.batch_size = 0\nsed = 1\n')
    outcome = glora(capsys, "run", "create", "--spec", "my.toml", "--admin-token", "x")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        "my.toml line 3, training.batch_size: must be at least 1 (you wrote 0).",
        'my.toml line 4, sed: is not a known key; did you mean "seed"?',
    ]


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
        revision=0,
    )


def test_a_bug_is_a_sentence_and_a_traceback_only_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug() -> None:
        raise ZeroDivisionError("x")

    assert run_guarded(bug) == 1
    assert "ZeroDivisionError: x" in capsys.readouterr().err
    monkeypatch.setenv("GLORA_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run_guarded(bug)


def test_interrupting_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_guarded(interrupted) == 130
    assert capsys.readouterr().err == ""


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
