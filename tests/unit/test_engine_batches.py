"""A shard folded in batches of modules, as on a GPU, and in threads, against one module at a time; all on the CPU."""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import pytest
import torch

from glora_server.aggregation.fast.intake import Group, ModuleRound, VoteRule, read_groups
from glora_server.coordinator.ports import AggregatedPart, AggregateJob, StrategyChoice
from glora_server.engines import folding, jobs
from glora_server.engines.states import module_state
from glora_wire.errors import GloraError, Reason

SHAPES = {"enc.0.query": (72, 40), "enc.0.value": (72, 40), "enc.1.query": (64, 40), "enc.1.value": (72, 40)}
FAST = StrategyChoice(name="glora", options={"accuracy": "fast"})
ALL = 1 << 30


def shard(folder: Path, monkeypatch: pytest.MonkeyPatch, strategy: StrategyChoice = FAST) -> AggregateJob:
    """Three devices of ranks 2, 4, 8 over version 0 of four modules and a head."""
    monkeypatch.setattr(cases, "SHAPES", SHAPES)
    parts = jobs.initialise(cases.initial(8, strategy), cases.CPU)
    updates = []
    for rank in (2, 4, 8):
        sent = cases.header_only(folder / f"r{rank}.sent", rank)
        jobs.render(replace(cases.rendering(sent, parts, rank, version=0), strategy=strategy), cases.CPU)
        updates.append(cases.update_of(cases.trained(sent, folder / f"r{rank}.st", rank), sent, float(rank)))
    return cases.folding(parts, tuple(updates), strategy=strategy)


def agree(one: AggregatedPart, other: AggregatedPart) -> None:
    assert one.part.name == other.part.name
    if one.part.name == cases.HEAD:
        assert one.part == other.part
        return
    first, second = (module_state(item.part, strategy="glora", device=cases.CPU) for item in (one, other))
    assert first.rank > 0
    assert torch.allclose(first.u @ first.a, second.u @ second.a, atol=1e-5)


