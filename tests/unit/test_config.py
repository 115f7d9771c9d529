"""Settings: which source wins, and that nothing that is misspelt is passed over."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from glora_server.config import Settings, default_data_dir, prepare_data_dir, settings_table
from glora_wire.errors import GloraError, Reason


def load(
    tmp_path: Path,
    text: str | None = None,
    env: dict[str, str] | None = None,
    overrides: dict[str, object] | None = None,
) -> Settings:
    config = None
    if text is not None:
        config = tmp_path / "settings.toml"
        config.write_text(text)
    return Settings.load(config, tmp_path / "data", env or {}, overrides)


def refusal(
    tmp_path: Path,
    text: str | None = None,
    env: dict[str, str] | None = None,
    overrides: dict[str, object] | None = None,
) -> str:
    with pytest.raises(GloraError) as caught:
        load(tmp_path, text, env, overrides)
    assert caught.value.reason is Reason.SETTINGS_INVALID
    return caught.value.message


def test_without_any_source_there_are_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert (settings.grpc.port, settings.enrolment.port, settings.http.port) == (7443, 7444, 8080)
    assert settings.http.host == "127.0.0.1"
    assert settings.data_dir == tmp_path / "data"
    assert settings.database_url == f"sqlite:///{tmp_path}/data/glora.sqlite3"


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    text = '[grpc]\nport = 1\nhost = "h"\n[http]\nport = 2\n[enrolment]\nport = 3\n'
    env = {"GLORA__HTTP__PORT": "22", "GLORA__ENROLMENT__PORT": "33", "PATH": "/bin"}
    settings = load(tmp_path, text, env, {"enrolment.port": 333})
    assert (settings.grpc.port, settings.http.port, settings.enrolment.port) == (1, 22, 333)
    assert settings.grpc.host == "h"


def test_the_file_of_the_data_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glora.toml").write_text("[http]\nport = 1\n")
    assert Settings.load(None, tmp_path / "data", {}).http.port == 1
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "glora.toml").write_text("[http]\nport = 2\n")
    assert Settings.load(None, tmp_path / "data", {}).http.port == 2
    assert Settings.load(None, None, {"GLORA__DATA_DIR": str(tmp_path / "data")}).http.port == 2
    assert Settings.load(None, None, {"GLORA_DATA_DIR": str(tmp_path / "data")}).data_dir == tmp_path / "data"


def test_a_list_in_the_environment_is_words_between_commas(tmp_path: Path) -> None:
    settings = load(tmp_path, env={"GLORA__GRPC__PUBLIC_NAMES": "a.example, 10.0.0.1,"})
    assert settings.grpc.public_names == ("a.example", "10.0.0.1")
    assert load(tmp_path, '[grpc]\npublic_names = ["b"]').grpc.public_names == ("b",)


def test_settings_cannot_be_altered(tmp_path: Path) -> None:
    settings = load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        settings.grpc.port = 1


def test_the_database_url_is_masked_and_kept(tmp_path: Path) -> None:
    settings = load(tmp_path, env={"GLORA__DATABASE__URL": "postgresql://glora:secret@db/glora"})
    assert "secret" not in repr(settings)
    assert settings.database_url == "postgresql://glora:secret@db/glora"


def test_a_database_url_of_the_wrong_type_is_not_repeated(tmp_path: Path) -> None:
    assert "4711" not in refusal(tmp_path, "[database]\nurl = 4711\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[grcp]\nport = 1\n", 'settings.toml line 1, grcp: is not a known key; did you mean "grpc"?'),
        ("[grpc]\n\nprt = 1\n", 'settings.toml line 3, grpc.prt: is not a known key; did you mean "port"?'),
        ("[grpc]\nport = 70000\n", "settings.toml line 2, grpc.port: must be at most 65535 (you wrote 70000)."),
        ("[grpc]\nport = 'x'\n", "settings.toml line 2, grpc.port: must be a whole number"),
        ("grpc = 3\n", "settings.toml line 1, grpc: must be a section with keys of its own"),
        ("[log]\nlevel = 'loud'\n", "settings.toml line 2, log.level: must be one of 'debug', 'info'"),
        ("[worker]\ndevice = 'tpu'\n", "settings.toml line 2, worker.device: must look like ^(auto|cpu|"),
        ("[grpc]\nwait_seconds_max = 3\n", "settings.toml line 2, grpc.wait_seconds_max: must not be below"),
        ("[grpc\n", "is not TOML"),
        ("[http]\nhost = '0.0.0.0'\n", "line 2, http.host: must be a loopback address such as 127.0.0.1, because HTTP"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_file_line_and_key(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in refusal(tmp_path, text)


def test_every_mistake_is_told(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, "[grpc]\nport = -1\n[http]\nport = -1\n").splitlines()) == 2


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        ({"GLORA__GRPC__PRT": "1"}, 'GLORA__GRPC__PRT is not a setting; did you mean "GLORA__GRPC__PORT"?'),
        ({"GLORA__GRCP__PORT": "1"}, 'GLORA__GRCP__PORT is not a setting; did you mean "GLORA__GRPC__PORT"?'),
        ({"GLORA__GRPC": "{}"}, "GLORA__GRPC is not a setting"),
        ({"GLORA__GRPC__PORT__X": "1"}, "GLORA__GRPC__PORT__X is not a setting"),
        ({"GLORA__ZZZZZZ": "1"}, "GLORA__ZZZZZZ is not a setting"),
        ({"GLORA__HTTP__PORT": "x"}, 'variable GLORA__HTTP__PORT, http.port: must be a whole number (you wrote "x").'),
        ({"GLORA__HTTP__HOST": "192.168.1.1"}, "variable GLORA__HTTP__HOST, http.host: must be a loopback"),
    ],
)
def test_a_mistake_in_the_environment_is_told_with_its_variable(
    tmp_path: Path, env: dict[str, str], sentence: str
) -> None:
    assert sentence in refusal(tmp_path, env=env)


def test_a_mistake_in_a_flag_is_told(tmp_path: Path) -> None:
    assert refusal(tmp_path, overrides={"http.port": -1}).startswith("command line, http.port: must be at least 0")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_loopback_needs_no_permission(tmp_path: Path, host: str) -> None:
    assert load(tmp_path, overrides={"http.host": host}).http.loopback


def test_another_address_needs_permission(tmp_path: Path) -> None:
    flags: dict[str, object] = {"http.host": "glora.example", "http.allow_insecure_remote": True}
    assert not load(tmp_path, overrides=flags).http.loopback


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match="cannot be read: No such file"):
        Settings.load(tmp_path / "nope.toml", None, {})


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(GloraError, match="is not UTF-8"):
        Settings.load(tmp_path / "x.toml", None, {})


def test_the_data_folder_has_a_place_of_its_own() -> None:
    assert default_data_dir({"XDG_DATA_HOME": "/x"}) == Path("/x/glora")
    assert default_data_dir({}) == Path.home() / ".local" / "share" / "glora"


def test_the_data_folder_is_made_private(tmp_path: Path) -> None:
    folder = prepare_data_dir(tmp_path / "a" / "data")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert prepare_data_dir(folder) == folder
    assert not list(folder.iterdir())


def test_a_data_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(GloraError, match="is not a folder; name another") as caught:
        prepare_data_dir(tmp_path / "data")
    assert caught.value.reason is Reason.DATA_DIR_UNUSABLE


def test_a_data_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GloraError, match="cannot be made"):
        prepare_data_dir(tmp_path / "file" / "data")


def test_a_data_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write everywhere, so the disk has to refuse
        monkeypatch.setattr("tempfile.TemporaryFile", _read_only)
    with pytest.raises(GloraError, match=r"cannot be written to .*make it writable") as caught:
        prepare_data_dir(folder)
    assert caught.value.reason is Reason.DATA_DIR_UNUSABLE


def _read_only(**_: object) -> None:
    raise OSError(30, "Read-only file system")


def test_the_table_lists_every_setting_with_its_variable() -> None:
    table = settings_table()
    assert "| `grpc.port` | `GLORA__GRPC__PORT` | `7443` | TCP port; 0 = any free one. |" in table
    for section, field in Settings.model_fields.items():
        for key, described in getattr(field.annotation, "model_fields", {}).items():
            assert f"`{section}.{key}`" in table
            assert described.description


@pytest.mark.parametrize("tls", ["own", "files"])
def test_tls_lets_the_port_be_reached_from_elsewhere(tmp_path: Path, tls: str) -> None:
    files: dict[str, object] = {"http.certificate": "c.pem", "http.key": "k.pem"} if tls == "files" else {}
    flags: dict[str, object] = {"http.host": "0.0.0.0", "http.tls": tls}
    http = load(tmp_path, overrides=flags | files).http
    assert (http.tls, http.loopback, http.metrics_for_all) == (tls, False, False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"http.tls": "files", "http.key": "k"}, "needs http.certificate and http.key"),
        ({"http.certificate": "c", "http.key": "k"}, 'must be "files"'),
        ({"http.admin_password": "x", "http.admin_password_file": "f"}, "two places for the same password"),
        ({"http.session_hours": 0}, "session_hours"),
    ],
)
def test_http_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, flags: dict[str, object], words: str
) -> None:
    with pytest.raises(GloraError) as caught:
        load(tmp_path, overrides=flags)
    assert words in caught.value.message


def test_the_first_password_is_never_shown(tmp_path: Path) -> None:
    settings = load(tmp_path, env={"GLORA__HTTP__ADMIN_PASSWORD": "eleven green bottles"})
    assert settings.http.admin_password.get_secret_value() == "eleven green bottles"
    assert "bottles" not in f"{settings!r} {settings.model_dump_json()}"


def test_a_proxy_in_front_of_loopback_closes_the_metrics(tmp_path: Path) -> None:
    assert load(tmp_path).http.metrics_for_all
    assert not load(tmp_path, overrides={"http.proxies": ("127.0.0.1",)}).http.metrics_for_all
