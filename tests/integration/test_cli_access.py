"""`glora login`, `profile`, `user` and `api-token` against the REST surface on a real socket."""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from access_cases import PASSWORD
from command_line import Outcome, glora
from fake_server import ADMIN_TOKEN, FakeServer
from http_server import Running, serving

from glora_cli.connection import target
from glora_wire.errors import GloraError, Reason

Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(FakeServer.with_things(), tmp_path_factory.mktemp("exports")) as running:
        yield running


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`glora`, with a line on standard input."""
    for name in ("GLORA_URL", "GLORA_TOKEN", "GLORA_ADMIN_TOKEN", "GLORA_PROFILE", "GLORA_CA", "GLORA_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def run(*words: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        return glora(capsys, *words)

    return run


@pytest.fixture
def ada(running: Running, command: Command) -> Iterator[str]:
    """An admin who is there for one test."""
    root = ("--server", running.url, "--token", ADMIN_TOKEN)
    made = command("user", "create", "ada", "--role", "admin", "--password-stdin", *root, stdin=f"{PASSWORD}\n")
    assert (made.code, made.out) == (0, "ada: admin, enabled\n")
    yield "ada"
    command("user", "create", "zoe", "--role", "admin", "--password-stdin", *root, stdin=f"{PASSWORD}\n")
    assert command("user", "remove", "ada", "--yes", *root).code == 0


def login(command: Command, running: Running, *more: str, password: str = PASSWORD) -> Outcome:
    words = ("login", "--server", running.url, "--user", "ada", "--password-stdin", *more)
    return command(*words, stdin=f"{password}\n")


@pytest.mark.usefixtures("ada")
def test_signing_in_makes_a_profile_that_later_commands_use(command: Command, running: Running, tmp_path: Path) -> None:
    done = login(command, running)
    assert done.code == 0
    assert done.out.startswith(f"Signed in to {running.url} as ada (admin), until ")
    path = tmp_path / "config" / "glora" / "profiles.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert PASSWORD not in path.read_text()
    assert command("run", "list").code == 0
    mine = json.loads(command("api-token", "list", "--user", "ada", "--json").out)
    assert [token["name"].startswith("glora login, ") for token in mine] == [True]


@pytest.mark.usefixtures("ada")
def test_a_wrong_password_keeps_nothing(command: Command, running: Running, tmp_path: Path) -> None:
    done = login(command, running, password="wrong")
    assert (done.code, done.err) == (3, "The user name or the password is wrong, or the user is disabled.\n")
    assert not (tmp_path / "config").exists()


def test_a_password_is_not_shown_to_the_network(command: Command) -> None:
    done = command("login", "--server", "http://fl.example.org:8080", "--user", "ada", "--password-stdin", stdin="x\n")
    assert done.code == 2
    assert "would show the password to the network" in done.err


@pytest.mark.usefixtures("ada")
def test_profiles_are_listed_chosen_and_forgotten(command: Command, running: Running) -> None:
    login(command, running, "--profile", "lab", "--role", "viewer")
    login(command, running, "--profile", "field")
    listed = json.loads(command("profile", "list", "--json").out)
    assert [(line["name"], line["user"], line["current"]) for line in listed] == [
        ("field", "ada", True),
        ("lab", "ada", False),
    ]
    assert "token" not in command("profile", "list").out.lower()
    assert command("run", "pause", "demo", "--profile", "lab").code == 3, "a viewer's token"
    assert command("profile", "use", "lab").code == 0
    assert command("user", "list").code == 3
    assert command("user", "list", "--profile", "field").code == 0
    assert command("profile", "remove", "lab").code == 0
    assert command("profile", "use", "lab").code == 2
    assert "there are: field" in command("run", "list", "--profile", "lab").err


@pytest.mark.usefixtures("ada")
def test_a_profile_s_token_goes_to_its_own_server_only(command: Command, running: Running) -> None:
    login(command, running, "--profile", "lab")
    options = {"url": "http://127.0.0.1:1", "token": "", "ca": None, "data_dir": None}
    with pytest.raises(GloraError, match="its token is not sent there") as caught:
        target(profile_name="lab", **options)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.SETTINGS_INVALID
    with pytest.raises(GloraError, match=r"No token for http://127\.0\.0\.1:1"):
        target(profile_name="", **options)  # type: ignore[arg-type]
    assert target(profile_name="lab", **options | {"url": f"{running.url}/"}).token.startswith("glora-api-")  # type: ignore[arg-type]
    assert target(profile_name="lab", **options | {"token": "mine"}).token == "mine"  # type: ignore[arg-type]


@pytest.mark.usefixtures("ada")
def test_profiles_that_others_could_read_are_not_used(command: Command, running: Running, tmp_path: Path) -> None:
    login(command, running)
    path = tmp_path / "config" / "glora" / "profiles.json"
    path.chmod(0o644)
    assert "Other users may read or write" in command("run", "list").err
    path.chmod(0o600)
    path.write_text("{")
    assert "is damaged" in command("run", "list").err


def test_users_are_cared_for(command: Command, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLORA_URL", running.url)
    monkeypatch.setenv("GLORA_TOKEN", ADMIN_TOKEN)
    assert command("user", "create", "vera", "--password-stdin", stdin=f"{PASSWORD}\n").out == "vera: viewer, enabled\n"
    assert command("user", "create", "vera", "--password-stdin", stdin=f"{PASSWORD}\n").code == 3
    weak = command("user", "create", "bob", "--password-stdin", stdin="secret\n")
    assert weak.code == 2
    assert "secret" not in weak.err
    assert command("user", "set-role", "vera", "operator").out == "vera: operator, enabled\n"
    assert command("user", "disable", "vera").out == "vera: operator, disabled\n"
    assert command("user", "enable", "vera").out == "vera: operator, enabled\n"
    assert command("user", "set-password", "vera", "--password-stdin", stdin="twelve blue bottles\n").code == 0
    assert "vera" in command("user", "list").out
    made = command("api-token", "create", "--name", "ci", "--user", "vera", "--role", "operator", "--expires", "never")
    assert made.out.startswith("glora-api-")
    assert "For vera, operator, for ever." in made.err
    monkeypatch.setenv("GLORA_TOKEN", made.out.strip())
    assert command("run", "list").code == 0
    assert command("user", "list").code == 3
    token = json.loads(command("api-token", "list", "--json").out)[0]
    assert command("api-token", "list", "--user", "admin").code == 3, "not an empty list: it was not looked at"
    assert command("api-token", "revoke", token["id"]).out == f"{token['id']}: revoked\n"
    refused = command("run", "list")
    assert (refused.code, "was revoked" in refused.err) == (3, True)
    monkeypatch.setenv("GLORA_TOKEN", ADMIN_TOKEN)
    assert command("user", "remove", "vera", stdin="n\n").code == 2
    assert command("user", "remove", "vera").err.endswith("Nothing was done; --yes does it without asking.\n")
    assert command("user", "remove", "vera", "--yes").out == "vera: removed\n"


def test_where_nobody_can_be_asked_the_option_is_named(command: Command, running: Running) -> None:
    where = ("--server", running.url, "--token", ADMIN_TOKEN)
    for words, instead in (
        (("login", "--server", running.url), "give --user NAME"),
        (("login", "--server", running.url, "--user", "ada"), "give --password-stdin"),
        (("user", "create", "bob", *where), "give --password-stdin"),
    ):
        refused = command(*words)
        assert (refused.code, refused.err.startswith(f"There is no terminal to ask at: {instead}")) == (2, True)
    unknown = command("api-token", "list", "--user", "nobody", *where)
    assert (unknown.code, unknown.err) == (3, "There is no user 'nobody'; see `glora user list`.\n")


def test_an_address_with_the_wrong_scheme_is_told(command: Command, running: Running) -> None:
    wrong = command("run", "list", "--server", running.url.replace("http:", "https:"), "--token", "x")
    assert (wrong.code, "does not speak TLS" in wrong.err, "try http://" in wrong.err) == (4, True, True)


def test_the_old_names_of_the_options_still_work(command: Command, running: Running) -> None:
    assert command("run", "list", "--server-url", running.url, "--admin-token", ADMIN_TOKEN).code == 0
