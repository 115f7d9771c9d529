import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import engine_cases as cases
import pytest
import pytest_asyncio
import torch

from glora_server.aggregation import ClientUpdate, aggregate
from glora_server.coordinator.model import StatePart, TensorKind
from glora_server.coordinator.ports import AggregateJob, CheckJob, StrategyChoice, WorkerLostError
from glora_server.engines.local import EngineClosedError, LocalEngine
from glora_server.engines.states import module_state
from glora_wire.errors import GloraError, Reason
from glora_wire.names import lora_key
from glora_wire.payload import TensorDtype, TensorSpec, layout, read_header

MODULE = "enc.0.query"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine() -> AsyncIterator[LocalEngine]:
    """One worker for the module, since each costs seconds; it is killed now and then."""
    engine = LocalEngine(device="cpu", threads=1)
    await engine.start()
    yield engine
    await engine.close()


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def first_round(engine: LocalEngine, folder: Path) -> AggregateJob:
    parts = await engine.initialise(cases.initial(8))
    updates = []
    for rank in (2, 4, 8):
        sent = cases.header_only(folder / f"r{rank}.sent", rank)
        await engine.render(cases.rendering(sent, parts, rank, version=0))
        updates.append(cases.update_of(cases.trained(sent, folder / f"r{rank}.st", rank), sent, float(rank)))
    return cases.folding(parts, tuple(updates))


def long_job(folder: Path) -> CheckJob:
    """A second or two of QR decompositions."""
    spec = (
        TensorSpec(lora_key("m", "A"), TensorDtype.FLOAT32, (2048, 2048)),
        TensorSpec(lora_key("m", "B"), TensorDtype.FLOAT32, (2048, 2048)),
    )
    plan = layout(spec)
    path = folder / "long"
    with path.open("wb") as file:
        file.write(plan.header)
        torch.manual_seed(0)
        for _ in spec:
            file.write(torch.randn(2048, 2048).numpy().tobytes())
    return CheckJob(path=path, scales={"m": 1.0}, expected=spec, max_norm=0.0)


async def begun(engine: LocalEngine, pid: int) -> None:
    """Return once the worker burns processor time."""
    before = _ticks(pid)
    async with asyncio.timeout(60):
        while _ticks(pid) <= before + 5:  # noqa: ASYNC110 (another process sets no event)
            await asyncio.sleep(0.01)


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def test_round_through_the_worker_equals_aggregation_called_directly(engine: LocalEngine, tmp_path: Path) -> None:
    job = await first_round(engine, tmp_path)
    done = await engine.aggregate(job)
    for item in done[:-1]:
        updates = []
        for update in job.updates:
            assert update.sent_path is not None
            b, a = cases.factors(update.path, item.part.name)
            sent = cases.factors(update.sent_path, item.part.name)
            updates.append(ClientUpdate(b, a, cases.SCALE, update.weight, sent=sent))
        wanted = aggregate("glora", None, updates, rank=8, round_index=1).state
        found = module_state(item.part, strategy="glora", device=cases.CPU)
        # Another number of threads may sum in another order.
        assert torch.allclose(found.u @ found.a, wanted.u @ wanted.a, atol=1e-5)
        assert torch.allclose(found.sigma, wanted.sigma, rtol=1e-5)

    parts = tuple(item.part for item in done)
    for rank in (3, 8):
        await engine.render(cases.rendering(cases.header_only(tmp_path / f"{rank}", rank), parts, rank))
    assert read_header(tmp_path / "3").specs == cases.specs(3)
    for module in cases.SHAPES:
        (b3, a3), (b8, a8) = cases.factors(tmp_path / "3", module), cases.factors(tmp_path / "8", module)
        assert torch.equal(b3, b8[:, :3])
        assert torch.equal(a3, a8[:3])


