"""The files for containers: what they say must be what the programs know."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from glora_cli.demo_corpus import Row
from glora_server.config import Settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


def _value(text: str) -> str:
    """A value of docker-compose.yml with every variable at its default."""
    return re.sub(r"\$\{[A-Z_]+:?-([^}]*)\}", r"\1", text).strip().strip('"')


def test_every_setting_in_the_composition_is_one_of_the_server_and_holds(tmp_path: Path) -> None:
    found = dict(re.findall(r"^ +(GLORA__[A-Z_]+): (.+)$", COMPOSE, re.MULTILINE))
    settings = Settings.load(data_dir=tmp_path, env={name: _value(value) for name, value in found.items()})
    assert "server" in settings.grpc.public_names
    assert "server" in settings.http.public_names
    assert settings.http.proxies == ()
    assert settings.database_url.startswith("postgresql://glora@postgres/glora?passfile=/secrets/server/")


def test_http_prometheus_and_grafana_are_published_on_loopback_only() -> None:
    defaults = dict(re.findall(r"\$\{([A-Z]+(?:_HTTP)?_PUBLISH):-([^}]+)\}", COMPOSE))
    assert defaults == {
        "GLORA_HTTP_PUBLISH": "127.0.0.1:8080",
        "PROMETHEUS_PUBLISH": "127.0.0.1:9090",
        "GRAFANA_PUBLISH": "127.0.0.1:3000",
    }


def test_nothing_depends_on_a_service_that_ends() -> None:
    depended_on = set(re.findall(r"^      ([a-z-]+): \{condition:", COMPOSE, re.MULTILINE))
    assert depended_on == {"postgres", "server"}


def test_every_file_that_is_mounted_exists() -> None:
    mounted = re.findall(r"- \./(\S+?):/", COMPOSE)
    assert mounted
    assert [path for path in mounted if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("extras", [("server", "postgres"), ("client",)])
def test_images_install_what_the_extras_name(extras: tuple[str, ...]) -> None:
    program, project = DOCKER / "requirements.py", ROOT / "pyproject.toml"
    command = (sys.executable, str(program), str(project), *extras)
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    for extra in extras:
        own = [line for line in declared["optional-dependencies"][extra] if not line.startswith("glora[")]
        assert set(own) <= set(lines)
    assert set(declared["dependencies"]) <= set(lines)
    assert not any(line.startswith("glora") for line in lines)
    assert ("nicegui>=3.0" in lines) == ("server" in extras)


def test_an_unknown_extra_is_named() -> None:
    command = (sys.executable, str(DOCKER / "requirements.py"), str(ROOT / "pyproject.toml"), "sever")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "'sever'" in done.stderr


def test_the_demo_deals_its_rows_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may be reading its file when the composition is brought up again."""
    spec = importlib.util.spec_from_file_location("demo_operator", DOCKER / "demo_operator.py")
    assert spec is not None
    assert spec.loader is not None
    operator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(operator)
    monkeypatch.setattr(operator, "FOLDER", tmp_path)
    dealt = [
        Row(f"{when} {label} {number}", label) for when in ("first", "later") for label in "ab" for number in range(200)
    ]
    for rows in (dealt[:400], dealt[400:]):
        monkeypatch.setattr(operator, "collect_corpus", lambda rows=rows: rows)
        assert operator._write_rows() == ("a", "b")
    written = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "rows").iterdir()}
    assert written.keys() == {"rank-2.jsonl", "rank-4.jsonl", "rank-8.jsonl", "held-out.jsonl"}
    assert all("first" in text and "later" not in text for text in written.values())


@pytest.fixture
def fake_glora(tmp_path: Path) -> Path:
    """A folder with a `glora` that notes how it is called; `client status` succeeds once `client join` has."""
    program = tmp_path / "bin" / "glora"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$2" in
  status) [ -e {tmp_path}/joined ] ;;
  join) exit_code=$(cat {tmp_path}/join_status 2>/dev/null || echo 0)
        [ "$exit_code" = 0 ] && touch {tmp_path}/joined
        exit "$exit_code" ;;
esac
""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    return program.parent


def _device(fake_glora: Path, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
    """Exit status and stderr of the client image's entry, and the `glora` commands that it called."""
    done = subprocess.run(
        ("sh", str(DOCKER / "client_entrypoint.sh"), *arguments),
        env={"PATH": f"{fake_glora}{os.pathsep}{os.environ['PATH']}", **variables},
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    calls = fake_glora.parent / "calls"
    return done.returncode, done.stderr, calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


def test_a_device_joins_once_and_runs(fake_glora: Path) -> None:
    token = fake_glora.parent / "token"
    token.write_text("glora_abc", encoding="utf-8")
    setting = {"GLORA_SERVER": "server", "GLORA_JOIN_TOKEN_FILE": str(token), "GLORA_DEVICE_NAME": "pi-7"}
    status, _, calls = _device(fake_glora, "run", "--model", "m", **setting)
    assert status == 0
    assert calls == [
        "client status",
        "client join --server server --token glora_abc --name pi-7 --rank 8",
        "client run --model m",
    ]
    assert _device(fake_glora, "run", "--model", "m", **setting)[2][3:] == ["client status", "client run --model m"]


def test_a_device_that_is_refused_does_not_ask_for_ever(fake_glora: Path) -> None:
    (fake_glora.parent / "join_status").write_text("3", encoding="utf-8")
    status, _, calls = _device(fake_glora, GLORA_SERVER="server", GLORA_JOIN_TOKEN="t", GLORA_DEVICE_NAME="pi-7")
    assert status == 3
    assert len(calls) == 2


def test_a_device_without_a_token_says_what_it_needs(fake_glora: Path) -> None:
    status, said, _ = _device(fake_glora, GLORA_SERVER="server")
    assert status == 2
    assert "GLORA_JOIN_TOKEN" in said


def test_other_commands_of_the_client_pass_through(fake_glora: Path) -> None:
    assert _device(fake_glora, "status", "--json")[2] == ["client status --json"]
