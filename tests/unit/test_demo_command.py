from __future__ import annotations

import hashlib
import io
import socket
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from glora_cli.demo import app
from glora_cli.demo_model import SHA256, check_weights, packaged_model
from glora_cli.demo_report import (
    DeviceShare,
    RankAccuracy,
    Report,
    Traffic,
    VersionAccuracy,
    load_lines,
    report_page,
    version_accuracies,
)
from glora_cli.demo_run import HOST, child_environment, free_port, port_is_free
from glora_cli.demo_spec import DemoOptions, run_toml, server_toml
from glora_dashboard.run_models import ScoreAnswer
from glora_server.config import Settings
from glora_server.coordinator.run_spec import parse_run_toml
from glora_wire.errors import GloraError, Reason

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
LABELS = (
    "concurrency",
    "data formats",
    "development",
    "files",
    "network",
    "numbers",
    "text",
    "time and interface",
)


def _options(model: str = "/models/encoder") -> DemoOptions:
    return DemoOptions(
        rounds=5, ranks=(2, 4, 8, 16), strategy="glora", steps=30, model=Path(model), data=None, port=8080
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--ranks", "2,x"], "is not a list of ranks"),
        (["--ranks", "0"], "is not a list of ranks"),
        (["--ranks", "5000"], "is not a list of ranks"),
        (["--ranks", ""], "is not a list of ranks"),
        (["--devices", "2", "--ranks", "2,3,4"], "3 ranks are too many for 2 devices"),
        (["--devices", "0"], "--devices"),
        (["--rounds", "0"], "--rounds"),
        (["--port", "70000"], "--port"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert complaint in result.output


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--model", str(tmp_path / "none")])
    assert isinstance(result.exception, GloraError)
    assert result.exception.reason is Reason.BASE_MODEL_MISSING


def test_the_packaged_model_is_the_published_one() -> None:
    assert (packaged_model() / "config.json").is_file()


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    check_weights(path, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(GloraError, match="is not used") as caught:
        check_weights(path, SHA256)
    assert caught.value.reason is Reason.BASE_MODEL_MISMATCH
    with pytest.raises(GloraError, match="cannot be read"):
        check_weights(tmp_path / "none.safetensors", SHA256)


def test_the_example_run_is_the_run_of_the_demo() -> None:
    example = parse_run_toml((EXAMPLES / "run.toml").read_text(encoding="utf-8"))
    demo = parse_run_toml(run_toml(_options(example.model.path), LABELS))
    assert demo.model_copy(update={"name": example.name}) == example


def test_names_with_quotes_survive_the_run_description() -> None:
    labels = ('say "no"', "back\\slash", "ümlaut")
    spec = parse_run_toml(run_toml(_options('/models/a "b"'), labels))
    assert spec.model.labels == labels
    assert spec.model.path == '/models/a "b"'


def test_the_example_settings_are_understood() -> None:
    settings = Settings.load(EXAMPLES / "glora.toml", env={})
    assert settings.data_dir == Path("/var/lib/glora")
    assert settings.grpc.public_names == ("glora.example.org",)
    assert settings.http.port == 8080


def test_the_server_of_the_demo_is_reached_from_this_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "glora.toml"
    path.write_text(
        server_toml(http_port=8081, grpc_port=0, enrolment_port=7444, admin_password="correct horse battery")
    )
    settings = Settings.load(path, tmp_path, env={})
    assert (settings.grpc.host, settings.enrolment.host, settings.http.host) == (HOST, HOST, HOST)
    assert (settings.http.port, settings.grpc.port, settings.enrolment.port) == (8081, 0, 7444)


def test_a_port_in_use_gives_the_next_free_one() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert not port_is_free(port)
        found = free_port(port)
        assert port < found < port + 50
        assert port_is_free(found)


def test_children_get_no_settings_of_other_servers() -> None:
    environment = child_environment({"GLORA__HTTP__PORT": "9999", "GLORA_URL": "http://elsewhere", "PATH": "/bin"})
    assert not any(name.startswith("GLORA_") for name in environment)
    assert (environment["PATH"], environment["HF_HUB_OFFLINE"]) == ("/bin", "1")


def _score(version: int, rank: int, accuracy: float, phase: str = "version") -> ScoreAnswer:
    return ScoreAnswer(version_number=version, rank=rank, phase=phase, accuracy=accuracy, loss=1.0, rows=640, devices=1)


def _report() -> Report:
    scores = [
        _score(1, 16, 0.6),
        _score(0, 16, 0.125),
        _score(1, 2, 0.5),
        _score(0, 2, 0.125),
        _score(1, 2, 0.9, "after"),
    ]
    return Report(
        run="demo",
        strategy="glora",
        model="/models/encoder",
        labels=LABELS,
        devices=(DeviceShare(name="device-1", rank=2, rows=100), DeviceShare(name="device-2", rank=16, rows=200)),
        held_out_rows=640,
        versions=version_accuracies(scores),
        server_rank=16,
        traffic=Traffic(down=1024, up=2048),
        seconds=61.0,
        adapter="/here/glora-demo-adapter",
        load=load_lines(Path("/models/encoder"), 8, Path("/here/glora-demo-adapter")),
        folder=None,
    )


def test_scores_become_a_table_by_version_and_rank() -> None:
    assert _report().versions == (
        VersionAccuracy(round=0, ranks=(RankAccuracy(rank=2, accuracy=0.125), RankAccuracy(rank=16, accuracy=0.125))),
        VersionAccuracy(round=1, ranks=(RankAccuracy(rank=2, accuracy=0.5), RankAccuracy(rank=16, accuracy=0.6))),
    )


def test_the_report_says_what_people_want_to_know() -> None:
    stream = io.StringIO()
    Console(file=stream, width=300).print(report_page(_report()))
    text = stream.getvalue()
    for expected in (
        "From 12.5 % to 60.0 %",
        "1.0 KiB of adapters",
        "2.0 KiB of updates",
        "/here/glora-demo-adapter",
        "round 1",
    ):
        assert expected in text
    for line in _report().load:
        assert line in text


def test_the_lines_that_load_the_adapter_are_python() -> None:
    compile("\n".join(_report().load), "load", "exec")
