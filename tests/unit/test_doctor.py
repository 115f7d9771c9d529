"""`glora doctor`: every trouble has a check that finds it and says what to do."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import glora
from fake_server import FakeServer
from http_server import serving

from glora_cli import doctor
from glora_cli.doctor import Check, Level
from glora_cli.doctor_server import check_certificates, check_data_dir, check_database, check_ports
from glora_server.config import Settings
from glora_server.security.authority import FileAuthority
from glora_server.storage import migrate
from glora_server.storage.database import connect

DAY = 86400.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    return data


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield int(listener.getsockname()[1])


def settings(folder: Path, **flags: object) -> Settings:
    ports = {"grpc.port": 0, "enrolment.port": 0, "http.port": 0}
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return Settings.load(None, folder, {}, {**ports, **named})


def levels(checks: Iterator[Check]) -> dict[str, Level]:
    return {check.name: check.level for check in checks}


def test_this_python_and_this_clock_are_right() -> None:
    assert doctor.check_python().level is Level.OK
    assert doctor.check_clock().level is Level.OK


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, 10, 1))
    assert doctor.check_python().level is Level.BROKEN


def test_a_clock_in_the_past_is_told() -> None:
    check = doctor.check_clock(now=1_000_000_000.0)
    assert check.level is Level.BROKEN
    assert "2001-09-09" in check.message
    assert "set the clock" in check.advice


def test_the_packages_that_are_declared_are_looked_at() -> None:
    checks = [check for extra in ("", "server", "client") for check in doctor.check_packages(extra)]
    assert [check.level for check in checks] == [Level.OK] * 3, checks


def test_a_package_of_another_version_is_broken_and_a_missing_one_is_a_note() -> None:
    wanted = ["typer>=99,<100; extra == 'server'", "nothing-of-the-sort>=1; extra == 'server'", "rich>=99"]
    wrong, missing = doctor.check_packages("server", wanted)
    assert (wrong.level, missing.level) == (Level.BROKEN, Level.NOTE)
    assert "(wanted >=99,<100)" in wrong.message
    assert wrong.advice == "pip install -U 'glora[server]'"
    assert missing.message == "not installed: nothing-of-the-sort"


@pytest.mark.parametrize(
    ("version", "bounds", "right"),
    [
        ("2.13.0+cpu", ">=2.4", True),
        ("2.3.9", ">=2.4", False),
        ("2.10", ">=2.9", True),
        ("1.76.0", "<2,>=1.76", True),
        ("2.0.0", "<2,>=1.76", False),
        ("2", ">=2.0", True),
        ("5.0.0rc1", ">=5.0", True),
        ("1", "", True),
        ("1.2", "==1.2.0", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, bounds: str, right: bool) -> None:
    assert doctor.fits(version, bounds) is right


def test_a_gpu_that_is_wanted_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor.check_gpu("auto").level is Level.NOTE
    check = doctor.check_gpu("cuda:0")
    assert check.level is Level.BROKEN
    assert 'worker.device = "auto"' in check.advice


def test_a_base_model_is_whole_or_told(tmp_path: Path) -> None:
    assert "there is no folder" in doctor.check_model(str(tmp_path / "model")).message
    model = tmp_path / "model"
    model.mkdir()
    assert "has no config.json" in doctor.check_model(str(model)).message
    (model / "config.json").write_text("{}")
    assert "has no weight files" in doctor.check_model(str(model)).message
    (model / "model.safetensors").write_bytes(bytes(2**20))
    assert "has no tokenizer" in doctor.check_model(str(model)).message
    (model / "tokenizer.json").write_text("{}")
    assert doctor.check_model(str(model)) == doctor.ok("base model", f"{model}: 1 weight files, 1 MiB")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text("{")
    assert doctor.check_model(str(model)).level is Level.BROKEN


def test_a_data_folder_is_private_and_has_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(check_data_dir(folder)) == {"data folder": Level.OK, "disk": Level.OK}
    assert levels(check_data_dir(folder / "later"))["data folder"] is Level.NOTE
    folder.chmod(0o755)
    (check, *_) = check_data_dir(folder)
    assert check.advice == f"chmod 700 {folder}"
    for free, level in ((100 * 2**20, Level.BROKEN), (2**30, Level.NOTE)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: Usage(free))
        assert levels(check_data_dir(folder))["disk"] is level


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_looking_at_a_data_folder_does_not_make_it(tmp_path: Path) -> None:
    list(check_data_dir(tmp_path / "a" / "b"))
    assert not list(tmp_path.iterdir())


def test_a_data_folder_that_is_a_file_is_broken(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    assert levels(check_data_dir(tmp_path / "data")) == {"data folder": Level.BROKEN}


def test_a_port_that_somebody_uses_is_told(folder: Path, used_port: int) -> None:
    checks = {check.name: check for check in check_ports(settings(folder, grpc__port=used_port))}
    check = checks[f"port {used_port}"]
    assert check.level is Level.BROKEN
    assert "Address already in use" in check.message
    assert "grpc.port" in check.advice


def test_a_port_that_a_glora_server_uses_is_fine(folder: Path, tmp_path: Path, used_port: int) -> None:
    with serving(FakeServer(), tmp_path) as running:
        port = int(running.url.rsplit(":", 1)[1])
        found = levels(check_ports(settings(folder, http__port=port, grpc__port=used_port, grpc__host="127.0.0.1")))
    assert found[f"port {port}"] is Level.OK
    assert found[f"port {used_port}"] is Level.OK


def test_a_database_is_looked_at_and_not_made(folder: Path) -> None:
    assert check_database(settings(folder)).level is Level.NOTE
    assert not list(folder.iterdir())


def test_a_database_has_the_schema_of_this_version(folder: Path) -> None:
    here = settings(folder)
    database = connect(here.database_url)
    with database.writer.begin() as connection:
        migrate.upgrade(connection)
    database.dispose()
    check = check_database(here)
    assert check.level is Level.OK
    assert migrate.head() in check.message


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nonsense", "is not a database URL"),
        ("mysql://h/d", "names mysql, which is not supported"),
        ("postgresql://glora:secret@127.0.0.1:9/glora", "127.0.0.1"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_without_its_password(folder: Path, url: str, sentence: str) -> None:
    pytest.importorskip("psycopg")
    check = check_database(settings(folder, database__url=url))
    assert check.level is Level.BROKEN
    assert sentence in check.message
    assert "secret" not in check.message
    assert check.advice


def test_a_missing_driver_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    check = check_database(settings(folder, database__url="postgresql://h/d"))
    assert check.level is Level.BROKEN
    assert "pip install 'glora[postgres]'" in check.message


def test_certificates_are_good_end_soon_or_have_ended(folder: Path) -> None:
    assert set(levels(check_certificates(folder)).values()) == {Level.NOTE}
    authority = FileAuthority.open(folder)
    ends = authority.server_expires_at
    for when, level in (
        (ends - 100 * DAY, Level.OK),
        (ends - 3 * DAY, Level.NOTE),
        (ends + 3 * DAY, Level.BROKEN),
        (1_000_000_000.0, Level.BROKEN),
    ):
        assert levels(check_certificates(folder, now=when))["server certificate"] is level
    (folder / "ca.pem").write_text("nonsense")
    assert levels(check_certificates(folder))["certificate authority"] is Level.BROKEN


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("GLORA"):
            monkeypatch.delenv(name)
    for name in ("GRPC", "ENROLMENT", "HTTP"):
        monkeypatch.setenv(f"GLORA__{name}__PORT", "0")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("quiet")
def test_a_machine_that_is_fine_gets_exit_code_0(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    outcome = glora(capsys, "doctor", "--data-dir", str(folder), "--json")
    checks = json.loads(outcome.out)
    assert [check for check in checks if check["level"] == "broken"] == []
    assert outcome.code == 0
    assert {"python", "clock", "data folder", "disk", "database", "gpu"} <= {check["name"] for check in checks}


@pytest.mark.usefixtures("quiet")
def test_a_machine_that_is_not_gets_exit_code_1_and_advice(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    outcome = glora(capsys, "doctor", "--data-dir", str(folder), "--model", "/nowhere")
    assert outcome.code == 1
    assert "there is no folder /nowhere" in outcome.out
    assert "→ give the folder that holds config.json" in outcome.out


@pytest.mark.usefixtures("quiet")
def test_settings_that_are_wrong_are_told_and_the_rest_is_looked_at(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "glora.toml").write_text("[grcp]\n")
    outcome = glora(capsys, "doctor", "--data-dir", str(folder))
    assert outcome.code == 1
    assert 'did you mean "grpc"?' in outcome.out
    assert "gpu" in outcome.out


@pytest.mark.usefixtures("quiet")
def test_the_database_commands_say_where_it_stands(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    missing = glora(capsys, "db", "current", "--data-dir", str(folder))
    assert (missing.code, "There is no database" in missing.err) == (2, True)
    made = glora(capsys, "db", "upgrade", "--data-dir", str(folder))
    assert (made.code, made.out.endswith(f"{migrate.head()}, upgraded from empty\n")) == (0, True)
    assert glora(capsys, "db", "upgrade", "--data-dir", str(folder)).out.endswith("was up to date\n")
    told = json.loads(glora(capsys, "db", "current", "--data-dir", str(folder), "--json").out)
    assert told["current"] == told["head"] == migrate.head()


@pytest.mark.usefixtures("quiet")
def test_the_server_command_refuses_settings_before_it_starts(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    wrong = glora(capsys, "server", "--data-dir", str(folder), "--http-host", "0.0.0.0")
    assert (wrong.code, "must be a loopback address" in wrong.err) == (2, True)
    (folder / "file").write_text("")
    unusable = glora(capsys, "server", "--data-dir", str(folder / "file"))
    assert (unusable.code, "is not a folder" in unusable.err) == (2, True)
    assert "GLORA__GRPC__PORT" in glora(capsys, "server", "--show-settings").out
