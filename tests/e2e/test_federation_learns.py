"""Four devices of different ranks and an evaluator learn together, over real gRPC, and the export is what they made.

Two runs with two strategies go on at the same time on the same server and the same devices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_data import deal, labels, minilm, run_toml
from federation import Federation, completed

from glora_dashboard.run_models import RunAnswer
from glora_wire.digests import Digest

pytestmark = pytest.mark.e2e

RANKS = {"device-1": 2, "device-2": 4, "device-3": 8, "device-4": 16}
ROUNDS, OTHER_ROUNDS = 4, 1
HELD_OUT = 160
STEPS = 30
TRAINING = f"steps = {STEPS}\nbatch_size = 16\nmax_length = 48\nlearning_rate = 3e-3\nwarmup_ratio = 0.1"
ENOUGH, NOTHING_YET = 0.70, 0.45


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is left when both runs are complete and measured."""

    federation: Federation
    run: RunAnswer
    other: RunAnswer
    held_out: Path


def described(folder: Path, name: str, strategy: str, rounds: int, ranks: list[int]) -> Path:
    toml = run_toml(
        name,
        minilm(),
        lora="max_rank = 16",
        strategy=f'name = "{strategy}"',
        training=TRAINING,
        policy=f"rounds = {rounds}\ntarget_devices = 4\nquorum = 4\ndeadline_seconds = 1200.0",
        evaluation=f"ranks = {ranks}\nbefore = false\nafter = false",
    )
    path = folder / f"{name}.toml"
    path.write_text(toml, encoding="utf-8")
    return path


def measured(run: RunAnswer, versions: int) -> bool:
    scores = {(score.version_number, score.rank) for score in run.scores if score.phase == "version"}
    return completed(run) and len(scores) >= versions


def start_devices(federation: Federation, rows: list[Path], held_out: Path) -> None:
    token = federation.token(uses=5)
    for (name, rank), path in zip(RANKS.items(), rows, strict=True):
        joined = federation.join_by_command(name, rank, token)
        assert joined.code == 0, joined.err
        federation.start_device(name, minilm(), "--data", str(path))
    federation.join("evaluator", 16, token)
    federation.start_device("evaluator", minilm(), "--evaluate-only", "--eval-data", str(held_out))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("learns")
    with Federation(folder / "federation") as federation:
        federation.start_server()
        rows, held_out = deal(folder, devices=4, held_out=HELD_OUT)
        start_devices(federation, rows, held_out)
        for name, strategy, rounds, ranks in (
            ("glora", "glora", ROUNDS, [2, 4, 8, 16]),
            ("fedit", "fedit", OTHER_ROUNDS, [16]),
        ):
            spec = described(folder, name, strategy, rounds, ranks)
            created = federation.admin("run", "create", "--spec", str(spec), "--start")
            assert created.code == 0, created.err
        run = federation.wait_run("glora", lambda run: measured(run, 4 * (ROUNDS + 1)), "its last measurement", 900.0)
        other = federation.wait_run("fedit", lambda run: measured(run, OTHER_ROUNDS + 1), "its last measurement", 600.0)
        yield Trained(federation=federation, run=run, other=other, held_out=held_out)


def accuracies(run: RunAnswer, rank: int) -> list[float]:
    """By version, from 0."""
    found = {score.version_number: score.accuracy for score in run.scores if score.rank == rank}
    return [found[number] or 0.0 for number in sorted(found)]


def test_accuracy_rises_from_chance_to_learned(trained: Trained) -> None:
    curve = accuracies(trained.run, 16)
    assert len(curve) == ROUNDS + 1
    assert curve[0] <= NOTHING_YET, curve
    assert curve[-1] >= ENOUGH, curve
    # Rising but for noise: no version is much worse than the best one before it.
    assert all(later > max(curve[:number]) - 0.1 for number, later in enumerate(curve) if number), curve


