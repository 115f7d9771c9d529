"""The command line without a server: help, wrong input, what is missing. Always a sentence and an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from command_line import Outcome, glora

from glora_cli import main
from glora_cli.failures import exit_code_of, run_guarded
from glora_cli.rest import Api
from glora_dashboard.run_models import RunAnswer
from glora_wire.errors import GloraError

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


def test_a_package_that_is_missed_only_as_a_command_runs_is_told_alike(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(_: object) -> None:
        raise ModuleNotFoundError("No module named 'structlog'", name="structlog")

    monkeypatch.setattr("glora_server.main.serve", missing)
    told = glora(capsys, "server", "--data-dir", str(tmp_path))
    assert told.code == 2
    assert told.err == (
        "`glora server` needs the package structlog, which is not installed here: pip install 'glora[server]'.\n"
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
    assert "No token for http://127.0.0.1:8080" in outcome.err
    assert "--token" in outcome.err


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
