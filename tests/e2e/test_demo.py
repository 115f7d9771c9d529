"""`glora demo` as people run it: what it reports, what it leaves behind, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glora_cli.demo_corpus import collect_corpus
from glora_cli.demo_data import split_rows
from glora_cli.demo_run import HOST, child_environment, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
_GLORA = [sys.executable, "-P", "-c", "from glora_cli.main import main; main()"]
_SHORT = ["--rounds", "2", "--devices", "2", "--ranks", "2,8"]


def _environment(folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    return child_environment(os.environ) | {"TMPDIR": str(folder), "COLUMNS": "200"}


def _demo(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*_GLORA, "demo", *arguments],
        cwd=cwd,
        env=_environment(cwd / "tmp"),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def _processes_with(text: str) -> list[str]:
    """Command lines of living processes that contain `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # ended since
        if text in line:
            found.append(line)
    return found


def _holds(condition: Callable[[], bool], within: float = 60.0) -> bool:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _none_left(text: str) -> bool:
    return _holds(lambda: not _processes_with(text))


def test_demo_trains_reports_and_exports(tmp_path: Path) -> None:
    (tmp_path / "glora-demo-adapter").mkdir()
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        done = _demo(tmp_path, *_SHORT, "--steps", "45", "--json", "--port", str(port))
    assert done.returncode == 0, done.stderr
    assert f"port {port} is in use, taking" in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)

    assert [version["round"] for version in report["versions"]] == [0, 1, 2]
    assert all([found["rank"] for found in version["ranks"]] == [2, 8] for version in report["versions"])
    assert report["accuracy_before"] < 0.3
    assert report["accuracy_after"] > 0.3, "the largest of the eight classes has less than 25 %"
    # Three whole adapters of rank 2 in float32 (6 layers, 2 modules, 384 x 384, a head of 384 x 8) are more than this.
    assert report["traffic"]["down"] > 3 * 4 * (6 * 2 * 2 * 2 * 384 + 384 * 8)
    assert 0 < report["traffic"]["up"] < report["traffic"]["down"]

    adapter = Path(report["adapter"])
    assert adapter == tmp_path / "glora-demo-adapter-2"
    assert list((tmp_path / "glora-demo-adapter").iterdir()) == []
    assert list((tmp_path / "tmp").glob("glora-demo-*")) == []
    assert _none_left(str(tmp_path))
    assert _accuracy_as_loaded(report["load"]) == pytest.approx(report["accuracy_after"], abs=1.5 / 480)


def _accuracy_as_loaded(lines: list[str]) -> float:
    """Accuracy of the model that the report's own lines load, on the rows that the demo held out."""
    script = "\n".join(
        [
            "import json, sys, torch, transformers",
            "transformers.logging.set_verbosity_error()",
            *lines,
            f"tokenizer = transformers.AutoTokenizer.from_pretrained({lines[1].split('(', 1)[1].rsplit(',', 1)[0]})",
            "rows, right = json.load(sys.stdin), 0",
            "with torch.inference_mode():",
            "    for text, label in rows:",
            "        tokens = tokenizer(text, truncation=True, max_length=48, return_tensors='pt')",
            "        right += int(model.eval()(**tokens).logits.argmax()) == label",
            "print(right / len(rows))",
        ]
    )
    split = split_rows(collect_corpus(), 2)
    rows = [(row.text, split.labels.index(row.label)) for row in split.held_out]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=child_environment(os.environ),
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    folder = tmp_path / "tmp"
    # A shell that runs the tests in the background has all their processes ignore Ctrl-C.
    command = ["env", "--default-signal=INT", *_GLORA, "demo", *_SHORT, "--port", str(free_port(8300))]
    with subprocess.Popen(
        command, cwd=tmp_path, env=_environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "joined with one token and at work" in line:
                break
        # A process that was just started has no command line for a moment.
        assert _holds(lambda: len(_processes_with(str(folder))) >= 4), "a server, two devices and one that evaluates"
        demo.send_signal(number)
        assert demo.wait(120) == code
        assert demo.stderr is not None
        assert "Traceback" not in demo.stderr.read()
    assert _none_left(str(folder))
    assert list(folder.glob("glora-demo-*")) == []
    assert not (tmp_path / "glora-demo-adapter").exists()


def test_a_killed_demo_takes_its_processes_along(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    command = [*_GLORA, "demo", *_SHORT, "--port", str(free_port(8400))]
    with subprocess.Popen(command, cwd=tmp_path, env=_environment(folder), stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "joined with one token and at work" in line:
                break
        demo.kill()
    assert _none_left(str(folder))


def test_a_strategy_that_is_not_known_is_told_in_a_sentence(tmp_path: Path) -> None:
    done = _demo(tmp_path, *_SHORT, "--strategy", "average", "--port", str(free_port(8500)))
    assert done.returncode == 1
    assert "average" in done.stderr
    assert "Traceback" not in done.stderr
    assert _none_left(str(tmp_path))