def test_batches_give_what_single_modules_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds; the second one goes on from states."""
    job = shard(tmp_path, monkeypatch)
    sizes = []

    def counted(rule: VoteRule, modules: Sequence[ModuleRound], *, stack: bool) -> tuple[Group, ...]:
        sizes.append((len(modules), stack))
        return read_groups(rule, modules, stack=stack)

    monkeypatch.setattr("glora_server.aggregation.fast.fold.read_groups", counted)
    for _ in range(2):
        sizes.clear()
        together, alone = folding.fold(job, cases.CPU, batch_bytes=ALL), folding.fold(job, cases.CPU)
        assert sizes == [(3, True), (1, True), *[(1, False)] * 4]
        for one, other in zip(together, alone, strict=True):
            agree(one, other)
        job = replace(job, parts=tuple(item.part for item in alone))


def test_no_more_is_loaded_at_once_than_the_limit_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = shard(tmp_path, monkeypatch)
    sizes = []
    fold_modules = folding._fold_modules

    def counted(modules: Sequence[folding._Module], job: AggregateJob) -> dict[int, AggregatedPart]:
        sizes.append(len(modules))
        return fold_modules(modules, job)

    monkeypatch.setattr(folding, "_fold_modules", counted)
    of_one = 4 * (2 + 4 + 8) * (72 + 40)
    made = folding.fold(job, cases.CPU, batch_bytes=of_one + 1)
    assert sizes == [2, 2, 0]
    for one, other in zip(made, folding.fold(job, cases.CPU), strict=True):
        agree(one, other)


def test_a_batch_that_fails_names_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = shard(tmp_path, monkeypatch)
    broken = replace(job.updates[1], scales={**job.updates[1].scales, "enc.1.query": float("nan")})
    job = replace(job, updates=(job.updates[0], broken, job.updates[2]))
    with pytest.raises(GloraError, match=r"^enc\.1\.query could not be aggregated: Update 1 .*1 = r4") as caught:
        folding.fold(job, cases.CPU, batch_bytes=ALL)
    assert caught.value.reason is Reason.AGGREGATION_FAILED


def test_strategies_without_batches_do_not_mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = shard(tmp_path, monkeypatch, StrategyChoice(name="flexlora", options={}))
    together, alone = folding.fold(job, cases.CPU, batch_bytes=ALL), folding.fold(job, cases.CPU)
    assert [item.part for item in together] == [item.part for item in alone]


@pytest.mark.parametrize("accuracy", ["exact", "fast"])
def test_threads_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: str) -> None:
    job = shard(tmp_path, monkeypatch, StrategyChoice(name="glora", options={"accuracy": accuracy}))
    monkeypatch.setattr(folding, "_WORTH_A_THREAD", 0)
    assert folding.fold(job, cases.CPU, threads=3) == folding.fold(job, cases.CPU)


def test_a_thread_takes_no_more_cores_than_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN asks OpenMP, whose own default is all cores in every new thread."""
    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
    if library is None:
        pytest.skip("this torch comes without libgomp, which could be asked")
    openmp = ctypes.CDLL(str(library))
    job, before, seen = shard(tmp_path, monkeypatch), torch.get_num_threads(), []
    fold_modules = folding._fold_modules

    def asked(modules: Sequence[folding._Module], job: AggregateJob) -> dict[int, AggregatedPart]:
        seen.append(openmp.omp_get_max_threads())
        return fold_modules(modules, job)

    monkeypatch.setattr(folding, "_fold_modules", asked)
    monkeypatch.setattr(folding, "_WORTH_A_THREAD", 0)
    torch.set_num_threads(1)
    try:
        folding.fold(job, cases.CPU, threads=3)
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize(("room", "at_once"), [(folding._CPU_BYTES, 3), (2 * 4 * 14 * 112, 2), (1, 1)])
def test_threads_work_at_once_on_what_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, at_once: int
) -> None:
    job = shard(tmp_path, monkeypatch)
    monkeypatch.setattr(folding, "_CPU_BYTES", room)
    monkeypatch.setattr(folding, "_WORTH_A_THREAD", 0)
    meeting = threading.Barrier(at_once)
    fold_modules, workers = folding._fold_modules, set()

    def met(modules: Sequence[folding._Module], job: AggregateJob) -> dict[int, AggregatedPart]:
        if threading.current_thread() not in workers:
            workers.add(threading.current_thread())
            meeting.wait(60.0)  # breaks unless so many are at work at once
        assert not torch.is_grad_enabled()
        return fold_modules(modules, job)

    monkeypatch.setattr(folding, "_fold_modules", met)
    with torch.no_grad():
        made = folding.fold(job, cases.CPU, threads=3)
    assert len(workers) == at_once
    assert [item.part.name for item in made] == [part.name for part in job.parts]


def test_small_modules_are_not_worth_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = shard(tmp_path, monkeypatch)
    fold_modules, workers = folding._fold_modules, set()

    def noted(modules: Sequence[folding._Module], job: AggregateJob) -> dict[int, AggregatedPart]:
        workers.add(threading.current_thread())
        return fold_modules(modules, job)

    monkeypatch.setattr(folding, "_fold_modules", noted)
    folding.fold(job, cases.CPU, threads=3)
    assert workers == {threading.current_thread()}


def test_a_thread_that_fails_names_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = shard(tmp_path, monkeypatch)
    monkeypatch.setattr(folding, "_WORTH_A_THREAD", 0)
    broken = replace(job.updates[1], scales={**job.updates[1].scales, "enc.1.query": float("nan")})
    job = replace(job, updates=(job.updates[0], broken, job.updates[2]))
    with pytest.raises(GloraError, match=r"^enc\.1\.query could not be aggregated: Update 1 .*1 = r4") as caught:
        folding.fold(job, cases.CPU, threads=2)
    assert caught.value.reason is Reason.AGGREGATION_FAILED
