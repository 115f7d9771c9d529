"""Uploads that stay on the device between judgement and fold. A CPU stands in for the GPU: only the room differs."""

from pathlib import Path

import engine_cases as cases
import pytest
import torch

from glora_server.coordinator.ports import AggregatedPart, AggregateJob, UpdateRef
from glora_server.engines import folding, jobs
from glora_server.engines.resident import ResidentUploads
from glora_server.engines.tensors import header_of
from glora_wire.errors import Reason
from glora_wire.names import dense_key, lora_key

RANKS = (2, 4)
ROOM = 1 << 20


def a_round(folder: Path) -> tuple[AggregateJob, dict[str, int]]:
    """The fold of two updates with digests, and the rank of each by its digest."""
    parts = jobs.initialise(cases.initial(8), cases.CPU)
    updates = []
    for rank in RANKS:
        sent = cases.header_only(folder / f"r{rank}.sent", rank)
        jobs.render(cases.rendering(sent, parts, rank, version=0), cases.CPU)
        path = cases.trained(sent, folder / f"r{rank}", rank)
        updates.append(cases.update_of(path, sent, float(rank), digest=f"digest-{rank}"))
    return cases.folding(parts, tuple(updates)), {f"digest-{rank}": rank for rank in RANKS}


def judged(job: AggregateJob, ranks: dict[str, int], resident: ResidentUploads) -> None:
    for update in job.updates:
        assert update.digest is not None
        assert jobs.check(cases.check_of(update, ranks[update.digest]), cases.CPU, resident).refusal is None


def emptied(update: UpdateRef) -> None:
    """Zeros in place of the file's numbers; its header stays."""
    first = min(entry.offset for entry in header_of(update.path).entries)
    content = update.path.read_bytes()
    update.path.write_bytes(content[:first].ljust(len(content), b"\0"))


def same(first: tuple[AggregatedPart, ...], second: tuple[AggregatedPart, ...]) -> bool:
    return [item.part for item in first] == [item.part for item in second]


def test_what_was_judged_is_folded_without_its_file_and_then_given_back(tmp_path: Path) -> None:
    job, ranks = a_round(tmp_path)
    wanted = folding.fold(job, cases.CPU)
    resident = ResidentUploads(ROOM)
    judged(job, ranks, resident)
    assert resident.size == sum(spec.nbytes for rank in RANKS for spec in cases.specs(rank))
    for update in job.updates:
        emptied(update)
    assert same(folding.fold(job, cases.CPU, resident), wanted)
    assert resident.size == 0
    assert not same(folding.fold(job, cases.CPU, resident), wanted)  # now the files are read, and they are empty


def test_what_had_to_make_room_is_read_from_its_file(tmp_path: Path) -> None:
    job, ranks = a_round(tmp_path)
    wanted = folding.fold(job, cases.CPU)
    one = sum(spec.nbytes for spec in cases.specs(RANKS[-1]))
    resident = ResidentUploads(one)
    judged(job, ranks, resident)
    assert 0 < resident.size <= one
    emptied(job.updates[-1])
    assert same(folding.fold(job, cases.CPU, resident), wanted)


def test_a_refused_update_is_not_kept(tmp_path: Path) -> None:
    job, ranks = a_round(tmp_path)
    resident = ResidentUploads(ROOM)
    update, rank = job.updates[0], ranks["digest-2"]
    refusal = jobs.check(cases.check_of(update, rank, max_norm=1e-9), cases.CPU, resident).refusal
    assert refusal is not None
    assert refusal.reason is Reason.NORM_TOO_LARGE
    assert resident.size == 0
    content = bytearray(update.path.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # a NaN, in the last tensor
    update.path.write_bytes(content)
    refusal = jobs.check(cases.check_of(update, rank), cases.CPU, resident).refusal
    assert refusal is not None
    assert refusal.reason is Reason.NON_FINITE
    assert resident.size == 0


def test_an_update_without_a_digest_is_not_kept(tmp_path: Path) -> None:
    job, _ = a_round(tmp_path)
    resident = ResidentUploads(ROOM)
    nameless = cases.update_of(job.updates[0].path, None, 1.0)
    assert jobs.check(cases.check_of(nameless, RANKS[0]), cases.CPU, resident).refusal is None
    assert resident.size == 0


def test_a_cpu_keeps_nothing() -> None:
    resident = ResidentUploads.on(cases.CPU)
    resident.keep("one", "key", torch.ones(4))
    assert resident.size == 0
    assert resident.take("one", "key") is None


def test_the_oldest_upload_makes_room() -> None:
    resident = ResidentUploads(64)
    resident.keep("old", "a", torch.ones(8))
    resident.keep("new", "a", torch.zeros(4))
    resident.keep("new", "b", torch.ones(8))
    assert resident.take("old", "a") is None
    found = resident.take("new", "a")
    assert found is not None
    assert torch.equal(found, torch.zeros(4))
    assert resident.size == 32
    assert resident.take("new", "a") is None
    resident.keep("huge", "a", torch.ones(17))  # more than there is room for at all: it pushes nobody out
    assert resident.size == 32


@pytest.mark.parametrize("key", [lora_key("enc.0.query", "A"), dense_key(cases.HEAD)])
def test_judging_twice_holds_once(tmp_path: Path, key: str) -> None:
    job, ranks = a_round(tmp_path)
    resident = ResidentUploads(ROOM)
    judged(job, ranks, resident)
    size = resident.size
    judged(job, ranks, resident)
    assert resident.size == size
    assert resident.take("digest-2", key) is not None
    assert resident.take("digest-2", key) is None