async def test_verdicts_and_errors_cross_the_pipe(engine: LocalEngine, tmp_path: Path) -> None:
    sent = cases.header_only(tmp_path / "sent", 4)
    bad = cases.trained(sent, tmp_path / "bad", 1)
    content = bytearray(bad.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # a NaN
    bad.write_bytes(content)
    verdict = await engine.check(
        CheckJob(path=bad, scales=dict.fromkeys(cases.SHAPES, 1.0), expected=cases.specs(4), max_norm=0)
    )
    assert verdict.refusal is not None
    assert verdict.refusal.reason is Reason.NON_FINITE
    assert lora_key("enc.0.value", "B") in verdict.refusal.message

    missing = cases.update_of(tmp_path / "nowhere.st", None, 1.0)
    with pytest.raises(GloraError, match=r"nowhere\.st") as caught:
        await engine.aggregate(cases.folding((), (missing,)))
    assert caught.value.reason is Reason.PAYLOAD_MALFORMED
    refusal = await engine.check_strategy(StrategyChoice(name="magic", options={}), min_rank=1, max_rank=8)
    assert refusal is not None
    assert refusal.reason is Reason.STRATEGY_UNKNOWN
    assert "glora" in {info.name for info in await engine.strategies()}
    choice = StrategyChoice(name="glora", options={"rule": "accumulate"})
    described = await engine.describe(choice, round_index=0)
    assert described.init == "fresh"


async def test_unforeseen_error_is_answered_and_the_worker_lives_on(engine: LocalEngine, tmp_path: Path) -> None:
    broken = StatePart(name="m", kind=TensorKind.MODULE, tensors={"u": "not a tensor"})  # type: ignore[dict-item]
    sent = cases.header_only(tmp_path / "sent", 4)
    pid = engine.stats().pid
    with pytest.raises(GloraError, match="AttributeError") as caught:
        await engine.render(cases.rendering(sent, (broken,), 4))
    assert caught.value.reason is Reason.INTERNAL
    assert engine.stats().pid == pid


async def test_job_that_cannot_be_sent_leaves_the_worker_in_step(engine: LocalEngine, tmp_path: Path) -> None:
    pid = engine.stats().pid
    unpicklable = cases.update_of(tmp_path / "x", None, lambda: 1.0)  # type: ignore[arg-type]
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        await engine.aggregate(cases.folding((), (unpicklable,)))
    assert len(await engine.initialise(cases.initial(4))) == 3
    assert engine.stats().pid == pid


async def test_cancelled_callers_do_not_mix_up_answers(engine: LocalEngine, tmp_path: Path) -> None:
    pid = engine.stats().pid
    slow = asyncio.create_task(engine.check(long_job(tmp_path)))
    await begun(engine, pid)
    queued = asyncio.create_task(engine.initialise(cases.initial(4)))
    last = asyncio.create_task(engine.strategies())
    await asyncio.sleep(0)
    queued.cancel()
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    with pytest.raises(asyncio.CancelledError):
        await queued
    assert {"glora", "fedit"} <= {info.name for info in await last}
    assert engine.stats().pid == pid


async def test_killed_worker_costs_the_job_in_flight_and_nothing_else(engine: LocalEngine, tmp_path: Path) -> None:
    before = engine.stats()
    flight = asyncio.create_task(engine.check(long_job(tmp_path)))
    await begun(engine, before.pid)
    waiting = asyncio.create_task(engine.initialise(cases.initial(4)))
    assert before.pid > 0, "a signal to process 0 would end this process group"
    os.kill(before.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        await flight
    assert len(await waiting) == 3
    after = engine.stats()
    assert after.restarts == before.restarts + 1
    assert after.pid != before.pid


async def test_worker_that_ended_while_idle_is_replaced_without_an_error(engine: LocalEngine) -> None:
    before = engine.stats()
    assert before.pid > 0, "a signal to process 0 would end this process group"
    os.kill(before.pid, signal.SIGKILL)
    cases.until_gone(before.pid)
    assert (engine.stats().pid, engine.device) == (0, "")
    assert len(await engine.initialise(cases.initial(4))) == 3
    assert engine.stats().restarts == before.restarts + 1
    assert engine.stats().pid not in {0, before.pid}


async def test_signals_of_a_terminal_or_service_are_left_to_the_parent(engine: LocalEngine) -> None:
    pid = engine.stats().pid
    assert pid > 0, "a signal to process 0 would end this process group"
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert len(await engine.initialise(cases.initial(4))) == 3
    assert engine.stats().pid == pid


async def test_stats_count_work_and_memory(engine: LocalEngine) -> None:
    before = engine.stats()
    await engine.initialise(cases.initial(4))
    after = engine.stats()
    assert after.jobs == before.jobs + 1
    assert after.busy_seconds > before.busy_seconds
    assert after.device == engine.device == "cpu"
    assert 50e6 < after.peak_bytes < 4e9


async def test_waiting_places_are_given_back(tmp_path: Path) -> None:
    engine = LocalEngine(device="cpu", threads=1, max_waiting=2)
    try:
        results = await asyncio.gather(*(engine.initialise(cases.initial(4)) for _ in range(6)))
        assert [len(parts) for parts in results] == [3] * 6
        flight = asyncio.create_task(engine.check(long_job(tmp_path)))
        queued = asyncio.create_task(engine.strategies())
        pid = engine.stats().pid
        await begun(engine, pid)
    finally:
        await engine.close()
    for task in (flight, queued, asyncio.create_task(engine.strategies())):
        with pytest.raises(EngineClosedError):
            await task
    cases.until_gone(pid)
    assert engine.stats().pid == 0
    await engine.close()


async def test_device_that_is_not_there_is_a_setting_to_change() -> None:
    engine = LocalEngine(device="cuda:63")
    with pytest.raises(GloraError, match="asks for cuda:63 and torch sees") as caught:
        await engine.start()
    assert caught.value.reason is Reason.SETTINGS_INVALID
    await engine.close()
