"""What every store does with versions, their tensors, readouts and the audit log (the same on each database)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import text
from storage_records import NOW, bound, digest, part, readout, run, stage, stage_round, together, upload, version

from glora_server.coordinator.model import (
    AuditEntry,
    ModuleDiagnostics,
    Page,
    StatePart,
    TensorData,
    TensorKind,
    Version,
)
from glora_server.coordinator.ports import UnitOfWork
from glora_server.rounds.ids import RunId, VersionId
from glora_server.storage.store import SqlStore
from glora_server.storage.unit_of_work import SqlUnitOfWork
from glora_wire.errors import GloraError, Reason

_RUN = RunId("id-first")
_V0, _V1 = VersionId("v0"), VersionId("v1")


def _published(number: int, uow: UnitOfWork, *, pinned: bool = False) -> None:
    uow.versions.add(version(number, pinned=pinned))
    uow.versions.put_parts(VersionId(f"v{number}"), part())
    uow.versions.put_readout(readout(f"v{number}"))
    uow.versions.publish(VersionId(f"v{number}"), "{}")


async def test_parts_written_earlier_are_published_together(store: SqlStore) -> None:
    await store.write(lambda uow: uow.runs.add(run()))
    await store.write(lambda uow: uow.versions.add(version(1)))
    dense = StatePart(name="classifier.weight", kind=TensorKind.DENSE, tensors={})
    await store.write(lambda uow: uow.versions.put_parts(_V1, part(size=8)))
    await store.write(lambda uow: uow.versions.put_parts(_V1, part()))
    await store.write(lambda uow: uow.versions.put_parts(_V1, dense))
    with pytest.raises(GloraError) as raised:
        await store.read(lambda uow: uow.versions.by_number(_RUN, 1))
    assert raised.value.reason is Reason.VERSION_UNKNOWN
    assert (await store.read(lambda uow: uow.versions.list(_RUN, Page()))).items == ()
    await store.write(lambda uow: uow.versions.publish(_V1, '{"captured": 0.9}'))
    found = await store.read(lambda uow: uow.versions.by_number(_RUN, 1))
    assert found == version(1, published=True, summary_json='{"captured": 0.9}')
    assert await store.read(lambda uow: uow.versions.part_names(_V1)) == ("classifier.weight", part().name)
    assert await store.read(lambda uow: uow.versions.parts(_V1, [part().name])[0]) == part()
    assert await store.read(lambda uow: uow.versions.parts(_V1, ["classifier.weight"])[0]) == dense


async def test_a_published_version_never_changes(store: SqlStore) -> None:
    await store.write(stage)
    for work in (lambda uow: uow.versions.put_parts(_V0, part()), lambda uow: uow.versions.drop(_V0)):
        with pytest.raises(GloraError, match="never change") as raised:
            await store.write(work)
        assert raised.value.reason is Reason.ILLEGAL_TRANSITION
    assert (await store.read(lambda uow: uow.versions.get(_V0))).published


async def test_a_number_is_published_once_and_by_the_first(store: SqlStore) -> None:
    await store.write(stage)
    twin = version(id=VersionId("twin"))
    await store.write(lambda uow: uow.versions.add(twin))

    def publish(uow: UnitOfWork) -> str:
        try:
            uow.versions.publish(twin.id, "{}")
        except GloraError as error:
            uow.versions.drop(twin.id)  # the transaction is still good
            return error.reason
        return ""

    assert await store.write(publish) == Reason.STALE_STATE
    with pytest.raises(GloraError):
        await store.read(lambda uow: uow.versions.get(twin.id))


async def test_an_unpublished_version_is_dropped_whole(store: SqlStore) -> None:
    await store.write(stage)

    def build(uow: UnitOfWork) -> None:
        uow.versions.add(version(1))
        uow.versions.put_parts(_V1, part())
        uow.versions.put_diagnostics(ModuleDiagnostics(version_id=_V1, module="m", values_json="{}"))

    await store.write(build)
    await store.write(lambda uow: uow.versions.drop(_V1))
    await store.write(lambda uow: uow.versions.drop(_V1))
    with pytest.raises(GloraError):
        await store.read(lambda uow: uow.versions.get(_V1))
    assert await store.read(lambda uow: uow.versions.part_names(_V1)) == ()
    assert await store.read(lambda uow: uow.versions.diagnostics(_V1)) == ()


async def test_unknown_versions_are_named_with_those_that_exist(store: SqlStore) -> None:
    await store.write(stage)
    for work, words in (
        (lambda uow: uow.versions.by_number(_RUN, 7), "number 7; the newest are 0"),
        (lambda uow: uow.versions.by_number(RunId("other"), 7), "it has none yet"),
        (lambda uow: uow.versions.get(VersionId("v9")), "'v9'"),
        (lambda uow: uow.versions.parts(VersionId("v9"), ["m"])[0], "'v9'"),
        (lambda uow: uow.versions.parts(_V0, ["m"])[0], "no part 'm'"),
        (lambda uow: uow.versions.put_parts(VersionId("v9"), part()), "'v9'"),
        (lambda uow: uow.versions.publish(VersionId("v9"), ""), "'v9'"),
        (lambda uow: uow.versions.pin(VersionId("v9"), pinned=True), "'v9'"),
    ):
        with pytest.raises(GloraError, match=words) as raised:
            await store.write(work)
        assert raised.value.reason is Reason.VERSION_UNKNOWN


async def test_versions_are_listed_newest_first(store: SqlStore) -> None:
    await store.write(stage)
    for number in (1, 2):
        await store.write(bound(lambda uow, number: _published(number, uow), number))
    first = await store.read(lambda uow: uow.versions.list(_RUN, Page(size=2)))
    rest = await store.read(lambda uow: uow.versions.list(_RUN, Page(size=2, token=first.next_token)))
    assert [item.number for item in (*first.items, *rest.items)] == [2, 1, 0]


async def test_retention_keeps_the_last_and_the_pinned_versions(store: SqlStore) -> None:
    await store.write(stage)
    for number in range(1, 6):
        await store.write(bound(lambda uow, number: _published(number, uow, pinned=number == 2), number))
    await store.write(lambda uow: uow.versions.pin(_V1, pinned=True))
    await store.write(lambda uow: uow.versions.pin(_V1, pinned=False))
    dropped = await store.write(lambda uow: uow.versions.prune(_RUN, keep=2))
    assert sorted(item.version_id for item in dropped) == ["v1", "v3"]
    found: dict[str, Version] = {}
    for number in range(1, 6):
        name = VersionId(f"v{number}")
        found[name] = await store.read(bound(lambda uow, name: uow.versions.get(name), name))
        kept = number in {2, 4, 5}
        assert found[name].pruned is not kept
        assert bool(await store.read(bound(lambda uow, name: uow.versions.part_names(name), name))) is kept
        assert (
            await store.read(bound(lambda uow, name: uow.versions.readout(name, 4, "float32"), name)) is not None
        ) is kept
    with pytest.raises(GloraError, match="retention") as raised:
        await store.read(lambda uow: uow.versions.parts(_V1, [part().name])[0])
    assert raised.value.reason is Reason.VERSION_UNKNOWN
    assert await store.write(lambda uow: uow.versions.prune(_RUN, keep=2)) == ()
    await store.write(lambda uow: uow.versions.prune(_RUN, keep=0))
    assert await store.read(lambda uow: uow.versions.part_names(VersionId("v5"))), "the current state always stays"


async def test_retention_does_not_hand_out_blobs_that_are_still_needed(store: SqlStore) -> None:
    """The same content can be a readout of two versions, and an upload."""
    await store.write(stage_round)
    shared, sent = digest("same bytes"), digest("a1")

    def build(uow: UnitOfWork) -> None:
        for number in (1, 2, 3):
            uow.versions.add(version(number))
            uow.versions.publish(VersionId(f"v{number}"), "{}")
        uow.versions.put_readout(readout("v1", digest=shared))
        uow.versions.put_readout(readout("v1", rank=8, digest=sent))
        uow.versions.put_readout(readout("v2", digest=digest("lonely")))
        uow.versions.put_readout(readout("v3", digest=shared))
        uow.uploads.add(upload())

    await store.write(build)
    dropped = await store.write(lambda uow: uow.versions.prune(_RUN, keep=1))
    assert [item.version_id for item in dropped] == ["v2"]


async def test_readouts_are_noted_once_per_rank_and_dtype(store: SqlStore) -> None:
    await store.write(stage)
    assert await store.read(lambda uow: uow.versions.readout(_V0, 4, "float32")) is None
    other = readout(dtype="bfloat16", digest=digest("bf16"))
    for stored in (readout(), readout(), other):
        await store.write(bound(lambda uow, stored: uow.versions.put_readout(stored), stored))
    assert await store.read(lambda uow: uow.versions.readout(_V0, 4, "float32")) == readout()
    assert await store.read(lambda uow: uow.versions.readout_digests()) == {readout().digest.text, other.digest.text}
    again = replace(readout(), digest=digest("rendered again"))
    await store.write(lambda uow: uow.versions.put_readout(again))
    assert await store.read(lambda uow: uow.versions.readout(_V0, 4, "float32")) == again


async def test_diagnostics_come_by_module_name(store: SqlStore) -> None:
    await store.write(stage)
    made = [ModuleDiagnostics(version_id=_V0, module=name, values_json=f'{{"{name}": 1}}') for name in ("b", "a", "B")]
    for item in made:
        await store.write(bound(lambda uow, item: uow.versions.put_diagnostics(item), item))
    await store.write(lambda uow: uow.versions.put_diagnostics(replace(made[0], values_json="{}")))
    found = await store.read(lambda uow: uow.versions.diagnostics(_V0))
    assert [(item.module, item.values_json) for item in found] == [("B", '{"B": 1}'), ("a", '{"a": 1}'), ("b", "{}")]


async def test_a_part_of_twenty_megabytes_works(store: SqlStore) -> None:
    data = bytes(range(256)) * (20 * 1024 * 1024 // 256)
    big = StatePart(
        name="m",
        kind=TensorKind.MODULE,
        tensors={"u": TensorData(dtype="float32", shape=(5 * 1024 * 1024,), data=data)},
    )
    await store.write(together(lambda uow: uow.runs.add(run()), lambda uow: uow.versions.add(version(1))))
    await store.write(lambda uow: uow.versions.put_parts(_V1, big))
    assert await store.read(lambda uow: uow.versions.parts(_V1, ["m"])[0]) == big


async def test_parts_come_in_the_order_in_which_they_are_asked_for(store: SqlStore) -> None:
    names = [f"layer.{number}" for number in range(12)]
    made = [replace(part(), name=name) for name in names]
    await store.write(
        together(
            lambda uow: uow.runs.add(run()),
            lambda uow: uow.versions.add(version(1)),
            lambda uow: uow.versions.put_parts(_V1, *made),
        )
    )
    assert await store.read(lambda uow: uow.versions.parts(_V1, names[::-1])) == tuple(made[::-1])
    assert await store.read(lambda uow: uow.versions.parts(_V1, [])) == ()
    with pytest.raises(GloraError, match="no part 'layer\\.99'") as raised:
        await store.read(lambda uow: uow.versions.parts(_V1, [names[0], "layer.99"]))
    assert raised.value.reason is Reason.VERSION_UNKNOWN


async def test_a_tensor_that_was_damaged_is_not_handed_out(store: SqlStore) -> None:
    await store.write(
        together(
            lambda uow: uow.runs.add(run()),
            lambda uow: uow.versions.add(version(1)),
            lambda uow: uow.versions.put_parts(_V1, part()),
        )
    )

    def damage(uow: UnitOfWork) -> None:
        assert isinstance(uow, SqlUnitOfWork)
        changed = uow.connection.execute(
            text("UPDATE version_tensors SET data = :data WHERE tensor = 'u'"), {"data": b"\x00" * 16}
        )
        assert changed.rowcount == 1

    await store.write(damage)
    with pytest.raises(GloraError, match="damaged") as raised:
        await store.read(lambda uow: uow.versions.parts(_V1, [part().name])[0])
    assert raised.value.reason is Reason.DIGEST_MISMATCH


async def test_the_audit_log_is_listed_newest_first(store: SqlStore) -> None:
    entries = [AuditEntry(at=NOW - i, actor="ada", action="approve", target=f"pi-{i}") for i in range(5)]
    for entry in entries:
        await store.write(bound(lambda uow, entry: uow.audit.add(entry), entry))
    first = await store.read(lambda uow: uow.audit.list(Page(size=3)))
    rest = await store.read(lambda uow: uow.audit.list(Page(size=3, token=first.next_token)))
    assert [replace(item, id=0) for item in (*first.items, *rest.items)] == entries[::-1]


async def test_readouts_of_one_rank_are_kept_apart_by_what_was_cut(store: SqlStore) -> None:
    await store.write(stage)
    tail = readout(variant="tail", digest=digest("tail"))
    for stored in (readout(), tail):
        await store.write(bound(lambda uow, stored: uow.versions.put_readout(stored), stored))
    assert await store.read(lambda uow: uow.versions.readout(_V0, 4, "float32")) == readout()
    assert await store.read(lambda uow: uow.versions.readout(_V0, 4, "float32", "tail")) == tail
    assert await store.read(lambda uow: uow.versions.readout(_V0, 4, "float32", "state")) is None


async def test_the_rank_of_a_module_is_known_without_reading_its_tensors(store: SqlStore) -> None:
    await store.write(stage)
    await store.write(lambda uow: uow.versions.add(version(1)))
    sigma = TensorData(dtype="float32", shape=(3,), data=bytes(12))
    module = replace(part(), tensors=dict(part().tensors) | {"sigma": sigma})
    await store.write(lambda uow: uow.versions.put_parts(_V1, module))
    assert await store.read(lambda uow: uow.versions.module_ranks(_V1)) == {part().name: 3}