def test_every_version_was_measured_at_every_rank(trained: Trained) -> None:
    found = {
        (item.version_number, item.rank): item
        for item in trained.federation.measurements("glora")
        if item.phase == "version"
    }
    assert set(found) == {(version, rank) for version in range(ROUNDS + 1) for rank in (2, 4, 8, 16)}
    assert all(item.rows == HELD_OUT and item.loss is not None and item.loss > 0 for item in found.values())
    first, last = found[0, 16], found[ROUNDS, 16]
    assert first.loss is not None
    assert last.loss is not None
    assert last.loss < first.loss
    # The low readouts have learned too.
    assert accuracies(trained.run, 2)[-1] >= NOTHING_YET


def test_rounds_took_every_device_at_its_own_rank_and_counted_the_bytes(trained: Trained) -> None:
    rounds = trained.federation.rounds("glora")
    assert [found.number for found in rounds] == list(range(1, ROUNDS + 1))
    for found in rounds:
        assert found.phase == "committed"
        assert {item.device: item.rank for item in found.assignments} == RANKS
        assert {item.phase for item in found.assignments} == {"accepted_update"}
        assert all(item.training_rows > 0 for item in found.assignments)
    uploads = trained.federation.rows("SELECT training_loss, completed_steps, digest FROM uploads")
    assert len(uploads) == 4 * (ROUNDS + OTHER_ROUNDS)
    assert all(isinstance(loss, float) and loss > 0 and steps == STEPS for loss, steps, _ in uploads)
    sizes = [Digest.parse(str(digest)).size for _, _, digest in uploads]
    # An adapter of rank r has 12 modules of 768 r numbers of 4 bytes; and there is the head.
    assert sum(sizes) > (ROUNDS + OTHER_ROUNDS) * sum(12 * 768 * 4 * rank for rank in RANKS.values())
    assert trained.federation.metric("glora_received_bytes_total") == sum(sizes)
    # What went up had come down, and the evaluator got every version besides.
    assert trained.federation.metric("glora_sent_bytes_total") > 1.5 * sum(sizes)


def test_runs_at_the_same_time_are_isolated(trained: Trained) -> None:
    run, other = trained.run, trained.other
    assert run.started_at is not None
    assert run.ended_at is not None
    assert other.started_at is not None
    assert other.ended_at is not None
    assert max(run.started_at, other.started_at) < min(run.ended_at, other.ended_at), "they did not overlap"
    assert (run.strategy, other.strategy) == ("glora", "fedit")
    assert other.rounds_done == OTHER_ROUNDS
    assert len(accuracies(other, 16)) == OTHER_ROUNDS + 1
    mine = {item.id for found in trained.federation.rounds("glora") for item in found.assignments}
    theirs = {item.id for found in trained.federation.rounds("fedit") for item in found.assignments}
    assert not mine & theirs
    assert len(theirs) == 4 * OTHER_ROUNDS


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft in transformers
@pytest.mark.parametrize(("flavour", "rank"), [("peft", 16), ("serving", 16), ("peft", 4)])
def test_the_export_is_as_good_as_the_server_says(trained: Trained, tmp_path: Path, flavour: str, rank: int) -> None:
    folder = tmp_path / "adapter"
    exported = trained.federation.admin(
        "export", "glora", "--rank", str(rank), "--flavour", flavour, "--out", str(folder), "--json"
    )
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["version_number"] == ROUNDS
    reported = accuracies(trained.run, rank)[-1]
    assert accuracy_of(folder, trained.held_out) == pytest.approx(reported, abs=1.01 / HELD_OUT)


def accuracy_of(adapter: Path, held_out: Path) -> float:
    """Share of the rows that the base model with the adapter gets right, by ordinary peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(1)
    base = AutoModelForSequenceClassification.from_pretrained(str(minilm()), num_labels=len(labels()))
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(minilm()))
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    right = 0
    for start in range(0, len(rows), 20):
        batch = rows[start : start + 20]
        texts = tokenizer(
            [row["text"] for row in batch], padding=True, truncation=True, max_length=48, return_tensors="pt"
        )
        with torch.inference_mode():
            guesses = model(**texts).logits.argmax(-1).tolist()
        right += sum(labels()[guess] == row["label_name"] for guess, row in zip(guesses, batch, strict=True))
    return right / len(rows)
